"""All methods of recipes/matched at equal samples on a small corpus: zero-shot, retrieval and linear probe on held-out vendors, speed, memory and time.

    python benchmarks/methods.py --corpus train_corpus.parquet --out DIR [--methods clip,slip,...] [--seeds 3] [--episodes 12] [--train-only | --evaluate | --table]

Each method is trained once for each seed by launch/pretrain.py's command, in a process and thread of its own, one after the other, and evaluated by launch/evaluate.py. A seed is that of
the initial weights, of the order of rows and of augmentation, and the same for every method, so that differences between methods are paired. The recipes are recipes/matched laid under
benchmarks/methods_parts/small.yaml: one optimiser, schedule, augmentation and text rule.

Zero-shot and probe are top-1 over 16 classes of Twemoji; mean recall is the mean of R@1, 5, 10 both ways, on four held-out vendors in turn and then over these. A difference to CLIP is the mean
over seeds of the paired one, +- its standard deviation; it is marked * if a two-sided paired t-test over seeds has p < 0.05, and is else not significant. With three seeds few are, and
one in twenty would be without any difference: the test is not corrected for the number of comparisons. Samples a second and hours are of processor time of all phases but evaluation
(fetching, extraction and clustering are in it), so that other work on the machine does not count; memory is the peak above imports.

Runs that are done are not run again, and one that was killed goes on where it was (its time is not known then). --evaluate trains nothing and evaluates what is trained; --table only prints.
The last line is one JSON object with the table's figures.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import yaml
from methods_parts import corpus, figures
from methods_parts.recipes import BASELINE, METHODS, ROOT
from methods_parts.runs import Bench
from rich.console import Console
from rich.table import Table

from protoclip_scale.errors import UserError

TITLES = {"zero_shot": "zero-shot", "mean_recall": "mean recall", "probe": "probe"}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="train_corpus.parquet")
    parser.add_argument("--demo", type=Path, default=ROOT / "recipes" / "demo_corpus", help="demo corpus, whose Twemoji rows are held out: a parquet file or the folder with its shards")
    parser.add_argument("--out", type=Path, required=True, help="work folder; kept")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"comma-separated, of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--episodes", type=int, default=12, help="episodes of 4,992 rows that each run trains on (default: 12)")
    parser.add_argument("--small", type=Path, help="YAML file that is laid over all recipes, to try the script; use another --out for it")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_true", help="evaluate nothing")
    only.add_argument("--evaluate", action="store_true", help="train nothing, evaluate what is trained and not yet evaluated")
    only.add_argument("--table", action="store_true", help="print the table of what is there")
    chosen = parser.parse_args(argv)
    chosen.methods, chosen.out = chosen.methods.split(","), chosen.out.absolute()
    if unknown := [name for name in chosen.methods if name not in METHODS]:
        raise UserError(f"--methods: {unknown[0]} is unknown; choose of {', '.join(METHODS)}")
    return chosen


def table(summary: dict[str, dict]) -> Table:
    drawn = Table(title="The matched methods at equal samples; * p < 0.05, all other differences are not significant")
    headings = [heading for title in TITLES.values() for heading in (f"{title} %", f"minus {BASELINE}")]
    for column in ("method", "seeds", *headings, "samples/s", "peak GB", "hours"):
        drawn.add_column(column, justify="left" if column == "method" else "right")
    for method, line in summary.items():
        qualities = [cell for quality in TITLES for cell in (_mean(line[quality], ".2f"), _difference(line[f"{quality}_minus_{BASELINE}"]))]
        costs = [_number(line[key], form) for key, form in (("samples_per_second", ",.0f"), ("peak_gb", ".2f"), ("hours", ".3f"))]
        drawn.add_row(method + (" (by tokens)" if line["tokens"] else ""), str(len(line["seeds"])), *qualities, *costs)
    return drawn


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mean(of_seeds: dict | None, form: str) -> str:
    if of_seeds is None:
        return "-"
    return format(of_seeds["mean"], form) + ("" if of_seeds["spread"] is None else f" ±{of_seeds['spread']:.2f}")


def _difference(of_seeds: dict | None) -> str:
    return _mean(of_seeds, "+.2f") + ("*" if of_seeds and of_seeds["significant"] else "")


def main(argv: list[str] | None = None) -> int:
    console = Console(width=None if sys.stdout.isatty() else 190)
    try:
        chosen = arguments(argv)
        extra = yaml.safe_load(chosen.small.read_text()) if chosen.small else {}
        bench = Bench(chosen.out, corpus.prepare(chosen.corpus, chosen.demo, chosen.out / "corpus"), chosen.episodes, extra)
        for seed in range(chosen.seeds) if not chosen.table else ():
            for method in chosen.methods:
                began = time.perf_counter()
                if not chosen.evaluate:
                    bench.train(method, seed)
                if not chosen.train_only:
                    bench.evaluate(method, seed)
                print(f"{method}, seed {seed}: {time.perf_counter() - began:.0f} s waited", file=sys.stderr, flush=True)
        results = {(method, seed): result for method in chosen.methods for seed in range(chosen.seeds) if (result := bench.result(method, seed))}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary = figures.summary(results)
    console.print(table(summary))
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
