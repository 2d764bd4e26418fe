"""A line chart as SVG whose colours are the page's CSS variables, so that it follows light and dark; drawn at about its natural size on a phone and in a grid alike."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from protoclip_scale.report.html.reduce import Reduced, reduced

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 42
TICKS = 4  # intervals between gridlines, about
TIGHT = 0.7  # how much shorter than asked for an interval may be
SERIES_COLORS = 6  # in style.css


@dataclass(frozen=True)
class Series:
    """A named curve: x and y float64 [n]. ``dots``: few measured points, each of which is seen."""

    name: str
    x: np.ndarray
    y: np.ndarray
    dots: bool = False


@dataclass(frozen=True)
class Reference:
    """A level to compare with, drawn as a broken line; ``style``: chance or untrained."""

    name: str
    value: float
    style: str


@dataclass(frozen=True)
class Axis:
    """Of what x counts: ``label`` with its unit, and how a tick is written."""

    label: str
    write: Callable[[float, float], str]


@dataclass(frozen=True)
class Drawing:
    """All that the template writes; numbers are pixels of the view box."""

    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]
    curves: list[dict]
    levels: list[dict]
    marks: list[float]
    axis: str
    label: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM
    legend: list[tuple[str, str, str]] = field(default_factory=list)
    lines: int = 1


def plain_tick(value: float, step: float) -> str:
    """With as many decimals as the step asks for: 0.25; 1500 as 1.5k, 2000000 as 2M."""
    if value and (abs(value) < 1e-3 or step < 1e-4):
        return f"{value:.2g}".replace("e-0", "e-")
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and (step >= size / 100 or abs(value) >= 1e4):
            return f"{value / size:.{decimals(step / size)}f}{letter}"
    return f"{value:.{decimals(step)}f}"


def percent_tick(value: float, step: float) -> str:
    return f"{100 * value:.{decimals(100 * step)}f}%"


def decimals(step: float) -> int:
    """Of numbers that lie ``step`` apart, a multiple of 1, 2 or 5 of a power of ten."""
    return max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0


def ticks(low: float, high: float, intervals: int = TICKS) -> tuple[list[float], float]:
    """Multiples of 1, 2 or 5 of a power of ten from below ``low`` to above ``high``, and the step between them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / intervals
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * TIGHT)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [number * step for number in range(first, last + 1)], step


def draw(series: Sequence[Series], axis: Axis, write_y: Callable[[float, float], str], references: Sequence[Reference] = (), marks: Sequence[float] = (), from_zero: bool = False) -> Drawing | None:
    """None if no series has a point. ``marks``: x of vertical lines (restarts)."""
    curves = [(number, each, reduced(each.x, each.y)) for number, each in enumerate(series)]
    curves = [curve for curve in curves if len(curve[2].x)]
    if not curves:
        return None
    xs = [value for _, _, points in curves for value in (points.x.min(), points.x.max())]
    ys = [value for _, _, points in curves for value in (points.low.min(), points.high.max())] + [reference.value for reference in references]
    y_values, y_step = ticks(0.0 if from_zero else min(ys), max(ys))
    x_values, x_step = ticks(0.0, max(xs) or 1.0)
    x_end = max(xs) or 1.0  # the curve fills the width; the last tick may lie beyond
    x_of = _scale(0.0, x_end, LEFT, WIDTH - RIGHT)
    y_of = _scale(y_values[0], y_values[-1], HEIGHT - BOTTOM, TOP)
    return Drawing(
        y_ticks=[(y_of(value), write_y(value, y_step)) for value in y_values],
        x_ticks=[(x_of(value), axis.write(value, x_step)) for value in x_values if value <= x_end * (1 + 1e-9)],
        curves=[_curve(number, each, points, x_of, y_of) for number, each, points in curves],
        levels=[{"y": round(y_of(reference.value), 1), "style": reference.style} for reference in references],
        marks=[round(x_of(mark), 1) for mark in marks if 0 < mark <= x_end],
        axis=axis.label,
        label=_in_words(curves, axis, write_y, y_step),
        legend=[(each.name, f"c{number % SERIES_COLORS}", "line") for number, each, _ in curves]
        + [(f"{reference.name} {write_y(reference.value, y_step / 20)}", reference.style, "level") for reference in references],
        lines=max(points.lines for _, _, points in curves),
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    factor = (end - start) / ((high - low) or 1.0)
    return lambda value: start + (value - low) * factor


def _curve(number: int, series: Series, points: Reduced, x_of: Callable, y_of: Callable) -> dict:
    x = x_of(points.x)
    band = points.lines > 1
    edges = [*zip(x, y_of(points.high), strict=True), *reversed([*zip(x, y_of(points.low), strict=True)])] if band else []
    single = len(x) == 1
    return {
        "color": f"c{number % SERIES_COLORS}",
        "path": _path(zip(x, y_of(points.mean), strict=True)),
        "band": _path(edges) + "Z" if band else "",
        "dots": [(round(float(a), 1), round(float(b), 1)) for a, b in zip(x, y_of(points.mean), strict=True)] if series.dots or single else [],
    }


def _path(points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _in_words(curves: list[tuple[int, Series, Reduced]], axis: Axis, write_y: Callable, step: float) -> str:
    """What a reader who does not see the chart is told."""
    said = [f"{each.name}: first {write_y(points.mean[0], step / 10)}, last {write_y(points.mean[-1], step / 10)}" for _, each, points in curves]
    return f"Line chart over {axis.label}. " + "; ".join(said) + "."
