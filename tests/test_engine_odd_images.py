"""Odd and broken pictures in the data: decoded properly or listed in the quarantine, never a crash; the run ends well."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from protoclip_scale.engine import command
from tests.support import CORPUS, RECIPES, TINY, metrics, overrides


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_images() -> dict[str, bytes]:
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    palette = colours.convert("P")
    frames = [colours, colours.rotate(90)]
    return {
        "CMYK": encoded(colours.convert("CMYK"), "JPEG"),
        "16 bit": encoded(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27), "PNG"),
        "palette with transparency": encoded(palette, "PNG", transparency=0),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "20,000 px wide": encoded(Image.new("RGB", (20_000, 3), "red"), "PNG"),
        "truncated": encoded(colours, "JPEG")[:200],
        "zero bytes": b"",
        "text": b"this is no picture",
        "a billion pixels": encoded(Image.new("1", (40_000, 25_000)), "PNG"),
    }


BROKEN = ("truncated", "zero bytes", "text", "a billion pixels")


def test_a_run_over_odd_images(tmp_path):
    table = pq.read_table(CORPUS / "train-00000-of-00010.parquet").slice(0, 256)
    rows, odd = table.to_pylist(), odd_images()
    places = {name: 20 * number + 3 for number, name in enumerate(odd)}
    for name, place in places.items():
        rows[place]["image"]["bytes"] = odd[name]
    rows[200]["caption"] = [""]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "train-0.parquet", row_group_size=32)
    values = (*TINY, f"data.root={tmp_path}", "data.max_bad_fraction=0.05", "schedule.total=2 episodes")
    assert command.main(["--recipe", str(RECIPES / "demo_clip.yaml"), "--run-dir", str(tmp_path / "run"), *overrides(values)]) == 0
    lines = metrics(tmp_path / "run", "train")
    assert [line["step"] for line in lines] == list(range(1, 9)) and all(np.isfinite(line["loss"]) for line in lines)
    listed = [json.loads(line) for line in (tmp_path / "run/quarantine/rank-00000.jsonl").read_text().splitlines()]
    found = {entry["block"] * 32 + entry["row"]: entry["reason"] for entry in listed}
    assert found.keys() == {places[name] for name in BROKEN} | {200}
    assert found[200] == "empty caption" and len(listed) == len(found)  # each once, though two epochs met them
