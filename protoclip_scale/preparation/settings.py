"""What a preparation is asked to do, and whether a folder that is there already was made by asking the same."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from protoclip_scale.data.decode import Limits
from protoclip_scale.data.sources import fingerprint
from protoclip_scale.data.sources.reader import BlockReader
from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json
from protoclip_scale.preparation.duplicates import MAX_RADIUS
from protoclip_scale.preparation.images import ENCODERS, ImageSettings

DEDUPLICATE = ("none", "exact", "perceptual")
DEDUPLICATE_BY = ("pair", "image")
EMPTY_CAPTION = ("drop", "keep")
VERSION = 1  # raised when the same settings would give other bytes


@dataclass(frozen=True)
class Settings:
    """All that bears on the bytes of the shards, beside the input. radius: bits of 64 in which two perceptual hashes of one image may differ."""

    images: ImageSettings = ImageSettings()
    rows_per_shard: int = 10_000
    row_group_rows: int = 500
    deduplicate: str = "none"
    deduplicate_by: str = "pair"
    radius: int = 4
    leakage: tuple[str, ...] = ()
    leakage_column: str = "image"
    empty_caption: str = "drop"
    limit: int | None = None
    limits: Limits = Limits()

    def __post_init__(self):
        if not 0 <= self.radius <= MAX_RADIUS:
            raise UserError(f"--radius {self.radius}: from 0 (only equal hashes) to {MAX_RADIUS} of 64 bits")
        if not 1 <= self.images.quality <= 100:
            raise UserError(f"--quality {self.images.quality}: from 1 to 100")
        for name, value in (("--short-side", self.images.short_side), ("--rows-per-shard", self.rows_per_shard), ("--row-group", self.row_group_rows), ("--limit", self.limit), ("--max-pixels", self.limits.max_pixels), ("--max-bytes", self.limits.max_bytes)):
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: must be at least 1")
        assert self.deduplicate in DEDUPLICATE and self.deduplicate_by in DEDUPLICATE_BY and self.empty_caption in EMPTY_CAPTION
        assert self.images.format in ENCODERS

    @property
    def drops_afterwards(self) -> bool:
        """Whether a row may be dropped because of other rows: then all are hashed first, and dropped in a second pass."""
        return self.deduplicate != "none" or bool(self.leakage)

    @property
    def needs_perceptual_hash(self) -> bool:
        return self.deduplicate == "perceptual" or bool(self.leakage)

    def facts(self) -> dict[str, Any]:
        """As JSON has them, without what has no effect."""
        facts = asdict(self) | {"images": self.images._asdict(), "limits": self.limits._asdict()}
        unused = {"leakage"} | ({"leakage_column"} if not self.leakage else set())  # which files they are, their content says
        unused |= {"radius"} if not self.needs_perceptual_hash else set()
        unused |= {"deduplicate_by"} if self.deduplicate == "none" else set()
        return {name: value for name, value in facts.items() if name not in unused}


def claim_folder(out: Path, settings: Settings, readers: list[BlockReader], leakage: list[dict[str, Any]]) -> None:
    """Note in OUT/preparation/settings.json what the folder is for. UserError if it says that the folder is for other input or settings.

    leakage: facts about the evaluation files.
    """
    path = out / "preparation" / "settings.json"
    facts = {
        "version": VERSION,
        "settings": settings.facts(),
        "sources": [fingerprint.describe(reader) | {"extra": {name: str(kind) for name, kind in reader.extra_types.items()}} for reader in readers],
        "leakage": leakage,
    }
    facts = json.loads(json.dumps(facts))
    if path.exists():
        _compare(out, json.loads(path.read_text(encoding="utf-8")), facts)
    else:
        publish_json(path, facts)


def refuse_foreign(out: Path) -> None:
    """UserError if there is something at ``out`` that is no preparation. Touches nothing."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    others = sorted(entry.name for entry in out.iterdir() if entry.name != "preparation") if out.exists() else []
    if others and not (out / "preparation" / "settings.json").exists():
        raise UserError(f"--out {out} holds {others[0]}{' and more' if len(others) > 1 else ''}, which is no part of a preparation; choose another folder, or empty it")


def _compare(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    remedy = "give the same again to go on with it, or choose another --out"
    if "version" not in before or "settings" not in before:
        raise UserError(f"{out} holds shards of another tool; choose another --out")
    if before["version"] != now["version"]:
        raise UserError(f"{out} was begun by another version of this tool; choose another --out")
    old, new = _flat(before["settings"]), _flat(now["settings"])
    changed = [f"{name} {old.get(name)} -> {new.get(name)}" for name in old | new if old.get(name) != new.get(name)]
    if changed:
        raise UserError(f"{out} holds a preparation with other settings: {', '.join(changed)}; {remedy}")
    if len(before["sources"]) != len(now["sources"]):
        raise UserError(f"{out} holds a preparation of {len(before['sources'])} sources, not {len(now['sources'])}; {remedy}")
    for source, other in zip(before["sources"], now["sources"], strict=True):
        if difference := fingerprint.difference(source, other):
            raise UserError(f"{out} holds a preparation of other input, {source['name']}: {difference}; {remedy}")
        if source["extra"] != other["extra"]:
            raise UserError(f"{out} holds a preparation with the extra columns {source['extra']}, not {other['extra']}; {remedy}")
    if before["leakage"] != now["leakage"]:
        raise UserError(f"{out} holds a preparation with other --leakage files, or they have changed; {remedy}")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
