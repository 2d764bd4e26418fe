"""Tables of compared runs: final figures with seeds grouped, and what each run needs to reach a baseline's score."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import pandas as pd

from protoclip_scale.errors import UserError
from protoclip_scale.report.compare.runs import ComparedRun

HEADLINES = ("*/zero_shot*/*/top1", "*/retrieval*/mean_recall", "*/probe*/*/top1", "*/knn*/*/top1", "*/few_shot*/*/top1")  # shares, the more the better
NEEDS = ("samples", "hours", "exaflops")


def groups_of(runs: Sequence[ComparedRun]) -> dict[str, str]:
    """The group of each run, by label: runs of one method are seeds of it. Named by the recipe, or by the first run where methods share a name."""
    first: dict[str, ComparedRun] = {}
    for run in runs:
        first.setdefault(run.method, run)
    names = [run.recipe.name for run in first.values()]
    titles = {method: run.recipe.name if names.count(run.recipe.name) == 1 else run.label for method, run in first.items()}
    return {run.label: titles[run.method] for run in runs}


def curves(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    """All figures of all runs: columns run, group, run_seed, plan_seed, source, step, samples, hours, exaflops, key, value."""
    groups, frames = groups_of(runs), []
    for run in runs:
        about = pd.DataFrame({"run": run.label, "group": groups[run.label], "run_seed": run.seeds[0], "plan_seed": run.seeds[1]}, index=run.figures.index)
        frame = pd.concat([about, run.figures], axis=1)
        frame.insert(frame.columns.get_loc("hours") + 1, "exaflops", frame["samples"] * run.flops / 1e18)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def chosen_keys(table: pd.DataFrame, patterns: Sequence[str]) -> list[str]:
    """Keys of evaluations that match one of the patterns, in the order of the patterns. UserError where none does."""
    keys = list(dict.fromkeys(table.loc[table["source"] != "train", "key"]))
    found = list(dict.fromkeys(key for pattern in patterns for key in keys if fnmatchcase(key, pattern)))
    if not found:
        some = ", ".join(keys[:5]) or "none: no run has been evaluated"
        raise UserError(f"--figures {' '.join(patterns)}: no evaluation has such a figure; there are {some}")
    return found


def final_table(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Figures of each run's last evaluation that has them: columns run, group, run_seed, plan_seed, key, step, samples, hours, exaflops, value."""
    evaluated = table[(table["source"] != "train") & table["key"].isin(keys)].sort_values("step", kind="stable")
    last = evaluated.groupby(["run", "key"], sort=False).tail(1)
    order = {key: number for number, key in enumerate(keys)}
    last = last.assign(order=last["key"].map(order)).sort_values(["order", "group", "run"], kind="stable")
    return last[["run", "group", "run_seed", "plan_seed", "key", "step", "samples", "hours", "exaflops", "value"]].reset_index(drop=True)


def seeds_table(final: pd.DataFrame) -> pd.DataFrame:
    """By key and group: the mean over its runs, their standard deviation (n - 1; NaN of one run), and how many they are."""
    found = final.groupby(["key", "group"], sort=False)["value"].agg(mean="mean", spread="std", runs="count")
    return found.reset_index()


def needs_table(table: pd.DataFrame, keys: Sequence[str], baseline: str) -> pd.DataFrame:
    """What each run needs to reach the final score of the run ``baseline``: its first evaluation at or above it, by key.

    Columns key, run, group, target, reached (the score there, NaN if it never is), samples, hours, exaflops, and the same over what the baseline needs (``samples_ratio``, ...). Few evaluations
    make coarse figures: nothing is interpolated.
    """
    targets = final_table(table[table["run"] == baseline], keys).set_index("key")["value"]
    rows = []
    for key in (key for key in keys if key in targets):
        for (run, group), own in table[(table["source"] != "train") & (table["key"] == key)].groupby(["run", "group"], sort=False):
            reached = own[own["value"] >= targets[key]].sort_values("samples", kind="stable").head(1)
            values = [float(reached[name].iloc[0]) if len(reached) else float("nan") for name in ("value", *NEEDS)]
            rows.append((key, run, group, float(targets[key]), *values))
    found = pd.DataFrame(rows, columns=["key", "run", "group", "target", "reached", *NEEDS])
    own = found[found["run"] == baseline].set_index("key")
    for name in NEEDS:
        found[f"{name}_ratio"] = found[name] / found["key"].map(own[name])
    return found
