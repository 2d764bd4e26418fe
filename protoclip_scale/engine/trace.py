"""Which row stood in which step: an Arrow stream per rank and attempt, one flushed batch per step."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from protoclip_scale import collectives
from protoclip_scale.data.rows import unpack_row_ids

SCHEMA = pa.schema([(name, pa.int64()) for name in ("step", "source", "block", "row", "row_id")])


class RowTrace:
    """``trace/rows-<attempt>-<rank>.arrows``; writes nothing when not enabled. One file per attempt and episode start."""

    def __init__(self, run_dir: Path, attempt: int, enabled: bool):
        self.path = run_dir / "trace" / f"rows-{attempt:04d}-{collectives.rank():04d}.arrows" if enabled else None

    def __enter__(self) -> "RowTrace":
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab")  # noqa: SIM115 (closed in __exit__)
            self.writer = pa.ipc.new_stream(self.file, SCHEMA)
        return self

    def __exit__(self, *_: object) -> None:
        if self.path:
            self.writer.close()
            self.file.close()

    def write(self, step: int, row_ids: np.ndarray) -> None:
        if self.path:
            row_ids = np.asarray(row_ids)
            source, block, row = unpack_row_ids(row_ids)
            columns = [np.full(len(row_ids), step), source, block, row, row_ids]
            self.writer.write_batch(pa.record_batch([pa.array(c, pa.int64()) for c in columns], schema=SCHEMA))
            self.file.flush()


def read_trace(path: Path) -> pa.Table:
    """All rows of a trace; a stream that a kill cut short gives what was flushed."""
    batches = []
    with pa.memory_map(str(path)) as file:
        while file.tell() < file.size():
            try:
                for batch in pa.ipc.open_stream(file):
                    batches.append(batch)
            except (pa.ArrowInvalid, OSError):
                break
    return pa.Table.from_batches(batches, SCHEMA)
