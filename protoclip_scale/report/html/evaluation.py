"""The figures of evaluations: charts over checkpoints beside chance and the untrained model, and tables of the newest one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from protoclip_scale.report import plain
from protoclip_scale.report.evaluation_table import Row, by_set, evaluation_rows
from protoclip_scale.report.evaluation_table import figure as written
from protoclip_scale.report.html.chart import Reference, percent_tick, plain_tick
from protoclip_scale.report.html.curves import Figure, figure
from protoclip_scale.report.html.timeline import Timeline


@dataclass(frozen=True)
class Measure:
    """A chart of every set that has such figures. ``keys``: one group, the curve's name; ``chance``: key of the best constant answer or chance, with the group."""

    title: str
    keys: re.Pattern
    chance: str = ""
    is_share: bool = True


_WAYS = (("", ""), ("_tokens", ", by tokens"))  # how images and texts are compared, in keys and in words
MEASURES = (
    *(
        measure
        for way, words in _WAYS
        for measure in (
            Measure(f"Zero-shot accuracy, top 1{words}", re.compile(f"zero_shot{way}/([^/]+)/top1"), f"zero_shot{way}/{{}}/constant"),
            Measure(f"Zero-shot accuracy, class mean{words}", re.compile(f"zero_shot{way}/([^/]+)/class_mean")),
            Measure(f"Retrieval R@10{words}", re.compile(f"retrieval{way}/([^/]+)/R@10"), f"retrieval{way}/chance_R@10"),
            Measure(f"Retrieval, mean of R@1, 5 and 10{words}", re.compile(f"retrieval{way}/(mean_recall)"), f"retrieval{way}/chance_mean_recall"),
            Measure(f"Linear probe, top 1{words}", re.compile(f"probe{way}/([^/]+)/top1"), f"probe{way}/{{}}/constant"),
            Measure(f"k-NN, top 1{words}", re.compile(f"knn{way}/([^/]+)/top1"), f"knn{way}/{{}}/constant"),
            Measure(f"Few-shot probe, top 1{words}", re.compile(rf"few_shot{way}/([^/]+/\d+shot)/top1")),
        )
    ),
    Measure("Modality gap", re.compile(r"(modality_gap)"), is_share=False),
    Measure("Effective rank", re.compile(r"((?:\w+_)?effective_rank)"), is_share=False),
)


@dataclass(frozen=True)
class EvaluatedSet:
    """Of one held-out set: its charts, and its table of the newest evaluation."""

    name: str
    figures: list[Figure]
    rows: list[Row]


@dataclass(frozen=True)
class Evaluated:
    """``step``: of the newest evaluation; ``count``: how many there are; ``everything``: its figures as (key, value)."""

    sets: list[EvaluatedSet]
    step: int
    samples: int
    count: int
    weights: str
    everything: list[tuple[str, str]]
    expected: list[tuple[str, str, str, str]]


def evaluated(evaluations: list[dict[str, Any]], baseline: Mapping[str, Any], expected: list[Mapping[str, Any]], timeline: Timeline) -> Evaluated | None:
    """None before the first evaluation, unless the untrained model's is there."""
    if not evaluations and not baseline:
        return None
    newest = evaluations[-1] if evaluations else {"step": 0, "samples": 0, **baseline}
    tables = evaluation_rows(newest, baseline)
    sets = [EvaluatedSet(name, _figures(name, evaluations, baseline, timeline), tables.get(name, [])) for name in by_set(newest)]
    everything = [(key, _exactly(value)) for key, value in sorted(newest.items()) if "/" in key and plain.as_number(value) is not None]
    return Evaluated([each for each in sets if each.figures or each.rows], newest["step"], newest["samples"], len(evaluations), str(newest.get("weights", "")), everything, _expected(expected, newest))


def _exactly(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _expected(expected: list[Mapping[str, Any]], reached: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(figure, expected, reached, protocol and source)."""
    rows = []
    for item in expected:
        metric = str(item.get("metric"))
        origin = "; ".join(str(item[name]) for name in ("protocol", "source") if item.get(name))
        rows.append((metric, written(metric, item.get("value")), written(metric, reached.get(metric)), origin))
    return rows


def _figures(name: str, evaluations: list[dict[str, Any]], baseline: Mapping[str, Any], timeline: Timeline) -> list[Figure]:
    """One for each of ``MEASURES`` that the set has; the untrained model is the point at 0 samples."""
    untrained = {"samples": 0, **baseline} if baseline else None
    points = [*([untrained] if untrained else []), *evaluations]
    x = {
        "samples": np.array([float(line["samples"]) for line in points]),
        "hours": np.array([0.0 if line is untrained else timeline.hours_of(line) for line in points]),
    }
    keys = {key.removeprefix(f"{name}/"): None for line in points for key in line if key.startswith(f"{name}/")}
    found = []
    for measure in MEASURES:
        curves, references = {}, {}
        for key in keys:
            if match := measure.keys.fullmatch(key):
                label = match[1].replace("_", " ").replace("/", ", ")
                curves[label] = x, np.array([_number(line.get(f"{name}/{key}")) for line in points])
                chance = next((line[place] for line in reversed(points) if measure.chance and (place := f"{name}/{measure.chance.format(match[1])}") in line), None)
                if plain.as_number(chance) is not None:
                    references[chance] = "constant answer or chance"
        tick, write = (percent_tick, plain.percent) if measure.is_share else (plain_tick, lambda value: plain.number(value, 3))
        latest = ", ".join(write(y[np.isfinite(y)][-1]) for _, y in curves.values() if np.isfinite(y).any())
        levels = [Reference(label, float(value), "chance") for value, label in references.items()]
        note = "first point: the untrained model" if untrained else ""
        found.append(figure(measure.title, note, latest, curves, tick, timeline, levels, from_zero=measure.is_share, dots=True))
    return [each for each in found if each]


def _number(value: Any) -> float:
    found = plain.as_number(value)
    return float("nan") if found is None else found
