"""Preparing evaluation sets: published layouts made of real pictures, downloads from a loopback server, and what is refused."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from protoclip_scale.data.decode import decode_image
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation import tasks
from protoclip_scale.preparation.held_out import fetch, prepare
from protoclip_scale.preparation.held_out.classes import class_of_label
from protoclip_scale.preparation.held_out.fetch import download, unpack
from protoclip_scale.preparation.held_out.prepare import NeedsHands, Options
from protoclip_scale.preparation.held_out.schema import Download
from tests.support import CORPUS, ROOT

CLASSES = ["animal", "food", "vehicle"]


@functools.cache
def pictures():
    return [row["image"]["bytes"] for row in pq.read_table(CORPUS / "val-00000-of-00001.parquet").slice(0, 12).to_pylist()]


def small(number, side):
    """A real picture as uint8 [side, side, 3]."""
    return np.asarray(Image.open(io.BytesIO(pictures()[number])).convert("RGB").resize((side, side)))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Tasks of the test's own: ``shipped(name, **keys)`` writes one."""
    folder = tmp_path / "shipped"
    (folder / "tasks").mkdir(parents=True)
    monkeypatch.setattr(tasks, "SHIPPED", folder)
    for cached in (tasks.read_task, tasks.task_keys):
        cached.cache_clear()

    def write(name, **keys):
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"about": "a test", "templates": ["{}"], **keys}))

    yield write
    for cached in (tasks.read_task, tasks.task_keys):
        cached.cache_clear()


def prepared(out, task, source=None, **options):
    """The rows that are written."""
    number = prepare.prepare(task, Options(out, {task: str(source)} if source else {}, **{"rows_per_shard": 5, "retry_seconds": 0.0, **options}), lambda line: None)
    rows = [row for path in sorted((out / task).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == number
    return rows


def tree(folder, names=("animal", "food", "vehicle"), each=3):
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            (folder / name / f"{number}.webp").write_bytes(pictures()[(place * each + number) % 12])
    return folder


def test_folders_of_classes(tmp_path, shipped):
    shipped("set", classes=CLASSES, num_rows=9, prepare={"manual": "http", "layout": "folders", "folder": "test"})
    tree(tmp_path / "source" / "test", ("Animal", "food", "VEHICLE"))
    rows = prepared(tmp_path / "out", "set", tmp_path / "source")
    assert [row["class"] for row in rows] == ["animal"] * 3 + ["vehicle"] * 3 + ["food"] * 3
    assert rows[0]["image"] == {"bytes": pictures()[0], "path": "Animal/0.webp"} and rows[0]["caption"] == []
    assert prepared(tmp_path / "out", "set", tmp_path / "source" / "test") == rows  # the folder itself will do; nothing is written twice
    assert [path.name for path in sorted((tmp_path / "out/set").glob("*.parquet"))] == ["shard-00000.parquet", "shard-00001.parquet"]


def test_classes_by_order_and_without_a_border(tmp_path, shipped):
    shipped("set", classes=["two", "ten", "three"], class_words={"ten": ["10th"]}, prepare={"manual": "http", "layout": "folders", "match": "order", "crop_border": 2})
    rows = prepared(tmp_path / "out", "set", tree(tmp_path / "source", ("10", "9", "100")))
    assert [row["class"] for row in rows] == ["ten"] * 3 + ["three"] * 3 + ["two"] * 3
    image = decode_image(pictures()[0])
    assert np.array_equal(decode_image(rows[0]["image"]["bytes"]), image[:, 2:-2, 2:-2])


def test_lines_of_a_list(tmp_path, shipped):
    line = r"(?P<image>(?P<class>.+)_[0-9]+) [0-9]+ .*"
    shipped("set", classes=CLASSES, prepare={"manual": "http", "layout": "list", "list": "meta/test.txt", "line": line, "image": "images/{image}.webp"})
    (tmp_path / "source/images").mkdir(parents=True)
    (tmp_path / "source/meta").mkdir()
    names = ["vehicle_7", "animal_1", "food_3"]
    for number, name in enumerate(names):
        (tmp_path / f"source/images/{name}.webp").write_bytes(pictures()[number])
    (tmp_path / "source/meta/test.txt").write_text("#comment\n" + "".join(f"{name} 1 2 3\n" for name in names))
    rows = prepared(tmp_path / "out", "set", tmp_path / "source")
    assert [(row["class"], row["image"]["bytes"]) for row in rows] == [("vehicle", pictures()[0]), ("animal", pictures()[1]), ("food", pictures()[2])]


def cifar(folder, labels=(2, 0, 1), coarse=b""):
    folder.mkdir(parents=True)
    records = [coarse + bytes([label]) + small(number, 32).transpose(2, 0, 1).tobytes() for number, label in enumerate(labels)]
    (folder / "test.bin").write_bytes(b"".join(records))
    (folder / "names.txt").write_text("animal\nfood\nvehicle\n\n")


@pytest.mark.parametrize("coarse", [b"", b"\x01"])
def test_the_binary_version_of_cifar(coarse, tmp_path, shipped):
    shipped("set", classes=CLASSES, prepare={"manual": "http", "layout": "cifar", "files": ["b/test.bin"], "label_names": "b/names.txt", "label_bytes": 1 + len(coarse)})
    cifar(tmp_path / "source/b", coarse=coarse)
    rows = prepared(tmp_path / "out", "set", tmp_path / "source")
    assert [row["class"] for row in rows] == ["vehicle", "animal", "food"]
    for number, row in enumerate(rows):
        assert np.array_equal(decode_image(row["image"]["bytes"]).permute(1, 2, 0), small(number, 32))


def test_stl10_and_mnist(tmp_path, shipped):
    binary = {"manual": "http", "files": ["x", "y"]}
    shipped("stl", classes=CLASSES, prepare={**binary, "layout": "stl10", "label_names": "names.txt"})
    shipped("digits", classes=["0", "1", "2"], prepare={**binary, "layout": "idx"})
    stl, digits = tmp_path / "stl", tmp_path / "digits"
    stl.mkdir()
    digits.mkdir()
    (stl / "x").write_bytes(b"".join(small(number, 96).transpose(2, 1, 0).tobytes() for number in range(3)))
    (stl / "y").write_bytes(bytes([3, 1, 2]))
    (stl / "names.txt").write_text("animal\nfood\nvehicle\n")
    gray = np.stack([small(number, 28)[..., 0] for number in range(3)])
    (digits / "x").write_bytes(np.array([2051, 3, 28, 28], ">i4").tobytes() + gray.tobytes())
    (digits / "y").write_bytes(np.array([2049, 3], ">i4").tobytes() + bytes([2, 0, 1]))
    rows = prepared(tmp_path / "out", "stl", stl)
    assert [row["class"] for row in rows] == ["vehicle", "animal", "food"]
    assert np.array_equal(decode_image(rows[1]["image"]["bytes"]).permute(1, 2, 0), small(1, 96))
    rows = prepared(tmp_path / "out", "digits", digits)
    assert [row["class"] for row in rows] == ["2", "0", "1"] and np.array_equal(decode_image(rows[2]["image"]["bytes"])[0], gray[2])


def captioned(folder):
    """COCO's annotations and Karpathy's split of the same five pictures."""
    (folder / "val").mkdir(parents=True)
    for number in range(5):
        (folder / f"val/{number}.jpg").write_bytes(pictures()[number])
    images = [{"id": 10 - number, "file_name": f"{number}.jpg"} for number in range(5)]
    notes = [{"id": 100 - 3 * number - k, "image_id": 10 - number, "caption": f"picture {number}, {k}"} for number in range(5) for k in range(3)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    split = [{"filename": f"{n}.jpg", "filepath": "val", "split": "test" if n else "train", "sentences": [{"raw": f"picture {n}, {k}"} for k in range(3)]} for n in range(5)]
    (folder / "split.json").write_text(json.dumps({"images": split, "dataset": "coco"}))
    return folder


def test_annotations_of_coco_and_splits_of_karpathy(tmp_path, shipped):
    shipped("coco", metric="mean_recall", num_rows=5, num_captions=15, prepare={"manual": "http", "layout": "coco", "list": "annotations/captions.json", "image": "val/{image}"})
    shipped("karpathy", num_captions=8, prepare={"manual": "http", "layout": "karpathy", "list": "split.json", "image": "{folder}/{image}", "captions_per_image": 2})
    source = captioned(tmp_path / "source")
    rows = prepared(tmp_path / "out", "coco", source)
    assert [row["image"]["bytes"] for row in rows] == pictures()[4::-1]  # by image id
    assert rows[0]["caption"] == ["picture 4, 2", "picture 4, 1", "picture 4, 0"] and "class" not in rows[0]  # by annotation id
    rows = prepared(tmp_path / "out", "karpathy", source)
    assert [row["caption"] for row in rows] == [[f"picture {number}, {k}" for k in range(2)] for number in range(1, 5)]


def test_a_dataset_of_the_hub(tmp_path, shipped, monkeypatch):
    import datasets

    from protoclip_scale.preparation.held_out import prepare as module

    shipped("set", classes=CLASSES, prepare={"manual": "http", "layout": "folders", "hub": {"image": "img", "label": "fine"}})
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["Vehicle", "animal", "food"])})
    rows = [{"img": {"bytes": pictures()[number], "path": None}, "fine": number % 3} for number in range(6)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "hub.parquet")
    opened = module.open_source
    monkeypatch.setattr(module, "open_source", lambda settings, *rest: opened(settings.model_copy(update={"hub": None, "split": None, "files": str(tmp_path / "hub.parquet")}), *rest))
    rows = prepared(tmp_path / "out", "set", "hf:somebody/set")
    assert [row["class"] for row in rows] == ["vehicle", "animal", "food"] * 2 and [row["image"]["bytes"] for row in rows] == pictures()[:6]


def test_the_hub_is_not_asked_when_it_is_off(tmp_path, shipped):
    shipped("set", classes=CLASSES, prepare={"manual": "http", "layout": "folders"})
    with pytest.raises(UserError, match="hf://datasets/somebody/set cannot be read: HF_HUB_OFFLINE is set"):
        prepared(tmp_path / "out", "set", "hf:somebody/set")


@pytest.mark.parametrize(
    ("labels", "match", "message"),
    [
        (["animal", "food", "plane"], "names", "'plane' is none of its 3 classes"),
        (["animal", "food", "Food", "vehicle"], "names", "called like one class"),
        (["a", "b"], "order", "2 classes ('a', 'b') where there must be 3"),
        (["animal", "vehicle", "zebra"], "order", "'vehicle' stands where 'food' must be"),
    ],
)
def test_classes_are_never_guessed(labels, match, message):
    with pytest.raises(UserError) as caught:
        class_of_label(labels, CLASSES, {}, match, False, "set")
    assert message in str(caught.value)


def test_words_of_a_class_name_it_unless_two_share_them():
    assert class_of_label(["Sea-lion", "x"], ["n1", "n2"], {"n1": ["sea lion"]}, "names", True, "set") == {"Sea-lion": "n1"}
    with pytest.raises(UserError, match="none of its 2 classes"):
        class_of_label(["sunglasses"], ["n1", "n2"], {"n1": ["sunglasses"], "n2": ["sunglasses"]}, "names", False, "set")


def break_nothing(source):
    """As it is."""


def break_image(source):
    (source / "food/1.webp").write_bytes(pictures()[0][:60])


def break_link(source):
    (source / "food/1.webp").unlink()
    (source.parent / "secret.webp").write_bytes(pictures()[0])
    (source / "food/1.webp").symlink_to(source.parent / "secret.webp")


@pytest.mark.parametrize(
    ("damage", "keys", "message"),
    [
        (break_nothing, {"num_rows": 10}, "9 rows where there must be 10"),
        (break_image, {}, "image food/1.webp cannot be used"),
        (break_link, {"num_rows": 9}, "8 rows where there must be 9"),
    ],
)
def test_sets_of_another_size_or_with_damaged_images_are_refused(damage, keys, message, tmp_path, shipped):
    shipped("set", classes=CLASSES, **keys, prepare={"manual": "http", "layout": "folders"})
    damage(tree(tmp_path / "source"))
    with pytest.raises(UserError, match=message):
        prepared(tmp_path / "out", "set", tmp_path / "source")
    if keys:
        assert prepared(tmp_path / "out", "set", tmp_path / "source", allow_subset=True)


@pytest.mark.parametrize(
    ("layout", "content", "message"),
    [
        ({"layout": "cifar", "files": ["x"], "label_names": "names"}, bytes(3072), "no whole number of records"),
        ({"layout": "cifar", "files": ["x"], "label_names": "names"}, bytes([7]) + bytes(3072), "label 7 has no name among the 3"),
        ({"layout": "idx", "files": ["x", "x"]}, bytes(100), "no file of images in MNIST's format"),
        ({"layout": "coco", "list": "x", "image": "{image}"}, b"{", "is no JSON"),
        ({"layout": "list", "list": "y", "line": "(?P<class>x)", "image": "x"}, b"", "y does not exist"),
        ({"layout": "folders"}, b"", "holds no folders"),
    ],
)
def test_files_of_another_form_are_one_line(layout, content, message, tmp_path, shipped):
    shipped("set", classes=CLASSES, prepare={"manual": "http", **layout})
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x").write_bytes(content)
    (tmp_path / "source/names").write_text("animal\nfood\nvehicle\n")
    with pytest.raises(UserError) as caught:
        prepared(tmp_path / "out", "set", tmp_path / "source")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_images_without_captions_are_refused(tmp_path, shipped):
    shipped("coco", prepare={"manual": "http", "layout": "coco", "list": "captions.json", "image": "val/{image}"})
    source = captioned(tmp_path / "source")
    facts = json.loads((source / "captions.json").read_text())
    (source / "captions.json").write_text(json.dumps({**facts, "annotations": facts["annotations"][3:]}))
    with pytest.raises(UserError, match=r"1 of 5 images have no caption \(first val/0.jpg\)"):
        prepared(tmp_path / "out", "coco", source)
    assert len(prepared(tmp_path / "out", "coco", source, allow_subset=True)) == 4


def test_shards_of_other_rows_are_not_gone_on_with(tmp_path, shipped):
    shipped("set", classes=CLASSES, prepare={"manual": "http", "layout": "folders"})
    source = tree(tmp_path / "source")
    prepared(tmp_path / "out", "set", source)
    (source / "food/9.webp").write_bytes(pictures()[11])
    with pytest.raises(UserError, match="was prepared from other rows"):
        prepared(tmp_path / "out", "set", source)


class Server(http.server.BaseHTTPRequestHandler):
    """Files by path, with ranges; an answer of more than ``cut`` bytes is cut off there, so many times."""

    files: dict[str, bytes] = {}
    cut = (0, 0)
    asked: list[tuple[str, str]] = []

    def do_GET(self):
        wanted, start = self.headers.get("Range", ""), 0
        Server.asked.append((self.path, wanted))
        content = self.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        if wanted:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        times, size = Server.cut
        Server.cut = (times - 1, size)
        self.wfile.write(content[start : start + size] if times > 0 else content[start:])
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    Server.asked, Server.cut, Server.files = [], (0, 0), {}
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def archive_of(folder, kind="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=kind) as archive:
        archive.add(folder, "top")
    return buffer.getvalue()


def test_downloads_go_on_where_they_were_cut_off(tmp_path, shipped, server, monkeypatch):
    monkeypatch.setattr(fetch, "CHUNK_BYTES", 100)
    content = archive_of(tree(tmp_path / "source"))
    Server.files, Server.cut = {"/set.tar.gz": content}, (2, 1000)
    wanted = {"url": f"{server}/set.tar.gz", "md5": hashlib.md5(content).hexdigest()}
    shipped("set", classes=CLASSES, num_rows=9, prepare={"downloads": [wanted], "layout": "folders", "folder": "top"})
    rows = prepared(tmp_path / "out", "set", retry_seconds=30.0)
    assert [ranged for _, ranged in Server.asked] == ["", "bytes=1000-", "bytes=2000-"]
    assert rows == prepared(tmp_path / "other", "set", tmp_path / "source")
    assert prepared(tmp_path / "out", "set") == rows and len(Server.asked) == 3


@pytest.mark.parametrize(("path", "md5", "message"), [("/none.tar", None, "404"), ("/set.tar", "0" * 32, "its MD5 is")])
def test_refused_and_changed_downloads_are_one_line(path, md5, message, tmp_path, server):
    Server.files = {"/set.tar": b"content"}
    with pytest.raises(UserError, match=message) as caught:
        download(Download(url=server + path, md5=md5), tmp_path, 0.0)
    assert "\n" not in str(caught.value) and not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_a_download_that_the_disk_cannot_hold_is_not_begun(tmp_path, server, monkeypatch):
    Server.files = {"/set.tar": b"content"}
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3))
    with pytest.raises(UserError, match="are free in"):
        download(Download(url=f"{server}/set.tar"), tmp_path, 0.0)


def tar_with(name, kind=tarfile.REGTYPE, link=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        member.size = 4 if kind == tarfile.REGTYPE else 0
        archive.addfile(member, io.BytesIO(b"evil"))
    return buffer.getvalue()


def zip_with(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"evil")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar", tar_with("../evil"), "a path that leads out"),
        ("a.tar", tar_with("/tmp/evil"), "a path that leads out"),
        ("a.tar", tar_with("link", tarfile.SYMTYPE, "/etc/passwd"), "a link"),
        ("a.tar", tar_with("link", tarfile.LNKTYPE, "../x"), "a link"),
        ("a.zip", zip_with("x/../../evil"), "a path that leads out"),
        ("a.zip", zip_with("..\\evil"), "a path that leads out"),
        ("a.gz", gzip.compress(b"1" * (20 << 20)), "more than 100 times its size"),
        ("a.gz", gzip.compress(os.urandom(5000))[:3000], "is damaged"),
    ],
)
def test_archives_are_not_trusted(name, content, message, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        unpack(tmp_path / "in" / name, tmp_path / "in/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"] and not (tmp_path / "in/evil").exists()


def test_what_needs_hands_says_where_and_how(tmp_path, shipped):
    shipped("set", classes=CLASSES, prepare={"manual": "https://example.org: ask for it", "layout": "folders"})
    with pytest.raises(NeedsHands, match="set: needs a download by hand: https://example.org: ask for it. Then: --source set=FOLDER"):
        prepared(tmp_path / "out", "set")


def tool(*arguments):
    return runpy.run_path(str(ROOT / "tools/prepare_evaluation.py"), run_name="tool")["main"](list(map(str, arguments)))


def test_the_tool_prepares_what_it_can_and_says_what_is_missing(tmp_path, capsys):
    names = tasks.task_keys("pets")["classes"]
    source = tree(tmp_path / "source", [f"{number:03d}" for number in range(1, 103)], each=1)
    assert tool("declip11", "--out", tmp_path / "out", "--only", "flowers", "imagenet", "--source", f"flowers={source}", "--allow-subset") == 1
    said = capsys.readouterr()
    assert "flowers: ready, 102 rows" in said.out and "imagenet: needs a download by hand: https://image-net.org" in said.out
    assert said.err == "error: 1 of 2 sets are not ready: imagenet; see the lines above\n"
    rows = pq.read_table(tmp_path / "out/flowers/shard-00000.parquet").to_pylist()
    assert [row["class"] for row in rows] == tasks.task_keys("flowers")["classes"] and len(names) == 37
    assert tool("flowers", "--out", tmp_path / "out", "--source", f"flowers={source}", "--allow-subset") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flowrs"], "cannot be read"),
        (["declip11", "--only", "flowrs"], "'flowrs' is no set of declip11, did you mean flowers?"),
        (["declip11", "--source", "flowers"], "write SET=FOLDER"),
        (["flowers", "--source", "flowers=/nowhere"], "there is no such folder"),
    ],
)
def test_mistakes_on_the_command_line_are_told(arguments, message, tmp_path, capsys):
    assert tool(*arguments, "--out", tmp_path) == 1
    said = capsys.readouterr()
    assert message in said.out + said.err and said.err.count("\n") == 1


KILLED = """
import sys
from pathlib import Path
import os, signal
from protoclip_scale.evaluation import tasks
from protoclip_scale.preparation import shards
from protoclip_scale.preparation.held_out import prepare
count = 0
def event(name):
    global count
    if name == "prepare.written":
        count += 1
        if count == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
shards.event = event
tasks.SHIPPED = Path(sys.argv[1])
prepare.prepare("set", prepare.Options(Path(sys.argv[3]), {"set": sys.argv[2]}, rows_per_shard=2), print)
"""


def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(tmp_path, shipped):
    shipped("set", classes=CLASSES, prepare={"manual": "http", "layout": "folders"})
    source = tree(tmp_path / "source")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "shipped"), str(source), str(tmp_path / "out"), "3"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/set").glob("*.parquet")}
    assert sorted(first) == ["shard-00000.parquet", "shard-00001.parquet"] and list((tmp_path / "out/set").glob(".*.writing"))
    prepared(tmp_path / "out", "set", source, rows_per_shard=2)
    prepared(tmp_path / "whole", "set", source, rows_per_shard=2)
    after = {path.name: path for path in (tmp_path / "out/set").glob("*.parquet")}
    assert len(after) == 5 and all(after[name].stat().st_mtime_ns == stamp for name, stamp in first.items())
    assert all(path.read_bytes() == (tmp_path / "whole/set" / name).read_bytes() for name, path in after.items())
    assert not list((tmp_path / "out/set").glob(".*.writing"))
