"""Laws 1 and 2 in figures: how far two ranks under each strategy are from one process, for every objective, in fp32 and bf16, and in fp32 with micro-batches.

What is compared is what ``tests/test_law1_strategies.py`` compares: the loss, the gradient of every parameter (relative to that tensor's largest value; the largest
of all tensors counts), all gradients as one vector (relative to its length), and how far three steps move every weight and buffer. In bf16 a tensor whose
gradient nearly cancels differs by as much as it is; how far bf16 is from fp32 in one process stands beside it. Run: ``python benchmarks/strategies.py`` (some minutes on two cores). The last line
is one JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from tests.strategies import OBJECTIVES, STRATEGIES, environment, fill_spool, recipe_with, whole_difference  # noqa: E402
from tests.support import spawn  # noqa: E402
from tests.test_law1_strategies import EPISODE, differences, measured  # noqa: E402

PRECISIONS = ("fp32", "bf16")
MICROBATCH = 12


def of_precision(fp32: dict, bf16: dict) -> dict[str, float]:
    """How far a step in bf16 is from the same in fp32."""
    return {"loss": abs(bf16["loss"] / fp32["loss"] - 1).item(), "whole gradient": whole_difference(fp32, bf16)}


def compared(expected: dict[str, dict], ranks: list[dict[str, dict]]) -> dict[str, dict[str, float]]:
    """The largest differences of any rank."""
    each_rank = [differences(expected, found) for found in ranks]
    return {name: {what: max(found[name][what] for found in each_rank) for what in each} for name, each in each_rank[0].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    options = parser.parse_args()
    objectives = tuple(options.objectives)
    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        spool = fill_spool(Path(folder) / "spool", recipe_with("clip"), EPISODE)
        one_process = spawn(measured, 1, spool, objectives, PRECISIONS)[0]
        figures["1 process"] = {f"{name}, bf16 against fp32": of_precision(*(one_process[f"{name}, {precision}"]["gradients"] for precision in PRECISIONS)) for name in objectives}
        for strategy in options.strategies:
            figures[strategy] = compared(one_process, spawn(measured, options.ranks, spool, objectives, PRECISIONS, env=environment(strategy, options.ranks)))
            in_parts = spawn(measured, options.ranks, spool, objectives, PRECISIONS[:1], False, MICROBATCH, env=environment(strategy, options.ranks))
            whole = {name: one_process[name] for name in in_parts[0]}
            figures[strategy] |= {f"{name}, micro-batches of {MICROBATCH}": each for name, each in compared(whole, in_parts).items()}
    table = Table(title=f"{options.ranks} processes against 1: largest relative difference", title_justify="left")
    for column in ("strategy", "objective, precision", "loss", "gradients", "whole gradient", "weights after 3 steps"):
        table.add_column(column)
    for strategy, found in figures.items():
        for name, each in found.items():
            table.add_row(strategy, name, *(f"{each[what]:.1e}" if what in each else "-" for what in ("loss", "gradients", "whole gradient", "weights")))
    Console(width=130).print(table)
    print(json.dumps({"benchmark": "strategies", "ranks": options.ranks, "cores": os.cpu_count(), "differences": figures}))


if __name__ == "__main__":
    main()
