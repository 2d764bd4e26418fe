"""Download a list of URLs and captions straight to parquet training shards; a stopped or killed run goes on where it was.

python tools/gather_images.py --list conceptual_captions --out data/cc3m Train_GCC-training.tsv
python tools/gather_images.py --list yfcc15m_declip --out data/yfcc15m yfcc15m_clean_open_data.json
python tools/gather_images.py --list yfcc15m_openai --metadata yfcc100m_dataset.bz2 --out data/yfcc15m yfcc100m_subset_data.tsv.bz2
python tools/gather_images.py --list tsv --header url caption --out data/cc12m cc12m.tsv

Run the same command again with --retry-failures for what did not come. Recipes read it as data.sources: [{files: data/cc3m/*.parquet}].
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.data.decode import Limits  # noqa: E402
from protoclip_scale.errors import UserError  # noqa: E402
from protoclip_scale.preparation.download import DownloadSettings  # noqa: E402
from protoclip_scale.preparation.gather import GatherSettings, gather  # noqa: E402
from protoclip_scale.preparation.gather_report import report_screen, write_report  # noqa: E402
from protoclip_scale.preparation.images import ENCODERS, ImageSettings  # noqa: E402
from protoclip_scale.preparation.lists import LAYOUTS, TEXTS, ListOptions  # noqa: E402
from protoclip_scale.preparation.pair_list import ListSettings  # noqa: E402
from protoclip_scale.preparation.pool import available_cores  # noqa: E402
from protoclip_scale.redact import redact_errors  # noqa: E402
from protoclip_scale.report.terminal import Lines, Terminal  # noqa: E402

SMALLEST = {"retries": 0, "redirects": 0, "workers": 0, "backoff": 0, "timeout": 0.001} | dict.fromkeys(
    (
        "connections",
        "per_host",
        "max_bytes",
        "max_per_query",
        "short_side",
        "max_pixels",
        "rows_per_shard",
        "row_group_rows",
        "shards_at_once",
    ),
    1,
)


def parser() -> argparse.ArgumentParser:
    options, download, image, limits = ListOptions(), DownloadSettings(), ImageSettings(), Limits()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("path", type=Path, help="the list; .gz, .bz2 and .xz are read as they are")
    arguments.add_argument("--list", required=True, choices=LAYOUTS, help="its layout")
    arguments.add_argument("--out", required=True, type=Path, help="folder of the shards")

    group = arguments.add_argument_group("yfcc15m_openai")
    group.add_argument("--metadata", nargs="+", default=options.metadata, metavar="FILE", help="files of the YFCC100M metadata, in order")
    group.add_argument("--text", choices=TEXTS, default=options.text, help=f"captions of a photo (default: {options.text})")
    group.add_argument("--remove-addresses", action="store_true", help="cut web addresses out of titles and descriptions")

    group = arguments.add_argument_group("csv and tsv")
    group.add_argument("--url-column", default=options.url_column, help=f"default: {options.url_column}")
    group.add_argument(
        "--caption-columns",
        nargs="+",
        default=options.caption_columns,
        metavar="COLUMN",
        help=f"default: {' '.join(options.caption_columns)}",
    )
    group.add_argument("--keep-columns", nargs="+", default=options.keep_columns, metavar="COLUMN", help="further columns for the shards")
    group.add_argument(
        "--header", nargs="+", default=options.header, metavar="COLUMN", help="column names, if the file has no line with them"
    )

    group = arguments.add_argument_group("balancing by query")
    group.add_argument("--queries", type=Path, metavar="FILE", help="one query a line; pairs whose captions contain none are left out")
    group.add_argument("--max-per-query", type=int, default=20_000, help="pairs for each query (default: 20000)")
    group.add_argument("--keep-unmatched", action="store_true", help="keep pairs that contain no query")

    group = arguments.add_argument_group("downloading")
    group.add_argument("--connections", type=int, default=download.connections, help=f"at once (default: {download.connections})")
    group.add_argument("--per-host", type=int, default=download.per_host, help=f"to one host at once (default: {download.per_host})")
    group.add_argument("--timeout", type=float, default=download.timeout, help=f"seconds for one answer (default: {download.timeout:g})")
    group.add_argument(
        "--retries", type=int, default=download.retries, help=f"further tries where they may help (default: {download.retries})"
    )
    group.add_argument(
        "--backoff", type=float, default=download.backoff, help=f"seconds before the first further try (default: {download.backoff:g})"
    )
    group.add_argument("--redirects", type=int, default=download.redirects, help=f"followed at most (default: {download.redirects})")
    group.add_argument("--max-bytes", type=int, default=download.max_bytes, help=f"of one image (default: {download.max_bytes})")
    group.add_argument("--allow-private", action="store_true", help="ask loopback and private addresses too")
    group.add_argument(
        "--ignore-opt-out", action="store_true", help="take images whose X-Robots-Tag says noai, noimageai, noindex or noimageindex"
    )
    group.add_argument("--user-agent", default=download.user_agent, help=f"default: {download.user_agent}")
    group.add_argument(
        "--retry-failures", action="store_true", help="when all shards are there: try the rows that failed again, into further shards"
    )

    group = arguments.add_argument_group("shards")
    group.add_argument(
        "--short-side", type=int, default=image.short_side, help=f"larger images are made smaller (default: {image.short_side} pixels)"
    )
    group.add_argument("--format", choices=ENCODERS, default=image.format, help=f"default: {image.format}")
    group.add_argument("--quality", type=int, default=image.quality, help=f"of the encoding (default: {image.quality})")
    group.add_argument(
        "--max-pixels", type=int, default=limits.max_pixels, help=f"larger images are refused undecoded (default: {limits.max_pixels})"
    )
    group.add_argument("--rows-per-shard", type=int, default=10_000, help="rows of the list that make a shard (default: 10000)")
    group.add_argument("--row-group-rows", type=int, default=500, help="rows that are read at once in training (default: 500)")
    group.add_argument("--shards-at-once", type=int, default=2, help="in memory until they are whole (default: 2)")
    group.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        help="processes that decode and encode (default: one a core; 0: none beside this one)",
    )
    return arguments


def settings_of(options: argparse.Namespace) -> GatherSettings:
    for name, least in SMALLEST.items():
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} is too small; give at least {least}")
    if not 1 <= options.quality <= 100:
        raise UserError(f"--quality {options.quality} is not between 1 and 100")
    if options.queries is None and (options.keep_unmatched or options.max_per_query != 20_000):
        raise UserError("--max-per-query and --keep-unmatched have no effect without --queries; leave them out")
    texts = ListOptions(
        options.text,
        tuple(options.metadata),
        options.remove_addresses,
        options.url_column,
        tuple(options.caption_columns),
        tuple(options.keep_columns),
        tuple(options.header),
    )
    return GatherSettings(
        out=options.out,
        list=ListSettings(
            options.path, options.list, texts, options.rows_per_shard, options.queries, options.max_per_query, options.keep_unmatched
        ),
        download=DownloadSettings(
            options.connections,
            options.per_host,
            options.timeout,
            options.retries,
            options.backoff,
            options.redirects,
            options.max_bytes,
            options.allow_private,
            options.ignore_opt_out,
            options.user_agent,
        ),
        image=ImageSettings(options.short_side, options.format, options.quality),
        limits=Limits(options.max_pixels, options.max_bytes),
        workers=options.workers,
        row_group_rows=options.row_group_rows,
        shards_at_once=options.shards_at_once,
        retry_failures=options.retry_failures,
    )


def main(arguments: list[str] | None = None) -> int:
    lines = Lines(Terminal())
    redact_errors()
    try:
        settings = settings_of(parser().parse_args(arguments))
        report = write_report(gather(settings, lines.line))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    lines.screen(report_screen(report))
    lines.copyable(f"{report['kept']:,} pairs in {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
