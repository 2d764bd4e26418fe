"""A flat dictionary of evaluation figures as rows per held-out set, and as one line per set.

Keys read: ``SET/zero_shot/COLUMN/top1|class_mean|roc_auc|constant|classes|n``, ``SET/retrieval/image_to_text|text_to_image/R@k``,
``SET/retrieval/mean_recall|chance_R@10|n``, ``SET/probe.../COLUMN/top1``, ``SET/few_shot/COLUMN/{S}shot/top1|spread``, ``SET/knn/COLUMN/top1|k``, ``SET/modality_gap``,
``SET/image_effective_rank``, ``SET/text_effective_rank``, ``SET/kmeans/COLUMN/ami`` and ``SET/clusters/COLUMN/PROTOTYPES/ami``; SET may hold a slash (gallery/set). ``zero_shot_tokens``,
``retrieval_tokens``, ``few_shot_tokens`` and ``knn_tokens`` are the same by tokens. Figures of other names are left to metrics.jsonl.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from protoclip_scale.report.plain import DASH, as_number, count, number, percent

DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
_KEY = re.compile(r"(?P<set>.+?)/(?P<measure>(?:zero_shot|retrieval|few_shot|knn)(?:_tokens)?|probe\w*|kmeans|modality_gap|(?:image|text)_effective_rank|clusters)(?:/(?P<rest>.+))?")

_SHOTS = re.compile(r"few_shot(|_tokens)/([^/]+)/(\d+)shot/top1")
_WAYS = {"": "", "_tokens": ", by tokens"}  # how images and texts are compared, in keys and in words


class Row(NamedTuple):
    """One line of a set's table; the cells are text."""

    label: str
    model: str
    untrained: str
    reference: str


def by_set(figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{set: {'zero_shot/coarse/top1': value}}, in the order in which the sets appear."""
    sets: dict[str, dict[str, Any]] = {}
    for key, value in figures.items():
        if found := _KEY.fullmatch(str(key)):
            rest = "/".join(part for part in (found["measure"], found["rest"]) if part)
            sets.setdefault(found["set"], {})[rest] = value
    return sets


def _columns(figures: Mapping[str, Any], measure: str) -> list[str]:
    """Class columns of a measure: 'zero_shot/coarse/top1' -> coarse."""
    return list(dict.fromkeys(key.split("/")[1] for key in figures if key.startswith(f"{measure}/") and key.count("/") == 2))


def rows_of_set(figures: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[Row]:
    """The table of one set: every figure beside the untrained model's and beside the best constant answer or chance.

    The reference of a class-mean accuracy is one over the number of classes: what any constant answer gets.
    """
    rows = []

    def add(label: str, key: str, reference: str = DASH, write=percent) -> None:
        if key in figures:
            rows.append(Row(label, write(figures[key]), write(baseline.get(key)), reference))

    for way, words in _WAYS.items():
        for column in _columns(figures, f"zero_shot{way}"):
            prefix = f"zero_shot{way}/{column}"
            classes, num_rows = as_number(figures.get(f"{prefix}/classes")), figures.get(f"{prefix}/n")
            size = ", ".join(text for text in (f"{count(classes)} classes" if classes else "", f"{count(num_rows)} images" if num_rows else "") if text)
            add(f"zero-shot {column}, top 1{words}" + (f" ({size})" if size else ""), f"{prefix}/top1", percent(figures.get(f"{prefix}/constant")))
            add(f"zero-shot {column}, class mean{words}", f"{prefix}/class_mean", percent(1 / classes if classes else None))
            add(f"zero-shot {column}, ROC-AUC{words}", f"{prefix}/roc_auc", percent(0.5))
    for way, words in _WAYS.items():
        prefix = f"retrieval{way}"
        size = f" (n {count(figures[f'{prefix}/n'])})" if f"{prefix}/n" in figures else ""
        for direction, title in DIRECTIONS.items():
            add(f"{title}, R@10{words}{size}", f"{prefix}/{direction}/R@10", percent(figures.get(f"{prefix}/chance_R@10")))
        add(f"mean recall, R@1/5/10{words}", f"{prefix}/mean_recall", percent(figures.get(f"{prefix}/chance_mean_recall")))
    for measure in dict.fromkeys(key.split("/")[0] for key in figures if key.startswith("probe")):
        protocol = measure.removeprefix("probe").replace("_", " ").strip()
        for column in _columns(figures, measure):
            constant = figures.get(f"{measure}/{column}/constant", figures.get(f"zero_shot/{column}/constant"))
            add(f"linear probe {column}, top 1" + (f" [{protocol}]" if protocol else ""), f"{measure}/{column}/top1", percent(constant))
    for way, words in _WAYS.items():
        for column in _columns(figures, f"knn{way}"):
            constant = percent(figures.get(f"zero_shot{way}/{column}/constant"))
            add(f"{count(figures.get(f'knn{way}/{column}/k'))} nearest neighbours {column}, top 1{words}", f"knn{way}/{column}/top1", constant)
    for key, (way, column, shots) in ((key, found.groups()) for key in figures if (found := _SHOTS.fullmatch(key))):
        spread = percent(figures.get(key.removesuffix("top1") + "spread"))
        reference = f"zero-shot {percent(figures.get(f'zero_shot{way}/{column}/top1'))}"
        rows.append(Row(f"few-shot {column}, {shots} a class{_WAYS[way]}", f"{percent(figures[key])} ± {spread}", percent(baseline.get(key)), reference))
    add("modality gap", "modality_gap", write=lambda value: number(value, 3))
    for modality in ("image", "text"):
        add(f"{modality} effective rank", f"{modality}_effective_rank", write=lambda value: "-" if value is None else f"{value:.1f}")
    for column in _columns(figures, "kmeans"):
        add(f"k-means of images and {column}, AMI", f"kmeans/{column}/ami", "0", write=lambda value: number(value, 3))
    agreement = [key.split("/") for key in figures if key.startswith("clusters/") and key.endswith("/ami")]
    own = [key for key in agreement if "_from_" not in key[2]]
    for _, column, prototypes, _ in own or agreement:  # the teacher's clusters where there are no others
        add(f"{prototypes.replace('_', ' ')} clusters and {column}, AMI", f"clusters/{column}/{prototypes}/ami", "0", write=lambda value: number(value, 3))
    return rows


def evaluation_rows(figures: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, list[Row]]:
    """{set: rows}; sets of which nothing can be shown are left out."""
    untrained = by_set(baseline)
    tables = {name: rows_of_set(found, untrained.get(name, {})) for name, found in by_set(figures).items()}
    return {name: rows for name, rows in tables.items() if rows}


def evaluation_lines(figures: Mapping[str, Any]) -> list[str]:
    """One line per set: 'eval_seen: zero-shot coarse, top 1 31.2% (vs 12.0%) | ...', against the best constant answer or chance."""
    lines = []
    for name, rows in evaluation_rows(figures, {}).items():
        parts = [f"{re.sub(r' [(].*[)]$', '', row.label)} {row.model}" + (f" (vs {row.reference})" if row.reference != DASH else "") for row in rows]
        lines.append(f"{name}: " + " | ".join(parts))
    return lines


def figure(key: str, value: Any) -> str:
    """A figure as the tables write it: shares in percent, the modality gap as a number."""
    return number(value, 3) if key.endswith("modality_gap") or (as_number(value) or 0) > 1 else percent(value)
