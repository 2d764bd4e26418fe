"""Statistics of a look at data, for a terminal and as JSON."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from protoclip_scale.preparation.inspect_statistics import MEASURES, Percentiles, SourceStatistics


def statistics_tables(statistics: Sequence[SourceStatistics]) -> Iterator[RenderableType]:
    """Of each source: what it holds, the images and captions of the sample, and sizes."""
    for source in statistics:
        yield Text(source.name, style="bold")
        yield _pairs("in all", source.totals())
        yield _pairs("images of the sample", source.image_facts())
        if rows := source.image_table():
            table = Table(title="sizes of those that can be decoded", title_justify="left", title_style="cyan", box=box.SIMPLE_HEAD, pad_edge=False)
            table.add_column("")
            for name in MEASURES:
                table.add_column(name, justify="right")
            for row in rows:
                table.add_row(*map(Text, row))
            yield table
        yield _pairs("captions of the sample", source.captions.table())


def _pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="cyan", show_header=False, box=None, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def statistics_json(statistics: Sequence[SourceStatistics]) -> dict[str, Any]:
    """The same figures: {"sources": [...]}, shares in [0, 1], sizes in pixels and bytes."""
    return {"sources": [{name: value._asdict() if isinstance(value, Percentiles) else value for name, value in asdict(source).items()} for source in statistics]}
