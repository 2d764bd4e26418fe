"""Turn image-text data of any layout into parquet shards for training. Killed at any point, the same command goes on where it was.

    python tools/prepare_data.py --from pairs.tsv --image-column filepath --caption-column title --out data/mine
    python tools/prepare_data.py --from photos/ --input-format folder --out data/photos --deduplicate perceptual --leakage recipes/demo_corpus/eval_*.parquet
    python tools/prepare_data.py --from 'shards/{00000..00331}.tar' --out data/cc3m --format webp --processes 16
    python tools/prepare_data.py --hub org/name --revision main --out data/hub
    python tools/prepare_data.py --recipe recipes/demo.yaml --out data/demo

Images are decoded (turned upright, on white where transparent, 16 bits cut to 8), made smaller, and encoded again; rows whose image cannot be decoded and rows
without a caption are left out and listed. OUT then holds the shards, README.md with the lines for a recipe, report.json, and lists of the rows left out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rich.console  # noqa: E402
import torch  # noqa: E402

from protoclip_scale.data.decode import Limits  # noqa: E402
from protoclip_scale.errors import UserError  # noqa: E402
from protoclip_scale.preparation import settings as asked  # noqa: E402
from protoclip_scale.preparation.duplicates import MAX_RADIUS  # noqa: E402
from protoclip_scale.preparation.images import ENCODERS, ImageSettings  # noqa: E402
from protoclip_scale.preparation.pool import available_cores  # noqa: E402
from protoclip_scale.preparation.prepare import prepare  # noqa: E402
from protoclip_scale.preparation.report import leakage_lines, report_table, summary_line  # noqa: E402
from protoclip_scale.preparation.source_options import add_source_options, check_source_options, common_root, pick, refuse_unused, resolve  # noqa: E402
from protoclip_scale.recipe import schema  # noqa: E402
from protoclip_scale.redact import redact_errors  # noqa: E402

DEFAULTS = asked.Settings()
DATA = {name: field.default for name, field in schema.Data.model_fields.items()}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="new folder, or one that the same command began")
    output.add_argument("--short-side", type=int, default=DEFAULTS.images.short_side, metavar="PIXELS", help="larger images are made smaller, none larger (default: %(default)s)")
    output.add_argument("--format", choices=sorted(ENCODERS), default=DEFAULTS.images.format, help="webp is smaller and slower to write (default: %(default)s)")
    output.add_argument("--quality", type=int, default=DEFAULTS.images.quality, help="of the encoder, 1 to 100 (default: %(default)s)")
    output.add_argument("--keep-small", action=argparse.BooleanOptionalAction, default=True, help="keep the bytes of an image that needs no change (small enough, plain, already of --format), so that it is not encoded with loss a second time (default: keep)")
    output.add_argument("--rows-per-shard", type=int, default=DEFAULTS.rows_per_shard, metavar="N", help="input rows; what is left out makes a shard smaller (default: %(default)s)")
    output.add_argument("--row-group", type=int, default=DEFAULTS.row_group_rows, metavar="N", help="rows of a parquet row group: the smallest piece that training reads (default: %(default)s)")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    rows.add_argument("--empty-caption", choices=asked.EMPTY_CAPTION, help="rows without a caption (default: drop, or as the recipe says)")
    rows.add_argument("--deduplicate", choices=asked.DEDUPLICATE, default=DEFAULTS.deduplicate, help="exact: equal pixels after resizing. perceptual: also images that look alike (DCT pHash in gray, so colour does not count). The first of the input order stays (default: %(default)s)")
    rows.add_argument("--deduplicate-by", choices=asked.DEDUPLICATE_BY, help=f"pair: a row goes only if image and captions repeat. image: it goes if the image repeats, its captions with it (default: {DEFAULTS.deduplicate_by})")
    rows.add_argument("--radius", type=int, metavar="BITS", help=f"bits of 64 in which hashes of images that look alike may differ, 0 to {MAX_RADIUS}; also for --leakage (default: {DEFAULTS.radius})")
    rows.add_argument("--leakage", nargs="+", default=[], metavar="FILES", help="parquet files with evaluation images: rows that show one of them, or nearly, are left out and listed")
    rows.add_argument("--leakage-column", metavar="COL", help=f"their column of images (default: {DEFAULTS.leakage_column})")
    work = parser.add_argument_group("work")
    work.add_argument("--processes", type=int, default=available_cores(), metavar="N", help="never changes the output (default: all cores, here %(default)s)")
    work.add_argument("--max-pixels", type=int, metavar="N", help=f"images with more are left out unread (default: {DATA['max_pixels']:,}, or as the recipe says)")
    work.add_argument("--max-bytes", type=int, metavar="N", help=f"images with more encoded bytes are left out unread (default: {DATA['max_bytes']:,}, or as the recipe says)")
    work.add_argument("--retry-seconds", type=float, metavar="S", help=f"how long remote reads are retried (default: {DATA['retry_seconds']:g}, or as the recipe says)")
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        parser.error("--processes: at least 1")
    check_source_options(parser, arguments)
    if not arguments.leakage:
        refuse_unused(arguments, ("leakage_column",), "--leakage")
        refuse_unused(arguments, ("radius",) if arguments.deduplicate != "perceptual" else (), "--deduplicate perceptual or --leakage")
    if arguments.deduplicate == "none":
        refuse_unused(arguments, ("deduplicate_by",), "--deduplicate")
    for name in ("deduplicate_by", "radius", "leakage_column"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(DEFAULTS, name))
    return arguments


def main(argv: list[str] | None = None) -> int:
    torch.set_num_threads(1)
    redact_errors()
    try:
        arguments = parse_arguments(argv)
        _, data = resolve(arguments, common_root(arguments))
        given = {name: getattr(arguments, name) for name in ("max_pixels", "max_bytes", "retry_seconds", "empty_caption")}
        given = {name: getattr(data, name) if value is None else value for name, value in given.items()}
        settings = asked.Settings(
            images=ImageSettings(arguments.short_side, arguments.format, arguments.quality, arguments.keep_small),
            rows_per_shard=arguments.rows_per_shard,
            row_group_rows=arguments.row_group,
            deduplicate=arguments.deduplicate,
            deduplicate_by=arguments.deduplicate_by,
            radius=arguments.radius,
            leakage=tuple(map(str, arguments.leakage)),
            leakage_column=arguments.leakage_column,
            empty_caption=given["empty_caption"],
            limit=arguments.limit,
            limits=Limits(given["max_pixels"], given["max_bytes"]),
        )
        report = prepare(
            list(pick(data, arguments.source).values()),
            data.root,
            arguments.out,
            settings,
            processes=arguments.processes,
            retry_seconds=given["retry_seconds"],
            max_members=data.max_members,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    console = rich.console.Console()
    console.print(report_table(report))
    for line in (summary_line(report), *leakage_lines(report)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"\nTo train on {arguments.out}, put this into a recipe:\n\n{report['recipe']}", soft_wrap=True, highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
