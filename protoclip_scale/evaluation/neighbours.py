"""Classification by the nearest training rows (k-NN on unit embeddings), with fair ties."""

import torch

from protoclip_scale.evaluation.retrieval import TOLERANCE
from protoclip_scale.evaluation.zero_shot import shared_hits

TILE_COSINES = 1 << 22
LEVEL_VOTES = 1e-9  # of the sum of votes: sums in another order differ by less


def neighbour_hits(train: torch.Tensor, train_targets: torch.Tensor, images: torch.Tensor, targets: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """[n] float64 on the CPU: 1 where the k nearest rows vote for the right class, 1/m where it is one of m classes level at the top.

    Each neighbour votes for its class with weight exp(cosine / temperature) (Wu et al. 2018; DINO). Rows level with the k-th nearest (within 1e-6) share the places
    that are left, so neither the order of rows nor equal embeddings matter: a collapsed model answers the largest class. k is at most the number of rows.
    ``train`` [N, D] and ``images`` [n, D] are unit rows. Cost: 2 n N D operations, in tiles of 2**22 cosines on the device of ``train``.
    """
    k, num_classes, hits = min(k, len(train)), int(train_targets.max()) + 1, []
    for rows, own in zip(*(tensor.to(train.device).split(max(1, TILE_COSINES // len(train))) for tensor in (images, targets)), strict=True):
        cosines = rows @ train.T
        last = cosines.topk(k, dim=1).values[:, -1:]
        nearer, level = cosines > last + TOLERANCE, (cosines - last).abs() <= TOLERANCE
        shares = nearer.double() + level * ((k - nearer.sum(1, keepdim=True)) / level.sum(1, keepdim=True)).double()
        query, neighbour = shares.nonzero(as_tuple=True)
        weights = shares[query, neighbour] * ((cosines[query, neighbour].double() - 1) / temperature).exp()
        votes = torch.zeros(len(rows) * num_classes, dtype=torch.float64, device=train.device)
        votes = votes.index_add_(0, query * num_classes + train_targets[neighbour], weights).view(len(rows), num_classes)
        hits.append(shared_hits(votes / votes.sum(1, keepdim=True), own, LEVEL_VOTES).cpu())
    return torch.cat(hits)
