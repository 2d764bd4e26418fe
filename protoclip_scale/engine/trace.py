"""Which row stood in which step: an Arrow stream per rank and attempt, one flushed batch per step."""

import contextlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from protoclip_scale import collectives
from protoclip_scale.data.rows import unpack_row_ids

SCHEMA = pa.schema([(name, pa.int64()) for name in ("step", "source", "block", "row", "row_id")])


class RowTrace:
    """``trace/rows-<attempt>-<rank>.arrows``; writes nothing when not enabled."""

    def __init__(self, run_dir: Path, attempt: int, enabled: bool):
        self.file = None
        if enabled:
            path = run_dir / "trace" / f"rows-{attempt:04d}-{collectives.rank():04d}.arrows"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "wb")  # noqa: SIM115 (closed by close)
            self.writer = pa.ipc.new_stream(self.file, SCHEMA)

    def close(self) -> None:
        """End the stream; a reader gets what was flushed without that, too."""
        if self.file:
            self.writer.close()
            self.file.close()

    def write(self, step: int, row_ids: np.ndarray) -> None:
        """The rows of a step, flushed."""
        if self.file:
            row_ids = np.asarray(row_ids)
            source, block, row = unpack_row_ids(row_ids)
            columns = [np.full(len(row_ids), step), source, block, row, row_ids]
            self.writer.write_batch(pa.record_batch([pa.array(c, pa.int64()) for c in columns], schema=SCHEMA))
            self.file.flush()


def read_trace(path: Path) -> pa.Table:
    """All rows of a trace; a stream that a kill cut short gives what was flushed."""
    batches = []
    with pa.memory_map(str(path)) as file, contextlib.suppress(pa.ArrowInvalid, OSError):
        for batch in pa.ipc.open_stream(file):
            batches.append(batch)
    return pa.Table.from_batches(batches, SCHEMA)
