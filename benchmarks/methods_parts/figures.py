"""From runs to the table: means and spreads over seeds, and differences to CLIP paired by seed with a t-test."""

import math
import statistics

from scipy.stats import ttest_rel

from methods_parts.recipes import BASELINE, METHODS
from methods_parts.runs import Result

QUALITIES = ("zero_shot", "mean_recall", "probe")
SIGNIFICANT = 0.05


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation, None for a single value."""
    return {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else None, "seeds": len(values)}


def paired(pairs: list[tuple[float, float]]) -> dict | None:
    """Of (a method's, the baseline's) figures at the same seeds: the difference, its spread, and the two-sided p of a paired t-test. None without a pair; p None
    with one pair, or where all differences are equal."""
    if not pairs:
        return None
    differences = [own - other for own, other in pairs]
    p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue) if len(pairs) > 1 and len(set(differences)) > 1 else math.nan
    return {**spread(differences), "p": None if math.isnan(p) else p, "significant": p < SIGNIFICANT}


def summary(results: dict[tuple[str, int], Result]) -> dict[str, dict]:
    """For each method with a finished run."""
    figures = {}
    for method in METHODS:
        runs = {seed: result for (name, seed), result in sorted(results.items()) if name == method}
        if not runs:
            continue
        line: dict = {"seeds": list(runs), "samples": sorted({run.samples for run in runs.values()}), "tokens": any(run.tokens for run in runs.values())}
        for quality in QUALITIES:
            own = {seed: value for seed, run in runs.items() if (value := getattr(run, quality)) is not None}
            base = {seed: getattr(results[BASELINE, seed], quality) for seed in own if (BASELINE, seed) in results}
            line[quality] = spread(list(own.values())) if own else None
            line[f"{quality}_minus_{BASELINE}"] = paired([(own[seed], value) for seed, value in base.items() if value is not None]) if method != BASELINE else None
        recalls = [run.recalls for run in runs.values() if run.recalls]
        line["recalls"] = {name: statistics.mean(each[name] for each in recalls) for name in recalls[0]} if recalls else None
        timed = [run for run in runs.values() if run.seconds]
        line["samples_per_second"] = statistics.mean(run.samples / run.seconds for run in timed) if timed else None
        line["hours"] = statistics.mean(run.seconds for run in timed) / 3600 if timed else None
        line["peak_gb"] = max((run.peak_gb for run in runs.values() if run.peak_gb is not None), default=None)
        figures[method] = line
    return figures
