"""The figures of a clustering as one line of the console and the log."""

from collections.abc import Mapping
from typing import Any

from protoclip_scale.report.plain import number

FIGURES = (  # key with {} for what was clustered, label
    ("quality/{}/silhouette", "silhouette"),
    ("quality/{}/effective_rank", "effective rank"),
    ("quality/{}/self_similarity", "self-similarity"),
    ("kmeans/{}/imbalance", "imbalance"),
    ("kmeans/{}/empty", "empty"),
    ("target_entropy/{}", "target entropy/ln K"),
)


def clustering_line(figures: Mapping[str, Any]) -> str:
    """'clusters: image silhouette 0.28, effective rank 16.9, imbalance 1.28 | text ... | modality gap 1.12'; figures that are not there leave no gap, and no
    empty clusters are no news. All else is in metrics.jsonl."""
    names = dict.fromkeys(key.split("/")[1] for key in figures if key.startswith(("quality/", "kmeans/")) and key.count("/") == 2)
    parts = []
    for name in names:
        found = [(label, figures[key.format(name)]) for key, label in FIGURES if key.format(name) in figures]
        shown = [f"{label} {number(value, 3)}" for label, value in found if label != "empty" or value]
        parts += [f"{name.replace('_', ' ')} {', '.join(shown)}"] if shown else []
    if "quality/modality_gap" in figures:
        parts.append(f"modality gap {number(figures['quality/modality_gap'], 3)}")
    return f"clusters: {' | '.join(parts)}" if parts else ""
