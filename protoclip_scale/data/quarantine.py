"""The list of rows that could not be used: one JSON object a line, one file per rank, each row once per file."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


def _lines(file: Path) -> Iterator[dict]:
    for line in file.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the last line of a killed process
            continue


def read_quarantine(folder: str | Path) -> dict[int, dict]:
    """Row id -> {row_id, file, block, row, reason}, of all files in a folder; a row that two ranks listed counts once."""
    return {entry["row_id"]: entry for file in sorted(Path(folder).glob("*.jsonl")) for entry in _lines(file)}


def summary(entries: dict[int, dict]) -> str:
    """How many rows and why, the commonest reason first: '9 rows (6 truncated or corrupt, 3 zero bytes)'."""
    reasons = Counter(_kind(entry["reason"]) for entry in entries.values())
    return f"{len(entries):,} row{'' if len(entries) == 1 else 's'} ({', '.join(f'{count:,} {reason}' for reason, count in reasons.most_common())})"


class Quarantine:
    """One rank's file, created with its first row: for instance RUN/quarantine/rank-00003.jsonl."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        entries = list(_lines(self.path)) if self.path.exists() else []
        self._torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"\n", b"")  # by a kill
        self._row_ids = {entry["row_id"] for entry in entries}
        self.reasons = Counter(_kind(entry["reason"]) for entry in entries)

    def __len__(self) -> int:
        return len(self._row_ids)

    def __contains__(self, row_id: int) -> bool:
        return int(row_id) in self._row_ids

    def record(self, row_id: int, source_file: str, block: int, row: int, reason: str) -> bool:
        """Appends the row unless this file lists it; True if it did."""
        if int(row_id) in self._row_ids:
            return False
        self._row_ids.add(int(row_id))
        self.reasons[_kind(reason)] += 1
        entry = {"row_id": int(row_id), "file": source_file, "block": int(block), "row": int(row), "reason": reason}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._torn else "") + json.dumps(entry) + "\n")
        self._torn = False
        return True


def _kind(reason: str) -> str:
    return reason.split(":")[0]
