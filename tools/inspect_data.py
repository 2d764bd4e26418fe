"""Look at data before training on it: a contact sheet of rows beside their augmented views, and statistics of any source.

    python tools/inspect_data.py --recipe recipes/demo.yaml --out sheet.html
    python tools/inspect_data.py --recipe recipes/demo.yaml --augmentations slip slip_ssl --texts eda --masked --out sheet.png sheet.html
    python tools/inspect_data.py --from pairs.tsv --image-column filepath --caption-column title --json

Rows are a seeded sample that reads few blocks, also of remote files. With --recipe, the recipe's own augmentations are drawn exactly as training draws
them in those epochs.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rich.console  # noqa: E402
import torch  # noqa: E402

from protoclip_scale.data.text_augmentation import TEXT_AUGMENTATIONS  # noqa: E402
from protoclip_scale.data.tokenizers import tokenizer_for  # noqa: E402
from protoclip_scale.data.transforms import AUGMENTATIONS  # noqa: E402
from protoclip_scale.errors import UserError  # noqa: E402
from protoclip_scale.preparation.inspect_page import write_page  # noqa: E402
from protoclip_scale.preparation.inspect_report import statistics_json, statistics_tables  # noqa: E402
from protoclip_scale.preparation.inspect_rows import Inspection, Look, inspect  # noqa: E402
from protoclip_scale.preparation.inspect_sheet import draw_sheet  # noqa: E402
from protoclip_scale.preparation.source_options import add_source_options, check_source_options, refuse_unused, resolve  # noqa: E402
from protoclip_scale.recipe import schema  # noqa: E402
from protoclip_scale.redact import redact_errors  # noqa: E402

SHEETS = {".png": lambda path, inspection, title: draw_sheet(path, inspection), ".html": write_page}
DEFAULTS = Look()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_options(parser)
    sheet = parser.add_argument_group("contact sheet")
    sheet.add_argument("--out", nargs="+", type=Path, default=[], metavar="FILE", help=".html (captions in any script, statistics included) or .png, or both")
    sheet.add_argument("--rows", type=int, metavar="N", help=f"rows of the sheet (default: {DEFAULTS.rows})")
    sheet.add_argument("--augmentations", nargs="+", choices=sorted(AUGMENTATIONS), default=[], metavar="NAME", help=f"to show beside the recipe's own: {', '.join(sorted(AUGMENTATIONS))}")
    sheet.add_argument("--texts", nargs="+", choices=sorted(TEXT_AUGMENTATIONS), default=[], metavar="NAME", help="text augmentations to show beside the recipe's own: eda")
    sheet.add_argument("--masked", action="store_true", help="show texts with tokens masked as for masked language modelling")
    sheet.add_argument("--draws", type=int, metavar="N", help=f"views of each augmentation, one per epoch (default: {DEFAULTS.draws})")
    sheet.add_argument("--size", type=int, metavar="PIXELS", help=f"side of a view (default: {DEFAULTS.size}, or as the recipe says)")
    sample = parser.add_argument_group("sample")
    sample.add_argument("--sample", type=int, default=DEFAULTS.sample, metavar="N", help="rows read and decoded for the statistics (default: %(default)s)")
    sample.add_argument("--seed", type=int, default=DEFAULTS.seed, help="of the choice of rows (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the statistics as one JSON object instead of tables")
    arguments = parser.parse_args(argv)
    check_source_options(parser, arguments)
    for name in ("rows", "draws", "size", "sample"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be at least 1")
    if not arguments.out:
        refuse_unused(arguments, ("rows", "augmentations", "texts", "masked", "draws", "size"), "--out")
    for path in arguments.out:
        if path.suffix not in SHEETS:
            parser.error(f"--out {path}: the name must end in {' or '.join(SHEETS)}")
    return arguments


def write_sheet(path: Path, inspection: Inspection, title: str) -> None:
    try:
        SHEETS[path.suffix](path, inspection, title)
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; name a file that can be written") from None


def main(argv: list[str] | None = None) -> int:
    torch.set_num_threads(1)
    redact_errors()
    try:
        arguments = parse_arguments(argv)
        recipe, data = resolve(arguments)
        text = recipe.model.text if recipe else schema.TextTower()
        look = Look(
            size=arguments.size or (recipe.model.image.size if recipe else DEFAULTS.size),
            augmentations=tuple(arguments.augmentations),
            texts=tuple(arguments.texts),
            masked=arguments.masked,
            draws=arguments.draws or DEFAULTS.draws,
            rows=min(arguments.rows or DEFAULTS.rows, arguments.sample) if arguments.out else 0,
            sample=arguments.sample,
            source=arguments.source,
            seed=arguments.seed,
        )
        inspection = inspect(data, look, tokenizer_for(text, arguments.masked))
        for path in arguments.out:
            write_sheet(path, inspection, recipe.name if recipe else data.sources[0].label)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps(statistics_json(inspection.statistics), indent=2, ensure_ascii=False))
        return 0
    console = rich.console.Console()
    for table in statistics_tables(inspection.statistics):
        console.print(table)
        console.print()
    for path in arguments.out:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
