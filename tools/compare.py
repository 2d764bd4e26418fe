"""Put runs side by side: what they reached, curves over samples and over hours, and what each needs to reach a baseline's score.

    python tools/compare.py runs/a runs/b-seed0 runs/b-seed1 --baseline runs/a --out comparison

Figures come from each run's metrics.jsonl and evaluation.csv (tools/watch.py). Runs whose recipes differ in run.seed and data.plan.seed only, besides where they ran and what was measured, are
seeds of one method: their mean is shown with its spread (standard deviation over seeds). Hours are those of work that counts: without evaluations, the time between attempts and what was done again.
FLOPs are the recipe's whole work for a sample (as --check tells them, k-means at most, captions as long as they can be) times the samples. With --out the tables are written as CSV and parquet and the
curves drawn.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.errors import UserError  # noqa: E402


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directories")
    parser.add_argument("--baseline", metavar="RUN", type=Path, help="also tell the samples, hours and FLOPs that each run needs to reach this one's last score")
    parser.add_argument("--figures", metavar="PATTERN", nargs="+", help="figures to show, by name with * (default: top-1 accuracies and mean recalls)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write tables (CSV, parquet) and pictures here")
    parser.add_argument("--no-pictures", action="store_true", help="write tables only")
    return parser.parse_args(argv)


def compare(arguments: argparse.Namespace) -> None:
    import rich.console

    from protoclip_scale.report.compare.draw import draw_all
    from protoclip_scale.report.compare.runs import read_runs
    from protoclip_scale.report.compare.show import final_screen, needs_screens, write_tables
    from protoclip_scale.report.compare.tables import HEADLINES, chosen_keys, curves, final_table, needs_table, seeds_table

    folders = list({folder.expanduser().resolve(): folder.expanduser() for folder in (*arguments.runs, *([arguments.baseline] if arguments.baseline else []))}.values())
    runs = read_runs(folders)
    table = curves(runs)
    keys = chosen_keys(table, arguments.figures or HEADLINES)
    final = final_table(table, keys)
    tables = {"curves": table, "final": final, "seeds": seeds_table(final)}
    console = rich.console.Console()
    console.print(final_screen(tables["seeds"]), markup=False)
    if arguments.baseline:
        (baseline,) = [run.label for run in runs if run.folder.resolve() == arguments.baseline.expanduser().resolve()]
        tables["needs"] = needs_table(table, keys, baseline)
        for screen in needs_screens(tables["needs"], baseline):
            console.print(screen, markup=False)
    if arguments.out:
        written = write_tables(tables, arguments.out)
        written += [] if arguments.no_pictures else draw_all(table, keys, arguments.out)
        console.print(f"written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    try:
        compare(parse_arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
