"""Say how far two builds of the corpus agree."""

import io
from collections import Counter

import numpy as np
import pyarrow as pa
from PIL import Image


def agreement(built: dict[str, pa.Table], reference: dict[str, pa.Table]) -> list[str]:
    """Lines for the screen: rows by split and source, then for the rows of one path the share of equal columns and the pixel distance."""
    lines = []
    ours, theirs = _rows(built), _rows(reference)
    counts = [Counter((split, row["source"]) for split, row in rows.values()) for rows in (ours, theirs)]
    for key in sorted(counts[0] | counts[1]):
        lines.append(f"rows {key[0]} {key[1]}: built {counts[0][key]}, reference {counts[1][key]}")
    shared = sorted(ours.keys() & theirs.keys())
    lines.append(f"rows in both: {len(shared)}, only built: {len(ours) - len(shared)}, only reference: {len(theirs) - len(shared)}")
    if not shared:
        return lines
    lines.append(f"same split: {np.mean([ours[path][0] == theirs[path][0] for path in shared]):.2%}")
    for column in ("caption", "label", "coarse", "concept", "style", "license"):
        lines.append(f"same {column}: {np.mean([ours[path][1][column] == theirs[path][1][column] for path in shared]):.2%}")
    lines.append(f"same first caption: {np.mean([ours[path][1]['caption'][0] == theirs[path][1]['caption'][0] for path in shared]):.2%}")
    for source in sorted({ours[path][1]["source"] for path in shared}):
        distances = [_pixel_distance(ours[path][1], theirs[path][1]) for path in shared if ours[path][1]["source"] == source]
        lines.append(f"mean pixel distance (of 255) {source}: mean {np.mean(distances):.2f}, median {np.median(distances):.2f}")
    return lines


def _rows(tables: dict[str, pa.Table]) -> dict[str, tuple[str, dict]]:
    return {row["image"]["path"]: (split, row) for split, table in tables.items() for row in table.to_pylist()}


def _pixel_distance(row: dict, other: dict) -> float:
    pixels = [np.asarray(Image.open(io.BytesIO(one["image"]["bytes"])).convert("RGB"), dtype=np.int16) for one in (row, other)]
    return float(np.abs(pixels[0] - pixels[1]).mean())
