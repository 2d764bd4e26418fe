"""Linear probes by SGD, with the constants of published code (methods 7.3); the whole training set is one tensor of features, so an epoch is a few products."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from protoclip_scale import standing
from protoclip_scale.data.randomness import permutation, raw_keys

MOMENTUM = 0.9
INITIAL_DEVIATION = 0.01


@dataclass(frozen=True)
class SgdRecipe:
    """``judged_every``: of the reference, whose best judged epoch counts. ``reference_lr``: where its code makes another of it."""

    lr: float
    reference_lr: float
    weight_decay: float
    batch: int
    epochs: int
    judged_every: int
    reference_shuffles: bool


RECIPES = {
    "protoclip_sgd": SgdRecipe(lr=0.1, reference_lr=0.1, weight_decay=1e-6, batch=1024, epochs=100, judged_every=1, reference_shuffles=False),
    "slip_sgd": SgdRecipe(lr=0.4, reference_lr=0.00625, weight_decay=0.0, batch=1024, epochs=90, judged_every=10, reference_shuffles=True),
}


def fit_sgd(
    features: torch.Tensor, targets: torch.Tensor, num_classes: int, method: str, variant: str, accuracy: Callable[[torch.Tensor], float], seed: int = 0
) -> torch.Tensor:
    """[num_classes, D+1] weights, then the intercept. ``features`` [n, D] and ``targets`` [n] lie on the device that works, in fp32.

    Weights begin at N(0, 0.01), the intercept at 0; SGD with momentum 0.9, a cosine over epochs from the peak to 0, stepped once an epoch.
    ``variant`` paper shuffles and gives the last epoch's weights. reference repeats what the published code does:

    - protoclip_sgd: the training rows come in the order of their classes, never shuffled; the epoch that is best on the test rows is given.
    - slip_sgd: the learning rate 0.1 is divided by the 8 GPUs and again by 256 / 128 = 0.00625 (the rule it follows multiplies: 0.4); the best of every tenth epoch on the test rows.

    ``accuracy``: of weights on the test rows; asked by the reference only. Where ours still differ from both: features of the evaluation transform, made once
    (SLIP augments each epoch anew), and draws of our own generators. Cost: epochs x 6 n D num_classes operations.
    """
    recipe, reference = RECIPES[method], variant == "reference"
    if reference and not recipe.reference_shuffles:
        order = targets.argsort(stable=True)
        features, targets = features[order], targets[order]
    features = F.pad(features.float(), (0, 1), value=1.0)
    draw = torch.Generator().manual_seed(int(raw_keys(1, seed, "sgd probe")[0]) >> 1)
    weights = torch.randn(num_classes, features.shape[1], generator=draw).mul_(INITIAL_DEVIATION)
    weights[:, -1] = 0
    weights = weights.to(features.device)
    velocity, best, best_weights = torch.zeros_like(weights), -math.inf, weights
    for epoch in range(recipe.epochs):
        lr = (recipe.reference_lr if reference else recipe.lr) * 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))
        order = torch.arange(len(targets)) if reference and not recipe.reference_shuffles else torch.from_numpy(permutation(len(targets), seed, "sgd probe", epoch))
        for rows in order.to(features.device).split(recipe.batch):
            own = features[rows]
            errors = torch.softmax(own @ weights.T, dim=1).scatter_add_(1, targets[rows, None], own.new_full((len(rows), 1), -1.0))
            velocity.mul_(MOMENTUM).add_(errors.T @ own / len(rows)).add_(weights, alpha=recipe.weight_decay)
            weights -= lr * velocity
        standing.got_on()
        if reference and (epoch + 1) % recipe.judged_every == 0 and (reached := accuracy(weights)) > best:
            best, best_weights = reached, weights.clone()
    return best_weights if reference else weights
