"""Curves of compared runs as pictures; needs matplotlib (the extra `plot`)."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from protoclip_scale.errors import UserError

AXES = {"samples": "samples", "hours": "hours of work"}
LOSS = "loss"
COLUMNS = 3
PANEL = (4.6, 3.2)  # inches
DOTS = 140  # an inch
FEW_SHOT = re.compile(r"(?P<place>.+)/few_shot(?P<way>|_tokens)/(?P<column>[^/]+)/(?P<shots>\d+)shot/top1")


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("--out draws with matplotlib, which is not installed: pip install 'protoclip-scale[plot]', or add --no-pictures") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_all(table: pd.DataFrame, keys: Sequence[str], folder: Path) -> list[Path]:
    """``curves_samples.png``, ``curves_hours.png`` and, where there are few-shot probes, ``few_shot.png``."""
    pyplot = _pyplot()
    drawn = [_curves(pyplot, table, keys, axis, folder / f"curves_{axis}.png") for axis in AXES]
    return drawn + ([_few_shot(pyplot, table, folder / "few_shot.png")] if table["key"].str.fullmatch(FEW_SHOT.pattern).any() else [])


def _panels(pyplot, titles: Sequence[str]):
    """A figure with a panel for each title."""
    across = min(COLUMNS, len(titles))
    down = math.ceil(len(titles) / across)
    figure, axes = pyplot.subplots(down, across, figsize=(PANEL[0] * across, PANEL[1] * down), squeeze=False, layout="constrained")
    for place, title in zip(axes.flat, titles, strict=False):
        place.set_title(title, fontsize=9)
        place.grid(alpha=0.3)
    for place in axes.flat[len(titles) :]:
        place.remove()
    return figure, axes.flat


def _save(pyplot, figure, place, path: Path) -> Path:
    handles, labels = place.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=DOTS)
    pyplot.close(figure)
    return path


def _curves(pyplot, table: pd.DataFrame, keys: Sequence[str], axis: str, path: Path) -> Path:
    """The loss and each figure: a line for each group, the mean of its seeds where all have a value, and a band of one standard deviation."""
    evaluated = table["source"] != "train"
    panels = {LOSS: table[~evaluated & (table["key"] == LOSS)]} | {key: table[evaluated & (table["key"] == key)] for key in keys}
    figure, places = _panels(pyplot, list(panels))
    for place, (key, rows) in zip(places, panels.items(), strict=False):
        for number, group in enumerate(dict.fromkeys(table["group"])):
            own = rows[rows["group"] == group]
            seeds = own["run"].nunique()
            points = own.groupby("samples").agg(x=(axis, "mean"), mean=("value", "mean"), spread=("value", "std"), runs=("run", "nunique"))
            points = points[points["runs"] == seeds]
            marker = "o" if key != LOSS and len(points) < 50 else None
            place.plot(points["x"], points["mean"], color=f"C{number}", marker=marker, markersize=3, linewidth=1.2, label=group + (f" ({seeds} seeds)" if seeds > 1 else ""))
            if seeds > 1:
                place.fill_between(points["x"], points["mean"] - points["spread"], points["mean"] + points["spread"], color=f"C{number}", alpha=0.2, linewidth=0)
        place.set_xlabel(AXES[axis], fontsize=8)
        place.tick_params(labelsize=8)
    return _save(pyplot, figure, places[0], path)


def _few_shot(pyplot, table: pd.DataFrame, path: Path) -> Path:
    """Each run's last few-shot accuracies with their spread over draws, against its zero-shot accuracy (dashed)."""
    evaluated = table[table["source"] != "train"].sort_values("step", kind="stable")
    last = evaluated.groupby(["run", "key"]).tail(1).set_index(["run", "key"])["value"]
    found: dict[tuple[str, str, str], dict[str, list[tuple[int, str]]]] = {}
    for run, key in last.index:
        if match := FEW_SHOT.fullmatch(key):
            found.setdefault((match["place"], match["way"], match["column"]), {}).setdefault(run, []).append((int(match["shots"]), key))
    figure, places = _panels(pyplot, [f"{place}: {column}{way.replace('_', ' ')}" for place, way, column in found])
    for panel, ((place, way, column), runs) in zip(places, found.items(), strict=False):
        for number, (run, points) in enumerate(runs.items()):
            points.sort()
            values, spreads = ([last[run, key.removesuffix("top1") + name] for _, key in points] for name in ("top1", "spread"))
            panel.errorbar([shots for shots, _ in points], values, yerr=spreads, color=f"C{number}", marker="o", markersize=3, capsize=2, linewidth=1.2, label=run)
            if (run, zero_shot := f"{place}/zero_shot{way}/{column}/top1") in last.index:
                panel.axhline(last[run, zero_shot], color=f"C{number}", linestyle="--", linewidth=1, label=f"{run}, zero-shot")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("labelled images of each class", fontsize=8)
        panel.set_ylabel("accuracy", fontsize=8)
    return _save(pyplot, figure, places[0], path)
