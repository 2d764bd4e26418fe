"""The facts of a store for a terminal."""

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from protoclip_scale.prototypes.inspection import Inspection, PartFacts, SampleFacts
from protoclip_scale.report.plain import DASH, count, number

SHOWN_PARTS = 16


def inspection_tables(found: Inspection) -> Iterator[RenderableType]:
    """What it is, its parts, and the features of the sample."""
    yield Text(f"{found.kind}: {found.state}", style="bold")
    about = Table(show_header=False, box=None, padding=(0, 2))
    about.add_column(no_wrap=True, style="cyan")
    about.add_column(overflow="fold")
    for row in found.about.items():
        about.add_row(*map(Text, row))
    yield about
    if found.parts:
        yield _parts(found.parts)
    if found.samples:
        yield _samples(found.samples)


def _parts(parts: list[PartFacts]) -> Table:
    """The first ones, all that are not as they should be, and how many are left out."""
    table = _headed("parts", ("part", "rows", "written", "missing", "state", "source"))
    wrong = [part for part in parts if part.written != part.rows or part.problem]
    shown = [part for part in parts if part in wrong or part.number < SHOWN_PARTS][: 2 * SHOWN_PARTS]
    for part in shown:
        state = part.problem or ("not begun" if part.written is None else "sealed" if part.sealed else "not sealed")
        table.add_row(*map(Text, (str(part.number), count(part.rows), count(part.written), count(part.rows - (part.written or 0)), state, part.name)))
    if len(shown) < len(parts):
        table.add_row("...", Text(f"{len(parts) - len(shown)} more"))
    return table


def _samples(samples: list[SampleFacts]) -> Table:
    table = _headed(f"features of a sample of {count(samples[0].rows)} rows", ("column", "norm", "value", "distinct", "zeros", "not finite"))
    for each in samples:
        table.add_row(*map(Text, (each.column, _spread(each.norms), _spread(each.values), count(each.distinct), count(each.zeros), count(each.non_finite))))
    table.caption = "least .. mean .. most; zeros stand for rows without features"
    table.caption_justify = "left"
    return table


def _spread(figures: tuple[float, float, float] | None) -> str:
    return " .. ".join(number(figure, 3) for figure in figures) if figures else DASH


def _headed(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="cyan", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("column", "state", "source") else "right", overflow="fold")
    return table
