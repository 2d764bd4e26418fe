"""What is learnt from labelled rows and judged on held-out ones: linear probe, few-shot probes, nearest neighbours."""

from dataclasses import dataclass

import torch

from protoclip_scale.evaluation.few_shot import few_shot_figures
from protoclip_scale.evaluation.neighbours import neighbour_hits
from protoclip_scale.evaluation.probe import LinearProbe, predict
from protoclip_scale.evaluation.sgd_probe import fit_sgd
from protoclip_scale.evaluation.zero_shot import accuracy_figures, class_names, constant_accuracy, targets_of
from protoclip_scale.recipe.schema import Evaluation
from protoclip_scale.recipe.schema.measures import Probe


@dataclass(frozen=True, eq=False)
class Rows:
    """Labelled images: unit embeddings [n, D], what the probe sees of them [n, F], and class names by column ("" for none)."""

    embeddings: torch.Tensor
    features: torch.Tensor
    classes: dict[str, list[str]]

    def of(self, column: str, names: list[str]) -> "Known":
        """Those whose class in ``column`` is one of ``names``."""
        targets = targets_of(self.classes[column], names)
        known = targets >= 0
        return Known(self.embeddings[known], self.features[known], targets[known])


@dataclass(frozen=True, eq=False)
class Known:
    embeddings: torch.Tensor
    features: torch.Tensor
    targets: torch.Tensor


def probe_kind(probe: Probe) -> str:
    """The part of a figure's key that names the protocol: ``probe`` is L-BFGS with its C chosen, all others say what they are."""
    words = ["probe", *([probe.method] if probe.method != "lbfgs" else []), *(["reference"] if probe.variant == "reference" else [])]
    return "_".join(words)


def learned_figures(settings: Evaluation, train: Rows, sets: dict[str, Rows], device: torch.device, of: str = "") -> dict[str, dict[str, float]]:
    """Figures of each set that shares a class column with ``train``, on its rows whose class occurs there; columns with one class are left out.

    ``PROBE/COLUMN/{top1,class_mean,constant,n}`` (see ``probe_kind``); with ``few_shot`` ``few_shot/COLUMN/{S}shot/{top1,spread}`` and ``few_shot/COLUMN/n``; with
    ``knn`` ``knn/COLUMN/{top1,class_mean,k,n}``. ``of``: what is put behind these names where rows are no embeddings. For rank 0.
    """
    figures: dict[str, dict[str, float]] = {name: {} for name in sets}
    probe = probe_kind(settings.probe) + (of if settings.probe.features == "embedding" else "")
    for column, values in train.classes.items():
        names = class_names(values)
        known = {name: rows.of(column, names) for name, rows in sets.items() if column in rows.classes}
        known = {name: rows for name, rows in known.items() if len(rows.targets)}
        if len(names) < 2 or not known:
            continue
        learnt = train.of(column, names)
        for name, hits in _probe_hits(settings.probe, learnt, known, len(names), device).items():
            targets = known[name].targets
            found = {**accuracy_figures(hits, targets), "constant": constant_accuracy(targets), "n": len(targets)}
            figures[name] |= {f"{probe}/{column}/{key}": value for key, value in found.items()}
        if settings.few_shot:
            tests = {name: (rows.embeddings, rows.targets) for name, rows in known.items()}
            for name, found in few_shot_figures(learnt.embeddings, learnt.targets, tests, len(names), settings.few_shot, device).items():
                figures[name] |= {f"few_shot{of}/{column}/{key}": value for key, value in {**found, "n": len(tests[name][1])}.items()}
        if settings.knn:
            train_rows, train_targets = learnt.embeddings.to(device), learnt.targets.to(device)
            for name, rows in known.items():
                hits = neighbour_hits(train_rows, train_targets, rows.embeddings, rows.targets, settings.knn.k, settings.knn.temperature)
                found = {**accuracy_figures(hits, rows.targets), "k": min(settings.knn.k, len(train_rows)), "n": len(hits)}
                figures[name] |= {f"knn{of}/{column}/{key}": value for key, value in found.items()}
    return figures


def _probe_hits(probe: Probe, train: Known, tests: dict[str, Known], num_classes: int, device: torch.device) -> dict[str, torch.Tensor]:
    """[n] bool of each set: whether the probe is right."""
    features, targets = train.features.to(device), train.targets.to(device)
    if probe.method == "lbfgs":
        fitted = LinearProbe(features, targets, num_classes, probe.variant)
        return {name: fitted.predict(rows.features.to(device)).cpu() == rows.targets for name, rows in tests.items()}
    found, weights = {}, None
    for name, rows in tests.items():
        seen = rows.features.to(device).float()

        def hits(candidate: torch.Tensor, seen: torch.Tensor = seen, rows: Known = rows) -> torch.Tensor:
            return predict(candidate, seen).cpu() == rows.targets

        if weights is None or probe.variant == "reference":  # which looks at the test rows, so that each set has weights of its own
            weights = fit_sgd(features, targets, num_classes, probe.method, probe.variant, lambda candidate, hits=hits: hits(candidate).double().mean().item())
        found[name] = hits(weights)
    return found
