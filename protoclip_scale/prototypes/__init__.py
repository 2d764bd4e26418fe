"""Between two episodes: the feature store, k-means over all ranks, back translation."""
