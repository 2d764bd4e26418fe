"""From finished runs to the table: paired differences, ratios of processor time, shares of the phases."""

import statistics
from collections.abc import Iterable

from overhead_parts.runs import Result

BASELINE, PAPER = "clip", "protoclip"


def paired(results: dict[tuple[str, int], Result], policy: str, other: str) -> dict[str, float] | None:
    """Mean and spread (standard deviation, None for one seed) over common seeds of ret4 minus the other policy's; None without a common seed."""
    seeds = sorted(seed for name, seed in results if name == policy and (other, seed) in results)
    if not seeds:
        return None
    differences = [results[policy, seed].ret4 - results[other, seed].ret4 for seed in seeds]
    return {"mean": statistics.mean(differences), "spread": statistics.stdev(differences) if len(seeds) > 1 else None, "seeds": len(seeds)}


def summary(results: dict[tuple[str, int], Result], policies: Iterable[str]) -> dict[str, dict]:
    """For each policy with a finished run: ret4, its differences, the cost over CLIP's at the same seeds, and each phase as a share of CLIP's time."""
    figures = {}
    for policy in policies:
        runs = [result for (name, _), result in sorted(results.items()) if name == policy]
        if not runs:
            continue
        pairs = [(run, results[BASELINE, run.seed]) for run in runs if (BASELINE, run.seed) in results]
        phases = sorted({phase for run in runs for phase in run.phases})
        shares = {phase: statistics.mean(run.phases.get(phase, 0.0) / base.seconds for run, base in pairs) for phase in phases} if pairs else None
        figures[policy] = {
            "seeds": [run.seed for run in runs],
            "samples": runs[0].samples,
            "ret4": statistics.mean(run.ret4 for run in runs),
            "recalls": {name: statistics.mean(run.recalls[name] for run in runs) for name in runs[0].recalls},
            "minus_clip": paired(results, policy, BASELINE),
            "minus_protoclip": paired(results, policy, PAPER),
            "cpu_seconds": statistics.mean(run.seconds for run in runs),
            "cost_over_clip": sum(shares.values()) if shares else None,
            "share_of_clip": shares,
            "peak_mb": max(run.peak_mb for run in runs),
            "commits": sorted({run.commit or "unknown" for run in runs}),
        }
    return figures
