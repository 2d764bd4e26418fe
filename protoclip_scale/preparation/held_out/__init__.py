"""From the evaluation sets as their authors publish them to parquet shards with image bytes and class names or captions."""
