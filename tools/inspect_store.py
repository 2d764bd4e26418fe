"""Look into a feature store: an episode's features, what training recorded, a teacher's features, or a teacher's clusters.

    python tools/inspect_store.py recipes/demo_corpus_teacher

It says what the folder holds and what of it is missing, and looks at a sample of the features: norms, values, distinct rows, rows that are not finite.
A store that is not finished can be looked at while it is written. Exit code 1 if the folder holds no store, or a damaged one.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rich.console  # noqa: E402

from protoclip_scale.errors import UserError  # noqa: E402
from protoclip_scale.prototypes.inspection import SAMPLE_ROWS, inspect  # noqa: E402
from protoclip_scale.prototypes.inspection_tables import inspection_tables  # noqa: E402


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/inspect_store.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", metavar="STORE", help="folder of the store or of the clusters")
    parser.add_argument("--rows", type=int, default=SAMPLE_ROWS, metavar="N", help="rows sampled (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.rows < 1:
        raise UserError(f"--rows {arguments.rows}: the sample needs at least one row")
    return arguments


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse_arguments(argv)
        found = inspect(arguments.store, arguments.rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    console = rich.console.Console()
    for table in inspection_tables(found):
        console.print(table)
        console.print()
    for problem in found.problems[:1]:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
