"""Results of evaluations as files: JSON with all that is known of them, CSV with the figures."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pandas as pd

from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json, publish_text


def frame(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row for each figure: model, step, weights, key, value."""
    rows = [(result["model"], result["step"], result["weights"], key, value) for result in results for key, value in result["figures"].items()]
    return pd.DataFrame(rows, columns=["model", "step", "weights", "key", "value"]).astype({"step": "Int64"})


def check_places(json_path: str | None, csv_path: str | None) -> None:
    """UserError if a result could not be written, before the time for it is spent. Makes the folders."""
    for option, path in (("--out", json_path), ("--csv", csv_path)):
        if path:
            _write(option, path, lambda place=Path(path): _try(place))


def _try(place: Path) -> None:
    if place.is_dir():
        raise IsADirectoryError(f"{place} is a folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=place.parent):
        pass


def write_csv(path: str, results: Sequence[dict[str, Any]]) -> None:
    """``frame`` as CSV. UserError if it cannot be written."""
    _write("--csv", path, lambda: publish_text(Path(path), frame(results).to_csv(index=False)))


def write_json(path: str, value: Any) -> None:
    """UserError if it cannot be written."""
    _write("--out", path, lambda: publish_json(Path(path), value))


def _write(option: str, path: str, write: Any) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error}); choose another file") from error
