"""k-means of held-out embeddings against their classes, as ProtoCLIP reports it (methods 7.2)."""

import numpy as np
import torch

from protoclip_scale import collectives
from protoclip_scale.evaluation.zero_shot import class_names, targets_of
from protoclip_scale.prototypes import kmeans
from protoclip_scale.prototypes.agreement import adjusted_mutual_information, adjusted_rand
from protoclip_scale.prototypes.distinct import draw_distinct, position_keys
from protoclip_scale.prototypes.fixed_point import extent_of
from protoclip_scale.prototypes.starts import SAME_ROW
from protoclip_scale.recipe.schema import Prototypes
from protoclip_scale.recipe.schema.measures import Diagnostics

SEED = (0,)


def embedding_cluster_figures(images: torch.Tensor, classes: dict[str, list[str]], settings: Diagnostics) -> dict[str, float]:
    """``kmeans/COLUMN/{ari,ami,k,n}`` of unit image embeddings [n, D] float32 with each class column of at least two classes; a collective.

    As many clusters as classes, or as distinct embeddings where those are fewer: a collapsed model has one, and both figures 0. Plain k-means (centroids are not
    scaled to unit length), iterations and restarts of ``settings``. Each rank searches every W-th row; the result does not depend on W.
    """
    figures: dict[str, float] = {}
    for column, values in classes.items():
        names = class_names(values)
        targets = targets_of(values, names)
        known = targets >= 0
        if len(names) < 2:
            continue
        rows, targets = images[known].numpy(), targets[known].numpy()
        own = np.arange(collectives.rank(), len(rows), collectives.world_size())
        parts, options = [rows[own]], Prototypes(clusters=len(names), iterations=settings.iterations, restarts=settings.restarts)
        keys, tolerance = position_keys(SEED, "distinct embeddings", own), SAME_ROW * extent_of(parts).largest
        distinct = draw_distinct(parts, [own], [keys], len(names), tolerance, np.empty((0, rows.shape[1]), dtype=np.float32), options.engine)
        found = kmeans.fit(parts, [own], options.model_copy(update={"clusters": len(distinct)}), SEED)
        labels = np.empty(len(rows), dtype=np.int64)
        for places, part in collectives.all_gather_objects((own, found.labels[0])):
            labels[places] = part
        agreement = {"ari": adjusted_rand(targets, labels), "ami": adjusted_mutual_information(targets, labels)}
        figures |= {f"kmeans/{column}/{key}": value for key, value in {**agreement, "k": len(distinct), "n": len(rows)}.items()}
    return figures
