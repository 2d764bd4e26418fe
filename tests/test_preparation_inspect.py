"""tools/inspect_data.py: what it counts, what it draws, and that the views it shows are those that training makes."""

import importlib.util
import io
import json
import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from protoclip_scale.data.batches import EpisodeBatches
from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan
from protoclip_scale.data.spool import Spool
from protoclip_scale.data.text_augmentation import text_augmentation
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.preparation.inspect_rows import Look, inspect
from protoclip_scale.recipe import schema
from tests.support import CORPUS, RECIPES, ROOT

SIZE = 32


@pytest.fixture(scope="module")
def tool():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("inspect_data", ROOT / "tools" / "inspect_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def encoded(width, height, mode="RGB", kind="PNG", seed=0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    (image if mode == "RGBA" else image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def odd_rows(tmp_path_factory):
    """Pictures of several formats and sizes, two of them equal; three that cannot be decoded; captions in another script, many and none."""
    photo = encoded(300, 200, kind="JPEG")
    images = [photo, encoded(200, 100, "RGBA"), encoded(64, 64, "CMYK", "JPEG"), encoded(50, 80, "I;16"), photo, photo[:-90], photo[:-60], b""]
    captions = [["a <b>photo</b> & more"], ["猫の写真"], ["one", "two", "three", "four", "five", "six"], [], ["a tall picture"], ["cut"], ["cut"], ["nothing"]]
    path = tmp_path_factory.mktemp("odd") / "odd.parquet"
    struct = pa.array([{"bytes": image, "path": None} for image in images], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": struct, "caption": pa.array(captions, pa.list_(pa.string()))}), path, row_group_size=3)
    return path


def test_statistics_are_counted_right_and_printed_as_json(tool, odd_rows, capsys):
    assert tool.main(["--from", str(odd_rows), "--json"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert (source["files"], source["blocks"], source["rows"], source["sampled"]) == (1, 3, 8, 8)
    assert source["kinds"] == {"JPEG RGB": 4, "PNG RGBA": 1, "JPEG CMYK": 1, "PNG I;16": 1, "not known": 1}
    assert source["width"] == {"least": 50, "percentile_5": 50, "median": 200, "percentile_95": 300, "most": 300}
    assert source["shorter_side"]["least"] == 50 and source["aspect"]["most"] == 2
    assert source["fast_share"] == 2 / 5 and source["repeated_images"] == 1
    assert sum(source["undecodable"].values()) == 3 and source["undecodable"]["zero bytes"] == 1
    (cut,) = (reason for reason in source["undecodable"] if "truncated" in reason)
    assert source["undecodable"][cut] == 2 and re.search(r"odd\.parquet row [56]$", source["examples"][cut])
    captions = source["captions"]
    assert captions["empty_share"] == 1 / 8 and captions["captions_per_row"]["maximum"] == 6 and captions["repeated"] == [["cut", 2]]


def test_the_sheets_show_every_row_or_why_it_cannot_be_used(tool, odd_rows, tmp_path, capsys):
    out = [tmp_path / "sheet.html", tmp_path / "new" / "sheet.png"]
    arguments = ["--augmentations", "slip", "slip_ssl", "--texts", "eda", "--masked", "--draws", "3", "--size", str(SIZE), "--out", *map(str, out)]
    assert tool.main(["--from", str(odd_rows), *arguments]) == 0
    printed = capsys.readouterr().out
    assert str(out[0]) in printed and "undecodable" in printed and "37.5" in printed
    page = out[0].read_text(encoding="utf-8")
    assert page.count("class='box row'") == 8 and page.count("cannot be used") == 3
    assert page.count("data:image/webp;base64") == 5 * (1 + 1 + 3 * 3)  # original, evaluation, and three draws of clip, slip and slip_ssl
    assert "猫の写真" in page and "a &lt;b&gt;photo&lt;/b&gt; &amp; more" in page and "<b>photo" not in page
    assert "src='http" not in page and "href" not in page
    for label in ("eda, epoch 2", "masked, epoch 0", "zero bytes", "not known", "(no caption)"):
        assert label in page, label
    with Image.open(out[1]) as sheet:
        assert sheet.width > 1500 and sheet.height > 8 * 180
        assert len(sheet.convert("RGB").getcolors(1 << 24)) > 500
    assert sorted(path.name for path in out[1].parent.iterdir()) == ["sheet.png"]


def test_the_views_are_those_that_training_makes(tmp_path):
    plan = {"seed": 7, "episode_size": 448, "lanes": 1, "global_batch": 16}
    sources = [{"files": "val-*.parquet"}, {"files": "train-00000-*.parquet"}]
    data = schema.Data(root=str(CORPUS), sources=sources, plan=plan, augmentation="protoclip_light", text_augmentation="eda", caption="random")
    tokenizer = tokenizer_for(schema.TextTower(context_length=16), mask=True)
    readers = open_readers(data)
    episode = Plan(index_of(readers), data.plan).episode(0)
    spool = Spool(tmp_path, "run")
    spool.fill(episode, 0, range(1), readers)
    batch = EpisodeBatches(data, SIZE, tokenizer, episode, spool, [0], seed=data.plan.seed)[0]
    trained = {}
    for image, ids, length in zip(batch.images, batch.token_ids, batch.token_lengths, strict=True):
        trained[image.numpy().tobytes()] = tokenizer.decode(ids[:length].tolist())
    for label in (None, data.sources[1].label):  # a source keeps its number when it is looked at alone
        look = Look(size=SIZE, draws=1, rows=1000, sample=1000, augmentations=("slip",), masked=True, source=label)
        found = inspect(data, look, tokenizer)
        assert [(column.title, column.epoch) for column in found.columns] == [("evaluation", None), ("protoclip_light", 0), ("slip", 0)]
        shown = {np.asarray(row.pictures[1]).transpose(2, 0, 1).tobytes(): dict(row.texts)["eda, epoch 0"] for row in found.rows}
        assert len(found.statistics) == (1 if label else 2)
        same = trained.keys() & shown.keys()
        assert len(same) == 16 if label is None else len(same) > 8
        assert all(tokenizer.decode(tokenizer([shown[key]]).ids[0, : tokenizer([shown[key]]).lengths[0]].tolist()) == trained[key] for key in same)


def test_a_look_is_seeded(tool, odd_rows):
    data = schema.Data(root=str(CORPUS), sources=[{"files": "train-0000[0-3]-*.parquet"}], plan={"global_batch": 8})
    tokenizer = tokenizer_for(schema.TextTower())

    def places(seed):
        return [(row.file, row.row) for row in inspect(data, Look(size=8, draws=1, rows=5, sample=60, seed=seed), tokenizer).rows]

    assert len(places(0)) == 5 and places(0) == places(0) != places(1)


def test_recipes_and_what_is_wrong_with_them(tool, tmp_path, capsys, monkeypatch):
    recipe = str(RECIPES / "demo.yaml")
    assert tool.main(["--recipe", recipe, "--set", "data.sources=[{files: nothing-*.parquet}]"]) == 1
    assert tool.main(["--recipe", recipe, "--source", "other"]) == 1
    assert tool.main(["--recipe", recipe, "--sample", "20", "--out", "/proc/nothing/sheet.png"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert "no files match" in lines[0] and "--source other" in lines[1] and "--out /proc/nothing/sheet.png" in lines[2]
    text_augmentation.cache_clear()
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    assert tool.main(["--recipe", recipe, "--sample", "20", "--texts", "eda", "--out", str(tmp_path / "sheet.png")]) == 1
    assert "pip install 'protoclip-scale[wordnet]'" in capsys.readouterr().err
    for wrong, message in ((["--out", "sheet.jpg"], "must end in"), (["--rows", "0"], "at least 1"), (["--image-column", "x"], "no effect with --recipe")):
        with pytest.raises(SystemExit):
            tool.main(["--recipe", recipe, *wrong])
        assert message in capsys.readouterr().err
    for option in (["--rows", "5"], ["--draws", "1"], ["--masked"], ["--texts", "eda"], ["--augmentations", "clip"], ["--size", "9"]):
        assert tool.main(["--recipe", recipe, *option]) == 1
        assert capsys.readouterr().err == f"error: {option[0]} has no effect without --out; leave it out\n"

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "inspect", interrupted)
    assert tool.main(["--recipe", recipe]) == 130 and capsys.readouterr().err == "stopped\n"
