"""Results of evaluations as files: JSON with all that is known of them, CSV with the figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json, publish_text


def frame(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row for each figure: model, step, weights, key, value."""
    rows = [(result["model"], result["step"], result["weights"], key, value) for result in results for key, value in result["figures"].items()]
    return pd.DataFrame(rows, columns=["model", "step", "weights", "key", "value"]).astype({"step": "Int64"})


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
