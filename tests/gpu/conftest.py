"""One table of all figures at the end, and of the tests that failed or could not run: a check that was skipped proves nothing."""

import io
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Figure = Callable[..., None]


@pytest.fixture
def figure(record_property) -> Iterator[Figure]:
    """``figure(what, ranks, device, value, bound)``: a row of the table; of several values the worst. Above its bound it fails the test, at its end; without a bound it
    is only reported."""
    found: dict[tuple[str, int, str], tuple[float, float | None]] = {}

    def record(what: str, ranks: int, device: str, value: float, bound: float | None = None) -> None:
        value, (worst, _) = math.inf if math.isnan(value) else value, found.get((what, ranks, device), (-math.inf, None))
        found[what, ranks, device] = (max(value, worst), bound)

    yield record
    for key, values in found.items():
        record_property("figure", [*key, *values])
    beyond = [f"{what}: {value:.3g}, the bound is {bound:.3g}" for (what, *_), (value, bound) in found.items() if not holds(value, bound)]
    assert not beyond, "\n".join(beyond)


def holds(value: float, bound: float | None) -> bool:
    return bound is None or value <= bound


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for kind in terminalreporter.stats.values() for report in kind if isinstance(report, pytest.TestReport) and "tests/gpu/" in report.nodeid]
    if not reports:
        return
    gpus = torch.cuda.device_count()
    table = Table(title=f"{gpus} x {torch.cuda.get_device_name(0) if gpus else 'GPU'}, torch {torch.__version__}", title_justify="left", box=box.MARKDOWN)
    for column in ("what", "ranks", "device", "figure", "bound", "holds"):
        table.add_column(column, no_wrap=column != "what")
    for report in reports:
        test = escape(report.nodeid.split("tests/gpu/")[-1])
        if report.skipped:
            table.add_row(test, "", "", "skipped", "", str(report.longrepr[2]).removeprefix("Skipped: "))
        elif report.failed and report.when != "teardown":
            table.add_row(test, "", "", "failed", "", "NO")
        for name, value in report.user_properties if report.when == "teardown" else ():
            if name == "figure":
                what, ranks, device, found, bound = value
                limits = ("", "") if bound is None else (f"{bound:.2g}", "yes" if holds(found, bound) else "NO")
                table.add_row(what, str(ranks), device, f"{found:.2g}", *limits)
    text = io.StringIO()
    Console(width=160, file=text).print(table)
    terminalreporter.write_line(f"\n{text.getvalue()}")
