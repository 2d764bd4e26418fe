"""Linear probe: multinomial logistic regression on frozen features by L-BFGS (methods 7.3, the OpenAI protocol), on whatever device they lie."""

import hashlib

import torch

from protoclip_scale import standing

STEPS_PER_DECADE = 8
DECADES = 6
FIRST_STRIDE = 2 * STEPS_PER_DECADE
SWEEP = {"iterations": 100, "tolerance": 1e-4}
TILE_SCORES = 1 << 24
PUBLISHED_C = 0.316


def fit_logistic(features: torch.Tensor, targets: torch.Tensor, num_classes: int, c: float, start: torch.Tensor | None = None, iterations: int = 1000, tolerance: float = 1e-6) -> torch.Tensor:
    """[num_classes, D+1] float64 (weights, then the intercept) that minimise sum of cross-entropies + ||weights||^2 / (2 c).

    This is scikit-learn's LogisticRegression(C=c) with its default L2 penalty; the intercept is free, and sums to 0. The objective is convex, so
    ``start`` changes the time taken, never the answer. ``features`` [n, D] float64, ``targets`` [n] int64. L-BFGS works in the principal axes
    of the features, each scaled by the curvature expected along it; without that, features of few strong directions take it thousands
    of steps. Cost: one D x D eigendecomposition, then about 100 passes over the features of 4 n D num_classes operations; memory of a copy of the features
    and a few tiles of 2**24 scores.
    """
    penalty = 1 / (c * len(features))
    mean = features.mean(0)
    variances, basis = torch.linalg.eigh((features - mean).T @ (features - mean) / len(features))
    units = (variances.clamp(min=0) / num_classes + penalty).rsqrt()
    intercept_unit = num_classes**0.5
    design = torch.cat([(features - mean) @ (basis * units), features.new_full((len(features), 1), intercept_unit)], dim=1)
    scaled = design.new_zeros(num_classes, design.shape[1])
    if start is not None:
        scaled[:, :-1] = start[:, :-1] @ basis / units
        scaled[:, -1] = (start[:, -1] + start[:, :-1] @ mean) / intercept_unit
    scaled.requires_grad_(True)
    tile = max(1, TILE_SCORES // num_classes)
    optimizer = torch.optim.LBFGS(
        [scaled], max_iter=iterations, max_eval=2 * iterations, history_size=20, tolerance_grad=tolerance, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        """The mean loss, and its gradient in closed form: autograd would keep all n x num_classes scores."""
        current = scaled.detach()
        loss, gradient = current.new_zeros(()), torch.zeros_like(current)
        for rows, own in zip(design.split(tile), targets.split(tile), strict=True):
            scores = torch.log_softmax(rows @ current.T, dim=1)
            loss -= scores.gather(1, own[:, None]).sum()
            errors = scores.exp_().scatter_add_(1, own[:, None], scores.new_full((len(own), 1), -1.0))
            gradient += errors.T @ rows
        shrunk = current[:, :-1] * units
        scaled.grad = gradient / len(design)
        scaled.grad[:, :-1] += shrunk * units * penalty
        standing.got_on()
        return loss / len(design) + shrunk.square().sum() * penalty / 2

    with torch.enable_grad():
        optimizer.step(objective)
    weights = (scaled.detach()[:, :-1] * units) @ basis.T
    intercept = scaled.detach()[:, -1] * intercept_unit - weights @ mean
    return torch.cat([weights, (intercept - intercept.mean())[:, None]], dim=1)


def logits(weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """[n, num_classes] of ``features`` [n, D]."""
    return features @ weights[:, :-1].T + weights[:, -1]


def predict(weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """[n] int64, the class of each row of ``features`` [n, D]."""
    tile = max(1, TILE_SCORES // len(weights))
    return torch.cat([logits(weights, rows).argmax(1) for rows in features.split(tile)])


def held_out_rows(num_rows: int) -> torch.Tensor:
    """[n] bool: a third of the rows, by a hash of the row's number, so that it is the same third everywhere."""
    return torch.tensor([hashlib.blake2b(str(row).encode(), digest_size=8).digest()[0] % 3 == 0 for row in range(num_rows)])


def choose_c(features: torch.Tensor, targets: torch.Tensor, num_classes: int) -> float:
    """The C between 1e-6 and 1e6 that is most often right on the held-out third after a fit to the rest.

    Searched as in the CLIP paper (appendix A.3): 1e-6, 1e-4, ..., 1e6, then the interval around the peak is halved until there are 8
    steps per decade (15 rough fits in place of 97, each started from its neighbour's weights). Of equal values
    the smallest, the most regular, wins.
    """
    held_out = held_out_rows(len(features)).to(features.device)
    fitted: dict[int, tuple[int, torch.Tensor]] = {}

    def correct(step: int) -> int:
        if step not in fitted:
            neighbour = min(fitted, key=lambda other: abs(other - step), default=None)
            start = None if neighbour is None else fitted[neighbour][1]
            weights = fit_logistic(features[~held_out], targets[~held_out], num_classes, 10 ** (step / STEPS_PER_DECADE), start, **SWEEP)
            fitted[step] = int((predict(weights, features[held_out]) == targets[held_out]).sum()), weights
        return fitted[step][0]

    limit = DECADES * STEPS_PER_DECADE
    stride = FIRST_STRIDE
    candidates = list(range(-limit, limit + 1, stride))
    while True:
        best = min(candidates, key=lambda step: (-correct(step), step))
        if stride == 1:
            return 10 ** (best / STEPS_PER_DECADE)
        stride //= 2
        candidates = [step for step in (best - stride, best, best + stride) if -limit <= step <= limit]


def _standards(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [D] of each column; a constant one has deviation 1."""
    deviation = features.std(0, correction=0)
    return features.mean(0), torch.where(deviation > 1e-12, deviation, torch.ones_like(deviation))


class LinearProbe:
    """Logistic regression on features standardised by the training rows' mean and deviation, C chosen by ``choose_c``, refitted to all rows.

    ``features`` [n, D] any float, ``targets`` [n] int64 in 0..num_classes-1. Works in float64 on the features' device.
    ``variant`` reference is ProtoCLIP's other probe, scikit-learn's, with its deviations: features as they are, and C = 0.316 whatever ``--C`` says. It stops after
    1,000 iterations; ours goes on to the optimum.
    """

    def __init__(self, features: torch.Tensor, targets: torch.Tensor, num_classes: int, variant: str = "paper"):
        features = features.double()
        self.mean, self.deviation = _standards(features) if variant == "paper" else (torch.zeros_like(features[0]), torch.ones_like(features[0]))
        standardised = self._standardise(features)
        self.c = choose_c(standardised, targets, num_classes) if variant == "paper" else PUBLISHED_C
        self.weights = fit_logistic(standardised, targets, num_classes, self.c)

    def _standardise(self, features: torch.Tensor) -> torch.Tensor:
        return (features.double() - self.mean) / self.deviation

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """[n] int64 classes of ``features`` [n, D]."""
        return predict(self.weights, self._standardise(features))
