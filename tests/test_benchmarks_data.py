"""benchmarks/data.py: what it compares does the same work, and its last line holds the figures of its tables."""

import json
import math
import runpy
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from protoclip_scale.data.headers import read_header
from tests.support import CORPUS, RECIPES, ROOT


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return runpy.run_path(str(ROOT / "benchmarks" / "data.py"))


def last_line(capsys) -> tuple[dict, str]:
    output = capsys.readouterr().out
    return json.loads(output.splitlines()[-1]), output


def test_the_comparison_prints_its_table_and_the_same_figures(benchmark, capsys):
    threads = torch.get_num_threads()
    assert benchmark["main"](["--images", "64", "--rounds", "1", "--size", "32", "--augmentations", "clip"]) == 0
    figures, output = last_line(capsys)
    names = ["demo_corpus, clip", "photo-like 256 px, clip"]
    assert list(figures["images_per_second_and_core"]) == names
    for rates in figures["images_per_second_and_core"].values():
        ways = ("", " + tokens")
        assert set(rates) == {f"{who}{way}" for way in ways for who in ("ours", "PIL", "webdataset, PIL", "webdataset, ours")} | {"ours, loader + tokens"}
        assert all(rate > 0 and f"{rate:,.0f}" in output for rate in rates.values())
    assert figures["normalise_ms_per_image"]["cpu"] > 0
    assert torch.get_num_threads() == threads


def test_all_contestants_make_batches_of_the_same_rows(benchmark, tmp_path):
    from data_parts import contestants, pictures

    rows = pictures.from_corpus(CORPUS, 128)
    for augmentation, make in contestants.PILLOW.items():
        assert make(24)(contestants.Image.new("RGB", (40, 30))).shape == (3, 24, 24)
        assert contestants.ours(augmentation, 24).image(rows.images[0]).shape == (3, 24, 24)
    plain = contestants.Way(lambda data: torch.tensor(list(data[:100])), torch.stack, lambda texts: None)  # bytes themselves, no random crop
    contestants.from_spool(rows, tmp_path, "clip", 24)
    pictures.write_tar(rows, tmp_path / "rows.tar")
    memory = torch.cat(list(contestants.from_memory(rows, plain, True)))
    assert len(memory) == 128
    assert torch.equal(memory, torch.cat(list(contestants.from_tar(tmp_path / "rows.tar", rows.suffix, plain, True))))
    for batches in contestants.contestants(rows, tmp_path / "all", "clip", 24).values():
        images = list(batches())
        assert [len(each) for each in images] == [64, 64] and images[0].shape[1:] == (3, 24, 24)


def test_the_photo_like_pictures_are_a_function_of_the_seed_and_cost_what_photographs_do(benchmark):
    from data_parts import pictures

    images = pictures.like_photographs(12).images
    assert images == pictures.like_photographs(12).images
    headers = [read_header(image) for image in images]
    assert all(header.plain and header.kind == "jpeg" and {header.width, header.height} == {256, 341} for header in headers)
    assert 25_000 < sum(map(len, images)) / len(images) < 32_000


def test_a_recipes_own_data_is_measured(benchmark, capsys, tmp_path):
    shutil.copy(sorted(CORPUS.glob("train-*.parquet"))[0], tmp_path / "rows.parquet")
    sources = "data.sources=[{name: one, files: rows.parquet, weight: 3}, {name: other, files: '*.parquet', weight: 1}]"
    chosen = ["--recipe", str(RECIPES / "demo_clip.yaml"), "--set", sources, "--set", f"data.root={tmp_path}", "--blocks", "2", "--feed", "100", "1e5"]
    assert benchmark["main"](chosen) == 0
    figures, output = last_line(capsys)
    assert {name: source["share"] for name, source in figures["sources"].items()} == {"one": 0.75, "other": 0.25}
    for source in figures["sources"].values():
        assert (source["blocks_read"], source["rows_read"], source["bad_rows"]) == (2, 128, 0)
        assert source["MB_per_second"] > 0 and f"{source['MB_per_second']:,.1f}" in output
    rates = figures["rows_per_second"]
    per_core = rates["all work, one core"]
    parts = ("decoding", "augmentation", "captions and tokens")
    assert math.isclose(1 / per_core, sum(1 / rates[f"{part}, one core"] for part in parts))
    assert figures["limit"] in ("reading", *parts) and f"{figures['limit']} limits it" in output
    assert figures["workers_to_feed"] == {"100": math.ceil(100 / per_core), "100000": math.ceil(1e5 / per_core)}


def test_what_is_wrong_is_one_line(benchmark, capsys, tmp_path):
    assert benchmark["main"](["--corpus", str(tmp_path / "nothing.parquet"), "--images", "64"]) == 1
    assert benchmark["main"](["--recipe", str(tmp_path / "nothing.yaml")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "--corpus" in errors[0] and "nothing.yaml" in errors[1]
    for option in (["--set", "a=1"], ["--blocks", "4"], ["--feed", "250"]):
        assert benchmark["main"](option) == 1
        assert capsys.readouterr().err == f"error: {option[0]} has no effect without --recipe; leave it out\n"


def test_rows_that_cannot_be_used_count_for_no_time_and_none_at_all_is_one_line(benchmark, capsys, tmp_path, monkeypatch):
    rows = pq.read_table(sorted(CORPUS.glob("train-*.parquet"))[0]).slice(0, 4).to_pylist()
    bad = [{**row, "image": {"bytes": b"none", "path": ""}} for row in rows]
    chosen = ["--recipe", str(RECIPES / "demo_clip.yaml"), "--set", "data.sources=[{files: rows.parquet}]", "--set", f"data.root={tmp_path}"]
    pq.write_table(pa.Table.from_pylist(bad), tmp_path / "rows.parquet")
    assert benchmark["main"](chosen) == 1
    error = capsys.readouterr().err
    assert "none of the 4 rows that were read has an image that can be used" in error and error.count("\n") == 1
    pq.write_table(pa.Table.from_pylist(rows + 3 * bad), tmp_path / "rows.parquet")
    from data_parts import own_data

    monkeypatch.setattr(own_data, "_work", lambda recipe, rows: (dict.fromkeys(own_data.WORK, 4.0), 12))
    assert benchmark["main"](chosen) == 0
    (source,) = last_line(capsys)[0]["sources"].values()
    assert source["seconds_per_row"]["decoding"] == 1.0 and (source["rows_worked_on"], source["bad_rows"]) == (16, 12)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(own_data, "measure", interrupted)
    assert benchmark["main"](chosen) == 130 and capsys.readouterr().err == "stopped\n"
