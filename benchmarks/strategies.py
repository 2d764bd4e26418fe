"""Law 1 in figures: how far two ranks under each strategy are from one process, for every objective, in fp32 and bf16.

What is compared is what ``tests/test_law1_strategies.py`` compares: the loss, the gradient of every parameter (relative to that tensor's largest value; the largest
of all tensors counts) and how far three steps move every weight and buffer. Run: ``python benchmarks/strategies.py`` (some minutes on two cores). The last line
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

from tests.strategies import OBJECTIVES, STRATEGIES, environment, fill_spool, recipe_with  # noqa: E402
from tests.support import spawn  # noqa: E402
from tests.test_law1_strategies import EPISODE, differences, measured  # noqa: E402

PRECISIONS = ("fp32", "bf16")


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
        for strategy in options.strategies:
            each_rank = [differences(one_process, found) for found in spawn(measured, options.ranks, spool, objectives, PRECISIONS, env=environment(strategy, options.ranks))]
            figures[strategy] = {name: {what: max(found[name][what] for found in each_rank) for what in each} for name, each in each_rank[0].items()}
    table = Table(title=f"{options.ranks} processes against 1: largest relative difference", title_justify="left")
    for column in ("strategy", "objective, precision", "loss", "gradients", "weights after 3 steps"):
        table.add_column(column)
    for strategy, found in figures.items():
        for name, each in found.items():
            table.add_row(strategy, name, *(f"{each[what]:.1e}" for what in ("loss", "gradients", "weights")))
    Console(width=110).print(table)
    print(json.dumps({"benchmark": "strategies", "ranks": options.ranks, "cores": os.cpu_count(), "differences": figures}))


if __name__ == "__main__":
    main()
