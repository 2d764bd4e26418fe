"""The demo corpus that ships, and the tool that cuts and rebuilds it."""

import hashlib
import importlib.util
import io
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from protoclip_scale.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "recipes" / "demo_corpus"
NUM_ROWS = {"train": 4949, "val": 119, "eval_seen_concept": 1726, "eval_unseen_concept": 188}
NUM_SHARDS = {"train": 10, "val": 1, "eval_seen_concept": 2, "eval_unseen_concept": 1}
LICENSES = {"noto": "Apache-2.0", "fluent-emoji-3d": "MIT", "openclipart": "public-domain", "twemoji": "CC-BY-4.0"}
COLUMNS = ["image", "caption", "label", "source", "coarse", "concept", "style", "license"]
# SHA-256 over path, picture and captions of the training rows in their order: fails when the shipped corpus changes.
TRAIN_HASH = "078033c2b939ca32bfb96584360a1fb6aebc5a75095b5655847b70bfd25b78b1"


@pytest.fixture(scope="module")
def tool():
    """The script tools/build_demo_corpus.py as a module; it puts the package `demo_corpus` on the import path."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("build_demo_corpus", ROOT / "tools" / "build_demo_corpus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    return {split: pa.concat_tables([pq.read_table(path) for path in shards(CORPUS, split)]) for split in NUM_ROWS}


def shards(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"{split}-*.parquet"))


def order_hash(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for row in table.select(["image", "caption"]).to_pylist():
        digest.update(row["image"]["path"].encode())
        digest.update(row["image"]["bytes"])
        digest.update("\n".join(row["caption"]).encode())
    return digest.hexdigest()


def single_file(tables: dict[str, pa.Table], path: Path) -> Path:
    with_split = [table.append_column("split", pa.array([split] * len(table))) for split, table in tables.items()]
    whole = pa.concat_tables(with_split)
    pq.write_table(whole.take(list(range(len(whole)))[::-1]), path)
    return path


@pytest.mark.parametrize("split", NUM_ROWS)
def test_shards_hold_the_rows_in_small_row_groups_that_mix_the_sources(split):
    paths = shards(CORPUS, split)
    assert [path.name for path in paths] == [f"{split}-{i:05d}-of-{NUM_SHARDS[split]:05d}.parquet" for i in range(NUM_SHARDS[split])]
    files = [pq.ParquetFile(path) for path in paths]
    sizes = [file.metadata.row_group(group).num_rows for file in files for group in range(file.num_row_groups)]
    assert sum(sizes) == NUM_ROWS[split]
    assert set(sizes[:-1]) == {64} and sizes[-1] <= 64
    assert all(file.schema_arrow.names == COLUMNS for file in files)
    if split == "train":
        assert sum(path.stat().st_size for path in paths) < 8 * 2**20
        for file in files:
            for group in range(file.num_row_groups - 1):
                sources = Counter(file.read_row_group(group, ["source"])["source"].to_pylist())
                assert len(sources) == 3 and max(sources.values()) < 48


def test_every_row_is_complete_and_every_picture_decodes(tables):
    for table in tables.values():
        for row in table.to_pylist():
            with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
                picture.load()
                assert (picture.format, picture.size, picture.mode) == ("WEBP", (72, 72), "RGB"), row["image"]["path"]
            assert row["caption"] and all(caption.strip() for caption in row["caption"]), row["image"]["path"]
            assert row["license"] == LICENSES[row["source"]]
            assert row["label"] and row["concept"] and row["style"]


def test_held_out_vendor_and_concepts_are_in_no_training_row(tables):
    for split in ("eval_seen_concept", "eval_unseen_concept"):
        assert set(tables[split]["source"].to_pylist()) == {"twemoji"}
    unseen = set(tables["eval_unseen_concept"]["concept"].to_pylist())
    assert len(unseen) == 188
    assert not unseen & set(tables["eval_seen_concept"]["concept"].to_pylist())
    for split in ("train", "val"):
        emoji = [row for row in tables[split].select(["source", "concept"]).to_pylist() if row["source"] != "openclipart"]
        assert len(emoji) > 50 and "twemoji" not in {row["source"] for row in emoji}
        assert not unseen & {row["concept"] for row in emoji}


def test_paths_identify_rows(tables):
    paths = [row["path"] for table in tables.values() for row in table["image"].to_pylist()]
    assert len(set(paths)) == len(paths) == sum(NUM_ROWS.values())


def test_notice_names_every_source_and_licence():
    notice = (CORPUS / "NOTICE").read_text(encoding="utf-8")
    for words in ("Noto Emoji", "Apache-2.0", "Fluent Emoji 3D", "MIT License", "Open Clip Art", "public domain", "Twemoji", "CC-BY-4.0"):
        assert words in notice
    assert "copyright Twitter, Inc. and other contributors" in notice and "resized" in notice
    assert "emojibase" in notice and "Unicode" in notice


def test_shards_are_the_ones_known():
    assert order_hash(pa.concat_tables([pq.read_table(path) for path in shards(CORPUS, "train")])) == TRAIN_HASH


def test_cutting_again_gives_the_same_files_whatever_the_order_of_the_input(tool, tables, tmp_path):
    whole = single_file(tables, tmp_path / "whole.parquet")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-00000-of-00099.parquet").write_bytes(b"a shard of an earlier cut")
        assert tool.main(["--from-parquet", str(whole), "--out", str(tmp_path / name)]) == 0
    for split in NUM_ROWS:
        assert [path.name for path in shards(tmp_path / "first", split)] == [path.name for path in shards(CORPUS, split)]
        for path in shards(tmp_path / "first", split):
            assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
            assert pq.read_table(path).equals(pq.read_table(CORPUS / path.name))


def test_unusable_files_are_one_line(tool, tmp_path, capsys):
    lacking = tmp_path / "lacking.parquet"
    pq.write_table(pa.table({"caption": [["a cat"]]}), lacking)
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(lacking.read_bytes()[:-20])
    for path, words in ((tmp_path / "none.parquet", "no such file"), (lacking, "no column image"), (torn, "not a readable parquet file")):
        assert tool.main(["--from-parquet", str(path), "--out", str(tmp_path / "out")]) == 1
        message = capsys.readouterr().err
        assert words in message and str(path) in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_listed_splits_are_those_of_the_shards(tool, tables):
    from demo_corpus.splits import listed_splits

    listed = listed_splits()
    for split, table in tables.items():
        rows = table.drop_columns(["caption"]).to_pylist()
        assert all(listed.split_of(row) == split for row in rows)
    drawn_by_noto = {"source": "noto", "concept": min(listed.unseen_concepts), "image": {"path": "noto/1.webp"}}
    assert listed.split_of(drawn_by_noto) is None


def test_hashed_splits_have_the_shares_and_depend_on_the_seed_alone(tool, tables):
    from demo_corpus.splits import hashed_splits

    concepts = tables["eval_seen_concept"]["concept"].to_pylist()
    first, again, other = (hashed_splits(names, ["a", "b"], seed) for names, seed in ((concepts, 1), (concepts[::-1], 1), (concepts, 2)))
    assert first == again != other
    assert len(first.unseen_concepts) == round(0.1 * len(set(concepts)))
    assert not first.unseen_concepts & first.val_concepts


def test_coarse_classes_follow_from_the_labels(tool, tables):
    from demo_corpus.coarse import CLASSES, coarse_class

    pairs = {(row["label"], row["coarse"]) for table in tables.values() for row in table.select(["label", "coarse"]).to_pylist()}
    assert all(coarse_class(label) == coarse for label, coarse in pairs)
    assert len(CLASSES) == 17 and {coarse for _, coarse in pairs} == {*CLASSES, ""}


def test_clip_art_captions(tool):
    from demo_corpus.clip_art import Description, captions_of

    described = Description("Lime half", "Lime cut to half", "Jarno Vasamaa", ("food", "", "fruit", "0x8863bcc"), "")
    assert captions_of("food/fruit/lime_half_jarno_vasamaa_", described) == ["lime half", "Lime cut to half", "lime half, food, fruit"]
    collection = Description("Homes Clipart", "", "Jose Hevia", ("house", "home"), "")
    assert captions_of("buildings/homes/home6", collection) == ["home", "home, house"]


def test_small_drawing_is_cut_out_of_its_page_and_transparency_is_white(tool):
    from demo_corpus.pictures import on_white, square_webp, trim

    page = Image.new("RGBA", (400, 200), (0, 0, 0, 0))
    page.paste((255, 0, 0, 255), (100, 50, 200, 150))
    assert on_white(page).getpixel((0, 0)) == (255, 255, 255)
    assert trim(on_white(page)).size == (108, 108)
    full = Image.new("RGB", (400, 200), "red")
    assert trim(full).size == (400, 200)
    square = Image.open(io.BytesIO(square_webp(full)))
    assert square.size == (72, 72)
    assert min(square.getpixel((36, 2))) > 240 and square.getpixel((36, 36))[1] < 40


def tar_bytes(members: list[tuple[str, bytes | str]]) -> io.BytesIO:
    """A tar of files (content as bytes) and symbolic links (target as str)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    buffer.seek(0)
    return buffer


def test_unpacking_copies_links_and_refuses_what_leaves_the_folder(tool, tmp_path, monkeypatch):
    from demo_corpus import download

    good = tar_bytes([("./a/link", "../b/file"), ("./b/file", b"text"), ("./b/dangling", "nothing")])
    download.unpack_tar(good, "r|", tmp_path / "good", "good.tar")
    assert (tmp_path / "good/a/link").read_bytes() == b"text" and not (tmp_path / "good/a/link").is_symlink()
    assert not (tmp_path / "good/b/dangling").exists()
    for members in ([("../out", b"x")], [("/etc/out", b"x")], [("a", "../../secret")], [("a", "/etc/passwd")]):
        with pytest.raises(UserError, match=r"bad\.tar: unsafe path"):
            download.unpack_tar(tar_bytes(members), "r|", tmp_path / "bad", "bad.tar")
    assert not (tmp_path / "bad").exists() and not (tmp_path / "out").exists()
    torn = io.BytesIO(tar_bytes([("a", bytes(5000))]).getvalue()[:2000])
    with pytest.raises(UserError, match=r"torn\.tar: cannot be unpacked"):
        download.unpack_tar(torn, "r|", tmp_path / "torn", "torn.tar")
    monkeypatch.setattr(download, "MAX_TOTAL_BYTES", 5)
    with pytest.raises(UserError, match="past the limit"):
        download.unpack_tar(tar_bytes([("a", b"1234"), ("b", b"5678")]), "r|", tmp_path / "large", "large.tar")


def test_archive_that_is_not_the_known_one_is_refused(tool, tmp_path):
    from demo_corpus import download

    (tmp_path / "emojibase-data-17.0.0.tgz").write_bytes(b"something else")
    with pytest.raises(UserError, match="SHA-256"):
        download.fetch_npm("emojibase-data@17.0.0", tmp_path)
