"""Total time of ProtoCLIP over CLIP at equal samples, for each refresh policy, with the share of each phase, and what the time buys.

    python benchmarks/overhead.py --corpus train_corpus.parquet --folder DIR [--policies clip,protoclip,...] [--seeds 0,1,2] [--samples 120000] [--table]

Each policy (benchmarks/overhead_parts/policies.py) is trained once for each seed by launch/pretrain.py's command in a process of its own. Runs of one seed start from the
same weights and see the same rows under the same augmentation, so differences between policies are paired. Time is processor time of all phases but
evaluation, imports left out; phases are given as shares of CLIP's whole time, so that they add up to the cost. ret4 is the mean of four retrieval mean recalls (R@1, 5, 10
both ways, in per cent) on pictures of vendors that are not trained on (benchmarks/overhead_parts/corpus.py tells which).

Not in the cost: making a teacher's features, once for a corpus (for 38,256 captions by MiniLM about as long as 25,000 samples of CLIP here), figures and pictures of clusters.

Finished runs are kept in DIR and not run again; --table prints what is there. The last line is one JSON object with the table's figures.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from overhead_parts import corpus, figures
from overhead_parts.policies import POLICIES
from overhead_parts.runs import Bench
from rich.console import Console
from rich.table import Table

from protoclip_scale.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="train_corpus.parquet")
    parser.add_argument("--demo", type=Path, default=ROOT / "recipes" / "demo_corpus", help="demo corpus: a parquet file or the folder with its shards")
    parser.add_argument("--folder", type=Path, required=True, help="work folder, about 200 MB; kept")
    parser.add_argument("--policies", default=",".join(POLICIES), help=f"comma-separated, of {', '.join(POLICIES)} (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    parser.add_argument("--samples", type=int, default=120_000, help="rows trained on, rounded to whole episodes (default: 120000)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run (default: 1)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of every policy's recipe; use another --folder for it")
    parser.add_argument("--table", action="store_true", help="train nothing, print the table of finished runs")
    chosen = parser.parse_args(argv)
    chosen.policies, chosen.seeds = chosen.policies.split(","), [int(seed) for seed in chosen.seeds.split(",")]
    if unknown := [name for name in chosen.policies if name not in POLICIES]:
        raise UserError(f"--policies: {unknown[0]} is unknown; choose of {', '.join(POLICIES)}")
    chosen.folder = chosen.folder.absolute()
    return chosen


def table(summary: dict[str, dict]) -> Table:
    phases = list(dict.fromkeys(phase for row in summary.values() for phase in row["share_of_clip"] or ()))
    drawn = Table(title="ProtoCLIP over CLIP at equal samples")
    for column in ("policy", "seeds", "ret4", "minus clip", "minus protoclip", "cpu s", "cost", *phases, "peak MB"):
        drawn.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for policy, row in summary.items():
        shares = row["share_of_clip"] or {}
        drawn.add_row(
            policy,
            str(len(row["seeds"])),
            f"{row['ret4']:.2f}",
            *(f"{each['mean']:+.2f}" + (f" ±{each['spread']:.2f}" if each["spread"] is not None else "") if each else "-" for each in (row["minus_clip"], row["minus_protoclip"])),
            f"{row['cpu_seconds']:.1f}",
            f"{row['cost_over_clip']:.2f}" if row["cost_over_clip"] else "-",
            *(f"{100 * shares[phase]:.1f}%" if phase in shares else "-" for phase in phases),
            f"{row['peak_mb']:,.0f}",
        )
    return drawn


def main(argv: list[str] | None = None) -> int:
    console = Console(width=None if sys.stdout.isatty() else 180)
    try:
        chosen = arguments(argv)
        bench = Bench(chosen.folder, corpus.prepare(chosen.corpus, chosen.demo, chosen.folder / "corpus"), chosen.samples, chosen.threads, tuple(chosen.set))
        if not chosen.table:
            for seed in chosen.seeds:
                for policy in chosen.policies:
                    began = time.perf_counter()
                    result = bench.run(policy, seed)
                    console.print(f"{policy}, seed {seed}: ret4 {result.ret4:.2f}, {result.seconds:.1f} s of processor time ({time.perf_counter() - began:.0f} s waited)")
        results = {(policy, seed): result for policy in POLICIES for seed in chosen.seeds if (result := bench.finished(policy, seed))}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary = figures.summary(results, POLICIES)
    console.print(table(summary))
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
