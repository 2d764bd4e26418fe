"""tools/prepare_data.py on a list of real pictures with corrupt files and repeats: exact figures, the same bytes after any kill, and shards that train."""

import contextlib
import errno
import importlib.util
import io
import json
import multiprocessing.forkserver
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from protoclip_scale.data.decode import decode_image
from protoclip_scale.data.sources.reader import BlockReader
from protoclip_scale.preparation import leakage, source_options
from protoclip_scale.preparation import prepare as preparing
from tests import support
from tests.support import CORPUS, ROOT, TINY, metrics, pretrain

NUM_PICTURES, NUM_EXACT, NUM_NEAR, NUM_LEAKED = 270, 15, 6, 2
CORRUPT = {"cut.jpg": "truncated or corrupt", "empty.jpg": "zero bytes", "text.jpg": "not an image"}
EMPTY = 2
NUM_ROWS = NUM_PICTURES + NUM_EXACT + NUM_NEAR + len(CORRUPT) + 1 + EMPTY
SHARDING = ("--rows-per-shard", "64", "--row-group", "20")
EXPECTED = {
    "read": NUM_ROWS,
    "kept": NUM_PICTURES - NUM_LEAKED,
    "undecodable": {"truncated or corrupt": 1, "zero bytes": 1, "not an image": 1, "no image": 1},
    "empty_captions": EMPTY,
    "leaked": NUM_LEAKED,
    "exact_duplicates": NUM_EXACT,
    "near_duplicates": NUM_NEAR,
}


def tool(*arguments: str | Path) -> int:
    """tools/prepare_data.py in this process; its exit code."""
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "tools" / "prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def exit_code(*arguments: str | Path, env: dict[str, str]) -> int:
    """The same in a process of its own, which may be killed."""
    return support._run(_run_tool, 1, env, [(list(map(str, arguments)),)])[0]


def _run_tool(arguments: list[str]) -> None:
    os._exit(tool(*arguments))


def to_jpeg(picture: Image.Image, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """pairs.tsv with 300 rows in a shuffled order, the pictures beside it, and evaluation.parquet with copies of two of them."""
    folder = tmp_path_factory.mktemp("input")
    (folder / "images").mkdir()
    table = pq.read_table(CORPUS / "train-00000-of-00010.parquet", columns=["image", "caption"]).to_pylist()
    picked = [(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), row["caption"][0]) for row in table[:NUM_PICTURES]]
    rows: list[tuple[str, str]] = []

    def add(name: str, data: bytes, caption: str) -> None:
        (folder / "images" / name).write_bytes(data)
        rows.append((f"images/{name}", caption))

    for number, (picture, caption) in enumerate(picked):
        add(f"{number:03d}.jpg", to_jpeg(picture), f"{caption} {number}")
    for number in range(NUM_EXACT):  # the same pixels in another file
        add(f"exact-{number}.jpg", to_jpeg(picked[3 * number][0]) + b"\0", f"{picked[3 * number][1]}  {3 * number}")
    for number in range(100, 100 + NUM_NEAR):  # the same picture, encoded again
        add(f"near-{number}.jpg", to_jpeg(picked[number][0].resize((80, 80)), 80), f"{picked[number][1]} {number}")
    add("cut.jpg", to_jpeg(picked[0][0])[:400], "cut")
    add("empty.jpg", b"", "empty")
    add("text.jpg", b"<html>404</html>", "text")
    rows.append(("images/missing.jpg", "missing"))
    rows += [(f"images/{number:03d}.jpg", caption) for number, caption in zip(range(EMPTY), ("", "\u200b "), strict=True)]
    order = np.random.default_rng(0).permutation(len(rows))
    (folder / "pairs.tsv").write_text("".join(f"{path}\t{text}\n" for path, text in [("filepath", "title"), *(rows[place] for place in order)]), encoding="utf-8")
    leaked = [to_jpeg(picked[number][0].resize((64, 64)), 85) for number in (200, 210)]
    pq.write_table(pa.table({"image": pa.array(leaked, pa.binary()), "label": [1, 2]}), folder / "evaluation.parquet")
    return folder


def arguments(pictures: Path, out: Path, *more: str) -> list[str | Path]:
    return ["--from", pictures / "pairs.tsv", "--out", out, "--deduplicate", "perceptual", "--leakage", pictures / "evaluation.parquet", "--processes", "1", *SHARDING, *more]


@pytest.fixture(scope="module")
def prepared(pictures, tmp_path_factory) -> Path:
    """An uninterrupted preparation."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert tool(*arguments(pictures, out)) == 0
    return out


def results(out: Path) -> dict[str, bytes]:
    """All that must be the same after a kill."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix in (".parquet", ".jsonl")}


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_report_counts_exactly(prepared, pictures):
    report = json.loads((prepared / "report.json").read_text())
    assert report["rows"] == EXPECTED
    assert report["shards"] == -(-NUM_ROWS // 64)
    table = [line.split("\t")[0] for line in (pictures / "pairs.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    assert report["bytes"]["input_images"] == sum((pictures / name).stat().st_size for name in table if (pictures / name).exists())
    assert report["bytes"]["shards"] == sum(path.stat().st_size for path in prepared.glob("*.parquet"))
    bad = lines(prepared / "bad_rows.jsonl")
    assert {Path(row["image"]).name: row["reason"].split(":")[0] for row in bad if row["reason"] != "empty caption"} == CORRUPT | {"missing.jpg": "no image"}
    for row in bad:
        assert row["row"].startswith("pairs.tsv#") and table[int(row["row"].split("#")[1])] == row["image"]
    number_of = {f"images/{number:03d}.jpg": number for number in range(NUM_PICTURES)}
    repeats = lines(prepared / "duplicates.jsonl")
    for repeat in repeats:
        names = [table[int(repeat[key].split("#")[1])] for key in ("row", "of")]
        assert int(repeat["row"].split("#")[1]) > int(repeat["of"].split("#")[1]), "the first in input order stays"
        copy, original = names if names[1] in number_of else reversed(names)
        number = int(copy.split("-")[1].removesuffix(".jpg")) * (3 if "exact" in copy else 1)
        assert number_of[original] == number and repeat["reason"] == ("exact duplicate" if "exact" in copy else "near duplicate")
    leaks = {(table[int(row["row"].split("#")[1])], row["of"].split("/")[-1]) for row in lines(prepared / "leaked.jsonl")}
    assert leaks == {("images/200.jpg", "evaluation.parquet#0"), ("images/210.jpg", "evaluation.parquet#1")}


def test_the_shards_hold_the_rows_in_order(prepared, pictures):
    written = [row for path in sorted(prepared.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    numbers = [int(row["image"]["path"].removeprefix("pairs.tsv#")) for row in written]
    assert numbers == sorted(set(numbers)) and len(numbers) == EXPECTED["kept"]
    table = [line.split("\t") for line in (pictures / "pairs.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    for number, row in zip(numbers, written, strict=True):
        path, title = table[number]
        data = (pictures / path).read_bytes()
        assert row["caption"] == [title] and row["image"]["bytes"] == data, "a small plain JPEG stays as it is"
    groups = [pq.ParquetFile(path).metadata for path in sorted(prepared.glob("*.parquet"))]
    assert all(meta.row_group(number).num_rows == 20 for meta in groups for number in range(meta.num_row_groups - 1))


def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(pictures, prepared, tmp_path):
    out = tmp_path / "out"
    kills = ["prepare.row_group:2", "prepare.written:1", "prepare.shard:2", "prepare.written:2", "prepare.decided:1", "prepare.written:1", "prepare.finished:2"]
    for event in kills:
        before = sorted(path.name for path in out.rglob("shard-*.parquet"))
        assert exit_code(*arguments(pictures, out), env={"PROTOCLIP_KILL_AT": event}) == -9, event
        assert not (out / "report.json").exists()
        assert len({path.name for path in out.rglob("shard-*.parquet")}) >= len(set(before)), "nothing published is lost"
    assert tool(*arguments(pictures, out)) == 0
    assert results(out) == results(prepared)
    assert json.loads((out / "report.json").read_text())["rows"] == EXPECTED
    assert not list(out.rglob("*.writing")) and not (out / "preparation" / "shards").exists()


def test_two_processes_make_what_one_makes(pictures, prepared, tmp_path):
    multiprocessing.forkserver.ensure_running()  # with what tests.support preloads
    assert tool(*arguments(pictures, tmp_path / "out", "--processes", "2")) == 0
    assert results(tmp_path / "out") == results(prepared)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows"] == EXPECTED and report["processes"] == 2


@support.needs_small_disk
def test_a_full_disk_is_one_line_and_what_was_done_stays(pictures, prepared, tmp_path):
    disk = tmp_path / "disk"
    assert support._run(_fill_and_go_on, 1, {}, [(str(disk), [*map(str, arguments(pictures, disk / "out"))], str(tmp_path / "kept"))])[0] == 0
    errors = [line for line in (tmp_path / "kept.log").read_text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "disk full while writing" in errors[0] and "goes on" in errors[0]
    assert results(tmp_path / "kept") == results(prepared)


def _fill_and_go_on(disk: str, command: list[str], copy: str) -> None:
    support.mount_small_disk(Path(disk), 1 << 20)
    ballast = Path(disk) / "ballast"
    ballast.write_bytes(b"\0" * (850 << 10))
    preparing._check_space = lambda job, rows: None  # another program fills the disk in the meantime
    with Path(f"{copy}.log").open("w") as log, contextlib.redirect_stderr(log):
        assert tool(*command) == 1
    published = [path.name for path in (Path(disk) / "out").rglob("shard-*.parquet")]
    assert 0 < len(published) < 5, published
    ballast.unlink()
    assert tool(*command) == 0
    shutil.copytree(Path(disk) / "out", copy)


def test_the_output_trains(prepared, tmp_path):
    values = (*TINY, "data.plan={seed: 0, episode_size: 128, lanes: 2, global_batch: 32}", "schedule.total=6 steps", f"data.root={prepared}", "data.sources=[{files: '*.parquet'}]")
    assert pretrain(tmp_path / "run", "demo_clip.yaml", values) == [0], support.output(tmp_path / "run")
    losses = [line["loss"] for line in metrics(tmp_path / "run", "train")]
    assert len(losses) == 6 and np.isfinite(losses).all()


def test_a_finished_preparation_is_left_alone_and_reported_again(prepared, pictures, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.glob("*.parquet")}
    assert tool(*arguments(pictures, prepared)) == 0
    assert {path: path.stat().st_mtime_ns for path in prepared.glob("*.parquet")} == before
    shown = capsys.readouterr().out
    assert f"read {NUM_ROWS} 100.00%" in " ".join(shown.replace("│", " ").split()) and f"root: {prepared}" in shown


def test_other_settings_or_input_are_refused(pictures, prepared, tmp_path, capsys):
    assert tool(*arguments(pictures, prepared, "--quality", "80")) == 1
    assert "images.quality 90 -> 80" in said(capsys)
    assert tool(*arguments(pictures, prepared, "--limit", "7")) == 1
    assert "limit None -> 7" in said(capsys)
    changed = tmp_path / "input"
    shutil.copytree(pictures, changed)
    with (changed / "pairs.tsv").open("a") as table:
        table.write("images/000.jpg\tone more\n")
    assert tool(*arguments(changed, prepared)) == 1
    assert f"pairs.tsv ({NUM_ROWS} -> {NUM_ROWS + 1})" in said(capsys)
    pq.write_table(pq.read_table(pictures / "evaluation.parquet").slice(1), changed / "evaluation.parquet")
    assert tool(*["--from", pictures / "pairs.tsv", *arguments(changed, prepared)[2:]]) == 1
    assert "--leakage" in said(capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--from", "{here}/absent.tsv", "--out", "{out}"), "no files match"),
        (("--from", "{here}/pairs.tsv", "--out", "{out}", "--caption-column", "text"), "no column 'text'"),
        (("--from", "{here}/pairs.tsv", "--out", "{here}"), "lies in the input"),
        (("--from", "{here}/pairs.tsv", "--out", "{here}/images"), "is no part of a preparation"),
        (("--from", "{here}/pairs.tsv", "--out", "{here}/pairs.tsv"), "lies in the input"),
        (("--from", "{here}/evaluation.parquet", "--out", "{out}", "--caption-column", "label"), "must hold a string"),
        (("--from", "{here}/pairs.tsv", "--out", "{out}", "--leakage", "{here}/evaluation.parquet", "--leakage-column", "label"), "must hold encoded images"),
        (("--from", "{here}/pairs.tsv", "--out", "{out}", "--deduplicate", "perceptual", "--radius", "20"), "--radius 20"),
        (("--from", "{here}/pairs.tsv", "--out", "{out}", "--extra", "image"), "image"),
        (("--from", "{here}/pairs.tsv", "--out", "{out}", "--radius", "3"), "--radius has no effect without --deduplicate perceptual or --leakage"),
        (("--from", "{here}/pairs.tsv", "--out", "{out}", "--deduplicate-by", "pair"), "--deduplicate-by has no effect without --deduplicate"),
        (("--from", "{here}/pairs.tsv", "--out", "{out}", "--leakage-column", "x"), "--leakage-column has no effect without --leakage"),
        (("--from", "{here}/pairs.tsv", "--out", "{out}", "--max-bytes", "-5"), "--max-bytes -5: must be at least 1"),
        (("--from", "{here}/pairs.tsv", "--out", "{out}", "--max-pixels", "0"), "--max-pixels 0: must be at least 1"),
        (("--from", "{here}/pairs.tsv", "--out", "{out}", "--retry-seconds", "-1"), "--retry-seconds -1: must be at least 0"),
        (("--hub", "a/b", "--out", "{out}", "--image-root", "x"), "--hub a/b"),
        (("--recipe", "recipes/demo_clip.yaml", "--source", "other", "--out", "{out}"), "demo_corpus"),
        (("--recipe", "recipes/demo_clip.yaml", "--set", "data.sources.0.rows=5", "--out", "{out}"), "rows has no effect"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_touches_nothing(pictures, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(ROOT)
    before = sorted(pictures.rglob("*"))
    assert tool(*(text.format(here=pictures, out=tmp_path / "out") for text in more)) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], errors
    assert sorted(pictures.rglob("*")) == before and not list(tmp_path.rglob("*.parquet"))


def test_too_little_space_is_said_before_anything_is_read(pictures, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    assert tool(*arguments(pictures, tmp_path / "out")) == 1
    assert "disk full: 297 rows need about" in said(capsys)


def test_two_commands_do_not_share_a_folder(pictures, tmp_path, capsys):
    with preparing._only_user_of(tmp_path / "out"):
        assert tool(*arguments(pictures, tmp_path / "out")) == 1
    assert "another command is preparing" in said(capsys)


def test_a_recipe_with_extra_columns_and_larger_images(tmp_path, capsys):
    """The demo corpus as a recipe names it: made smaller, as WebP, labels kept, only some rows, no second pass."""
    out = tmp_path / "out"
    override = "data.sources=[{files: train-00003*.parquet, columns: {caption: [concept, caption], extra: [label, caption_list]}}]"
    assert tool("--recipe", ROOT / "recipes/demo_clip.yaml", "--set", override, "--out", out) == 1
    assert "no column 'caption_list'" in said(capsys)
    override = override.replace(", caption_list", "")
    common = ("--recipe", ROOT / "recipes/demo_clip.yaml", "--set", override, "--out", out, "--short-side", "48", "--format", "webp", "--limit", "150", "--rows-per-shard", "100")
    assert tool(*common) == 0
    written = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    rows = pq.read_table(CORPUS / "train-00003-of-00010.parquet").slice(0, 150).to_pylist()
    assert [row["label"] for row in written] == [row["label"] for row in rows]
    assert [row["caption"] for row in written] == [[row["concept"], *row["caption"]] for row in rows]
    assert all(decode_image(row["image"]["bytes"]).shape == (3, 48, 48) for row in written)
    assert "extra:\n      - label" in json.loads((out / "report.json").read_text())["recipe"]


@pytest.mark.parametrize("layout", ["folder", "tar", "jsonl"])
def test_other_layouts_give_the_same_rows_and_name_their_bad_files(pictures, prepared, tmp_path, layout):
    """A hundred rows of the list as a folder with .txt files, as a tar shard, as JSON lines."""
    rows = [line.split("\t") for line in (pictures / "pairs.tsv").read_text(encoding="utf-8").splitlines()[1:101]]
    rows = [(name, text, (pictures / name).read_bytes()) for name, text in rows if (pictures / name).exists()]
    source = tmp_path / layout
    source.mkdir()
    names = [f"{number:03d}.jpg" for number in range(len(rows))]
    files = [(name, data) for name, (_, _, data) in zip(names, rows, strict=True)]
    files += [(name.replace("jpg", "txt"), text.encode()) for name, (_, text, _) in zip(names, rows, strict=True)]
    for name, data in files:
        (source / name).write_bytes(data)
    if layout == "jsonl":
        (source / "list.jsonl").write_text("".join(json.dumps({"image": name, "caption": [text]}) + "\n" for name, (_, text, _) in zip(names, rows, strict=True)))
    if layout == "tar":
        with tarfile.open(source / "shard-000.tar", "w") as tar:
            for name, _ in sorted(files):
                tar.add(source / name, name)
    place = {"folder": source, "tar": source, "jsonl": source / "list.jsonl"}[layout]
    assert tool("--from", place, "--out", tmp_path / "out", "--processes", "1") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    good = [row for row in rows if row[1].strip() and Path(row[0]).name not in CORRUPT and "\u200b" not in row[1]]
    assert report["rows"]["kept"] == len(good) < report["rows"]["read"] == len(rows)
    written = pq.read_table(tmp_path / "out" / "shard-00000.parquet").to_pylist()
    assert [(row["caption"], row["image"]["bytes"]) for row in written] == [([text], data) for _, text, data in good]
    bad = lines(tmp_path / "out" / "bad_rows.jsonl")
    expected = [name for name, row in zip(names, rows, strict=True) if row not in good]
    assert [row.get("image") for row in bad] == ([None] * len(bad) if layout == "tar" else expected) and len(bad) == len(expected)


def test_evaluation_images_that_cannot_be_decoded_are_told(pictures, tmp_path, capsys, monkeypatch):
    images = pq.read_table(pictures / "evaluation.parquet")["image"].to_pylist()
    pq.write_table(pa.table({"image": pa.array([images[0], b"none", b""], pa.binary())}), tmp_path / "some.parquet")
    pq.write_table(pa.table({"image": pa.array([b"none"], pa.binary())}), tmp_path / "none.parquet")
    command = ("--from", pictures / "pairs.tsv", "--out", tmp_path / "out", "--limit", "12", "--processes", "1", "--leakage", tmp_path / "some.parquet")
    read, failed = leakage._images, []

    def failing_once(place, column):
        for number, image in enumerate(read(place, column)):
            if number == 1 and not failed:
                failed.append(place)
                raise OSError(errno.EIO, "the network is gone")
            yield image

    monkeypatch.setattr(leakage, "_images", failing_once)
    assert tool(*command) == 0 and failed
    assert [(file["rows"], file["undecodable"]) for file in json.loads((tmp_path / "out" / "report.json").read_text())["leakage"]] == [(3, 2)]
    line = "some.parquet: 2 of 3 evaluation images cannot be decoded"
    assert line in capsys.readouterr().out
    assert tool(*command) == 0 and line in capsys.readouterr().out, "it is known without hashing them again"
    command = ("--from", pictures / "pairs.tsv", "--out", tmp_path / "other", "--limit", "12", "--processes", "1", "--leakage", tmp_path / "none.parquet")
    assert tool(*command) == 1
    assert "none of its 1 images in column 'image' can be decoded" in said(capsys)


def test_nothing_kept_is_an_error_and_ctrl_c_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "list.tsv").write_text("filepath\ttitle\nabsent.jpg\ta\n")
    assert tool("--from", tmp_path / "list.tsv", "--out", tmp_path / "out", "--processes", "1") == 1
    assert "none of 1 rows was kept (undecodable: no image 1)" in said(capsys)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockReader, "__init__", interrupted)
    assert tool("--from", tmp_path / "list.tsv", "--out", tmp_path / "out") == 130
    assert said(capsys).startswith("stopped")


def test_the_metadata_of_a_folder_of_images_is_no_shard(tmp_path):
    (tmp_path / "metadata.parquet").write_bytes(b"")
    assert source_options._folder_format([str(tmp_path)]) == "folder"
    (tmp_path / "train-0.parquet").write_bytes(b"")
    assert source_options._folder_format([str(tmp_path)]) == "parquet"
