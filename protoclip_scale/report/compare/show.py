"""Tables of compared runs for a terminal, and as files."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
from rich.table import Table

from protoclip_scale.errors import UserError
from protoclip_scale.report.compare.tables import NEEDS
from protoclip_scale.report.plain import DASH


def final_screen(seeds: pd.DataFrame) -> Table:
    """A line for each figure, a column for each group: the mean over its seeds, and their spread."""
    groups = list(dict.fromkeys(seeds["group"]))
    table = Table(title="last evaluation", title_justify="left")
    table.add_column("figure")
    for group in groups:
        table.add_column(group, justify="right")
    for key, rows in seeds.groupby("key", sort=False):
        cells = {row.group: _mean(row.mean, row.spread, row.runs) for row in rows.itertuples(index=False)}
        table.add_row(str(key), *(cells.get(group, DASH) for group in groups))
    return table


def _mean(mean: float, spread: float, runs: int) -> str:
    return f"{mean:.2%}" + (f" ± {100 * spread:.2f} ({runs})" if runs > 1 else "")


def needs_screens(needs: pd.DataFrame, baseline: str) -> Iterator[Table]:
    """For each figure what each run needs to reach the baseline's last score."""
    for key, rows in needs.groupby("key", sort=False):
        table = Table(title=f"to reach {rows['target'].iloc[0]:.2%}, the last {key} of {baseline}", title_justify="left")
        table.add_column("run")
        for name in NEEDS:
            table.add_column(name, justify="right")
        for row in rows.to_dict("records"):
            reached = row["reached"] == row["reached"]
            table.add_row(row["run"], *([f"{row[name]:,.4g} ({row[f'{name}_ratio']:.2f}x)" for name in NEEDS] if reached else ["not reached", *[DASH] * (len(NEEDS) - 1)]))
        yield table


def write_tables(tables: Mapping[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Each as CSV and as parquet. UserError where the folder cannot be written."""
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, frame in tables.items():
            frame.to_csv(folder / f"{name}.csv", index=False)
            frame.to_parquet(folder / f"{name}.parquet", index=False)
            paths += [folder / f"{name}.csv", folder / f"{name}.parquet"]
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error}); choose another folder") from error
    return paths
