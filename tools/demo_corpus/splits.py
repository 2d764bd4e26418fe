"""Deal rows to the splits: from lists of names that lie beside this module, or anew by a hash of the names."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from protoclip_scale.errors import UserError

LISTS = Path(__file__).parent / "lists"
UNSEEN_SHARE = 0.10
VAL_SHARE = 0.02
EVALUATION_SOURCE = "twemoji"


@dataclass(frozen=True)
class Splits:
    """Names of the emoji concepts kept out of all training art, of those for val, and the clip-art paths for train and val."""

    unseen_concepts: frozenset[str]
    val_concepts: frozenset[str]
    clip_art_train: frozenset[str]
    clip_art_val: frozenset[str]

    def split_of(self, row: dict) -> str | None:
        """The split of a row; None when the row is left out (an unseen concept drawn by a training vendor)."""
        if row["source"] == "openclipart":
            path = row["image"]["path"].removeprefix("openclipart/").removesuffix(".webp")
            return "val" if path in self.clip_art_val else "train"
        unseen = row["concept"] in self.unseen_concepts
        if row["source"] == EVALUATION_SOURCE:
            return "eval_unseen_concept" if unseen else "eval_seen_concept"
        if unseen:
            return None
        return "val" if row["concept"] in self.val_concepts else "train"


def listed_splits(folder: Path = LISTS) -> Splits:
    """The splits of the corpus that ships: one name a line in four text files."""
    return Splits(*(frozenset(read_list(folder / f"{name}.txt")) for name in Splits.__dataclass_fields__))


def hashed_splits(concepts: Iterable[str], clip_art_paths: Iterable[str], seed: int) -> Splits:
    """Splits by a keyed hash: 10% of the concepts unseen, 2% of the other concepts and of the clip art for val."""
    unseen, seen = _cut(concepts, UNSEEN_SHARE, f"{seed}/unseen")
    val, _ = _cut(seen, VAL_SHARE, f"{seed}/val")
    clip_art_val, clip_art_train = _cut(clip_art_paths, VAL_SHARE, f"{seed}/clip art")
    return Splits(unseen, val, clip_art_train, clip_art_val)


def read_list(path: Path) -> list[str]:
    """The lines of a text file. UserError when it is missing or has none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; it must hold one name a line")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    if not lines:
        raise UserError(f"{path}: empty; it must hold one name a line")
    return lines


def _cut(names: Iterable[str], share: float, key: str) -> tuple[frozenset[str], frozenset[str]]:
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(f"{key}/{name}".encode()).digest())
    cut = round(share * len(ordered))
    return frozenset(ordered[:cut]), frozenset(ordered[cut:])
