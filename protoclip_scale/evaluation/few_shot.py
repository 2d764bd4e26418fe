"""Probes on a few rows of each class: how many labels an image-text model saves (Radford et al. 2021, figure 6)."""

import statistics

import torch

from protoclip_scale.data.randomness import permutation
from protoclip_scale.evaluation.probe import fit_logistic, logits
from protoclip_scale.evaluation.zero_shot import shared_hits
from protoclip_scale.recipe.schema.measures import FewShot

LEVEL_LOGITS = 1e-9


def drawn_rows(targets: torch.Tensor, shots: int, seed: int, draw: int) -> torch.Tensor:
    """Row numbers, ascending: of each class the first ``shots`` in the order f(seed, draw); all of a class that has fewer. More shots of a draw hold the fewer."""
    order = torch.from_numpy(permutation(len(targets), seed, "few shots", draw))
    place_in_class = torch.empty_like(order)
    by_class = order[targets[order].argsort(stable=True)]
    counts = torch.bincount(targets)
    place_in_class[by_class] = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return (place_in_class < shots).nonzero()[:, 0]


def few_shot_figures(
    train: torch.Tensor, train_targets: torch.Tensor, tests: dict[str, tuple[torch.Tensor, torch.Tensor]], num_classes: int, settings: FewShot, device: torch.device
) -> dict[str, dict[str, float]]:
    """``{S}shot/top1``, the mean accuracy over the draws, and ``{S}shot/spread``, their standard deviation (n - 1), of each of the ``tests``.

    ``train`` and the tests' images [n, D] are unit embeddings on the CPU, targets int64; every class has a training row. Rows are centred by the mean of those drawn. The penalty is
    ``settings.c`` for every number of shots. Level classes share a hit, so that a collapsed model scores chance. Numbers of shots that no class has are left out. Cost: draws fits to shots x num_classes rows for each number.
    """
    largest = int(torch.bincount(train_targets).max())
    tests = {name: (images.to(device).double(), targets.to(device)) for name, (images, targets) in tests.items()}
    figures: dict[str, dict[str, float]] = {name: {} for name in tests}
    for shots in settings.shots:
        if shots > largest:
            continue
        reached: dict[str, list[float]] = {name: [] for name in tests}
        for draw in range(settings.draws):
            rows = drawn_rows(train_targets, shots, settings.seed, draw)
            features = train[rows].to(device).double()
            centre = features.mean(0)
            weights = fit_logistic(features - centre, train_targets[rows].to(device), num_classes, settings.c)
            for name, (images, targets) in tests.items():
                reached[name].append(shared_hits(logits(weights, images - centre), targets, LEVEL_LOGITS).mean().item())
        for name, accuracies in reached.items():
            figures[name] |= {f"{shots}shot/top1": statistics.fmean(accuracies), f"{shots}shot/spread": statistics.stdev(accuracies)}
    return figures
