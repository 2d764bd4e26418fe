"""Prototype Back Translation: the clusters of one space, as class means in another (methods 6.2, step 4)."""

from collections.abc import Sequence

import numpy as np

from protoclip_scale.prototypes.fixed_point import Extent, add_by_class, extent_of, means, reduce_array
from protoclip_scale.prototypes.store import BLOCK_ROWS, let_pages_go


def class_means(features: Sequence[np.ndarray], labels: Sequence[np.ndarray], num_classes: int, extent: Extent | None = None) -> np.ndarray:
    """C_k = mean of the student's features over the rows that the teacher put into cluster k; float32 [K, d].

    ``features``: [n_l, d] arrays, memory-mapped or not, of the rank's own lanes; ``labels``: their [n_l] teacher labels. Plain means, not
    normalised; an empty cluster is a zero row. A collective: the same on all ranks, bit for bit, for any number of them.
    ``extent``: of ``features``, where it is known. Costs a pass over the own features, two if it is not, and one all-reduce of K x d int64.
    """
    assert len(features) == len(labels) and all(len(part) == len(label) for part, label in zip(features, labels, strict=True))
    exponent = (extent or extent_of(features)).exponent
    sums = np.zeros((num_classes, features[0].shape[1]), dtype=np.int64)
    counts = np.zeros(num_classes, dtype=np.int64)
    for part, part_labels in zip(features, labels, strict=True):
        for start in range(0, len(part), BLOCK_ROWS):
            add_by_class(sums, counts, part[start : start + BLOCK_ROWS], part_labels[start : start + BLOCK_ROWS], exponent)
            let_pages_go(part)
    return means(reduce_array(sums), reduce_array(counts), exponent)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows [K, d] scaled to unit length; zero rows, those of empty clusters, stay zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
