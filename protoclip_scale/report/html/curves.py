"""The figures of training: which charts there are, over samples and over hours of work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from protoclip_scale.report import plain
from protoclip_scale.report.html.chart import Axis, Drawing, Reference, Series, draw, percent_tick, plain_tick
from protoclip_scale.report.html.run_files import Table
from protoclip_scale.report.html.timeline import Timeline

SAMPLES, HOURS = Axis("samples", plain_tick), Axis("hours of work", plain_tick)
AXES = {"samples": SAMPLES, "hours": HOURS}


@dataclass(frozen=True)
class Kind:
    """A chart of training: title, unit or what it is, the columns it shows ("PREFIX/*" for all under a prefix), how they are written, whether y starts at 0."""

    title: str
    note: str
    columns: tuple[str, ...]
    write: Callable[[float], str] = plain.number
    tick: Callable[[float, float], str] = plain_tick
    from_zero: bool = False


KINDS = (
    Kind("Learning rate", "of parameters without a rate of their own", ("lr",), plain.learning_rate, from_zero=True),
    Kind("Logit scales", "factor of the cosines, as used in the loss", ("scale/*",)),
    Kind("Gradient norm", "before clipping", ("gradient_norm",), from_zero=True),
    Kind("Throughput", "samples per second, all ranks", ("samples_per_second",), lambda value: f"{plain.number(value, 3)}/s", from_zero=True),
    Kind("MFU", "model FLOPs as a share of the devices' peak", ("mfu",), plain.percent, percent_tick, True),
    Kind("Waiting for data", "share of the time of steps", ("data_wait_share",), plain.percent, percent_tick, True),
    Kind("Memory", "resident memory of rank 0, GB", ("memory_gb",), lambda value: f"{plain.number(value, 3)} GB", from_zero=True),
)


@dataclass(frozen=True)
class Figure:
    """A chart on the page: one drawing for each axis that it can be drawn over."""

    title: str
    note: str
    latest: str
    drawings: dict[str, Drawing]


def figure(
    title: str,
    note: str,
    latest: str,
    points: dict[str, tuple[dict[str, np.ndarray], np.ndarray]],
    tick: Callable[[float, float], str],
    timeline: Timeline,
    references: Sequence[Reference] = (),
    from_zero: bool = False,
    dots: bool = False,
) -> Figure | None:
    """``points``: by name of a curve its x by axis and its y. None if there is nothing to draw."""
    marks = {"samples": [attempt.from_samples for attempt in timeline.restarts()], "hours": [attempt.before for attempt in timeline.restarts()]}
    drawings = {}
    for name, axis in AXES.items():
        series = [Series(label, x[name], y, dots) for label, (x, y) in points.items()]
        if drawing := draw(series, axis, tick, references, marks[name], from_zero):
            drawings[name] = drawing
    return Figure(title, note, latest, drawings) if drawings else None


def training_figures(train: Table, timeline: Timeline) -> list[Figure]:
    """The total loss, each objective's own, and those of ``KINDS`` that were logged."""
    if not train.length:
        return []
    x = {"samples": train["samples"], "hours": timeline.hours_at(train["attempt"], train["time"])}
    terms = sorted(name for name in train.columns if name.startswith(plain.LOSS))
    kinds = [Kind("Loss", "sum of the objectives, each times its weight" if len(terms) > 1 else f"of {terms[0].removeprefix(plain.LOSS)}" if terms else "", ("loss",), plain.loss)]
    if len(terms) > 1:
        kinds += [Kind(f"Loss of {name.removeprefix(plain.LOSS)}", "before its weight", (name,), plain.loss) for name in terms]
    found = []
    for kind in (*kinds, *KINDS):
        names = [name for pattern in kind.columns for name in _matching(train, pattern)]
        points = {_label(name): (x, train[name]) for name in names if np.isfinite(train[name]).any()}
        latest = ", ".join(kind.write(y[np.isfinite(y)][-1]) for _, y in points.values())
        found.append(figure(kind.title, kind.note, latest, points, kind.tick, timeline, from_zero=kind.from_zero))
    return [each for each in found if each]


def _matching(train: Table, pattern: str) -> list[str]:
    if not pattern.endswith("*"):
        return [pattern] if pattern in train else []
    return sorted(name for name in train.columns if name.startswith(pattern[:-1]))


def _label(name: str) -> str:
    return name.rsplit("/", 1)[-1].replace("_", " ")
