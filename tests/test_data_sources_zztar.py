"""Tar shards: what is read equals a plain look through the archive; nothing is lost, written, or read past a limit."""

import gzip
import io
import itertools
import json
import os
import tarfile

import datasets
import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoclip_scale.data.sources import SourceLimits
from protoclip_scale.data.sources.image_files import IMAGE_SUFFIXES
from tests.source_cases import read_all, refused, scan_of

JPEG = b"\xff\xd8 image "


def pack(members, header_format=tarfile.USTAR_FORMAT) -> bytes:
    """An archive of (name, bytes) and of TarInfo objects."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=header_format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                name, content = member
                about = tarfile.TarInfo(name)
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))
    return packed.getvalue()


def special(name, kind, **about) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    for key, value in about.items():
        setattr(member, key, value)
    return member


def samples(count, **members):
    """count samples of the members; a value with {} takes the number."""
    return [
        (f"{number:06}.{suffix}", content.replace(b"{}", b"%d" % number)) for number in range(count) for suffix, content in members.items()
    ]


PLAIN = samples(20, jpg=JPEG + b"{}", txt=b"text {}")


def write(tmp_path, members, name="00000.tar", **settings):
    (tmp_path / name).write_bytes(pack(members, **settings))
    return tmp_path / name


def twin(path) -> list[tuple]:
    """(image, captions) by a plain look through the archive."""
    with tarfile.open(path) as archive:
        files = [(member.name, archive.extractfile(member).read()) for member in archive if member.isfile() and ".." not in member.name]
    named = [(*name.rpartition("/")[::2], content) for name, content in files]
    split = [
        ((folder, name.split(".")[0]), name.partition(".")[2].lower(), content)
        for folder, name, content in named
        if "." in name[1:] and name[0] != "."
    ]
    rows = []
    for _, group in itertools.groupby(split, key=lambda member: member[0]):
        members = {suffix: content for _, suffix, content in group}
        image = next((content for suffix, content in members.items() if suffix in IMAGE_SUFFIXES), None)
        rows.append((image, [members["txt"].decode("utf-8", "replace")] if "txt" in members else []))
    return rows


def rows_of(table) -> list[tuple]:
    return list(zip(table.column("image").to_pylist(), table.column("captions").to_pylist(), strict=True))


def test_a_plain_shard_equals_what_datasets_reads(tmp_path):
    path = write(tmp_path, samples(300, jpg=JPEG + b"{}", txt=b"text {}", json=b'{"number": {}, "words": ["a", "b"]}'))
    builder = datasets.load_dataset("webdataset", data_files=[str(path)], split="train", streaming=True)
    expected = list(builder.cast_column("jpg", datasets.Image(decode=False)))
    table = read_all(path, "tar", {"extra": ("json.number", "json.words")})
    assert table.num_rows == 300 and table.column("image").num_chunks > 1
    assert rows_of(table) == [(row["jpg"]["bytes"], [row["txt"]]) for row in expected]
    assert table.column("json.number").to_pylist() == [row["json"]["number"] for row in expected]
    assert table.column("json.words").to_pylist() == [row["json"]["words"] for row in expected]


names = st.sampled_from(["000", "001", "a/000", "a/001", "./b", "a.b/c"])
suffixes = st.sampled_from(["jpg", "png", "JPG", "txt", "txt", "json", "seg.png", ""])
member = st.builds(
    lambda name, suffix, content: (f"{name}.{suffix}" if suffix else name, content), names, suffixes, st.binary(max_size=700)
)
others = st.sampled_from(
    [
        special("a", tarfile.DIRTYPE),
        special("001.png", tarfile.SYMTYPE, linkname="/etc/passwd"),
        ("a/.hidden.jpg", b"1"),
        ("../up.jpg", b"2"),
        ("README", b"3"),
    ]
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(member | others, min_size=1, max_size=12), st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_any_shard_equals_its_twin(tmp_path_factory, members, header_format):
    path = write(tmp_path_factory.mktemp("tar"), [("first.jpg", JPEG), ("first.txt", b"t"), *members], header_format=header_format)
    expected = twin(path)
    table = read_all(path, "tar")
    assert rows_of(table) == expected
    assert read_all(path, "tar", images=False).column("captions").to_pylist() == [captions for _, captions in expected]


def test_missing_mixed_repeated_and_unreadable_members(tmp_path):
    members = [
        ("0.jpg", b"0"), ("0.txt", b"zero"),
        ("1.png", b"1"),
        ("2.txt", b"two"),
        ("3.webp", b""), ("3.txt", b"\xff three"),
        ("4.jpg", b"x" * 101), ("4.txt", b"four"),
        ("5.jpg", b"5"), ("5.jpg", b"5 again"), ("5.txt", b"five"),
    ]  # fmt: skip
    path = write(tmp_path, members)
    table = read_all(path, "tar", limits=SourceLimits(max_bytes=100))
    assert table.column("image").to_pylist() == [b"0", b"1", None, b"", None, b"5 again"]
    assert table.column("captions").to_pylist() == [["zero"], [], ["two"], ["\ufffd three"], ["four"], ["five"]]
    assert read_all(path, "tar", {"image": "webp;jpg"}).column("image").to_pylist()[:4] == [b"0", None, None, b""]


def test_a_member_over_the_limit_is_not_read(tmp_path, monkeypatch):
    path = write(tmp_path, [("0.jpg", b"x" * 200_000), ("0.txt", b"t")])
    read = []
    opened = io.FileIO(path)
    monkeypatch.setattr("protoclip_scale.data.sources.tar.open_forward", lambda place: Counting(opened, read))
    assert read_all(path, "tar", limits=SourceLimits(max_bytes=199_999)).column("image").to_pylist() == [None]
    assert max(read) <= 512


class Counting:
    """A file that notes the length of each read."""

    def __init__(self, file, lengths):
        self._file, self._lengths = file, lengths
        self.seek, self.tell = file.seek, file.tell

    def read(self, size):
        self._lengths.append(size)
        return self._file.read(size)

    def __enter__(self):
        self._file.seek(0)
        return self

    def __exit__(self, *error):
        pass


def test_json_captions_extra_members_and_their_types(tmp_path):
    trees = [
        {"caption": "one", "width": 1, "tags": [], "deep": {"er": "x"}, "score": 1},
        {"caption": ["two", None, "zwei"], "width": None, "tags": ["a"], "score": 2.5},
        {"width": 3, "caption": 7},
        None,
    ]
    members = []
    for number, tree in enumerate(trees):
        content = b"{not json" if tree is None else json.dumps(tree).encode()
        members += [
            (f"{number}.jpg", b"i"),
            (f"{number}.json", content),
            (f"{number}.txt", b"t"),
            (f"{number}.seg.png", b"s%d" % number),
            (f"{number}.cls", b"12"),
        ]
    path = write(tmp_path, members)
    extra = ("json.width", "json.tags", "json.deep.er", "json.score", "seg.png", "cls")
    table = read_all(path, "tar", {"caption": ("json.caption", "txt"), "extra": extra})
    assert table.column("captions").to_pylist() == [["one", "t"], ["two", "zwei", "t"], ["t"], ["t"]]
    assert [table.schema.field(name).type for name in extra] == [
        pa.int64(),
        pa.list_(pa.string()),
        pa.string(),
        pa.float64(),
        pa.large_binary(),
        pa.string(),
    ]
    assert table.column("json.width").to_pylist() == [1, None, 3, None]
    assert table.column("json.tags").to_pylist() == [[], ["a"], None, None]
    assert table.column("json.deep.er").to_pylist() == ["x", None, None, None]
    assert table.column("json.score").to_pylist() == [1.0, 2.5, None, None]
    assert table.column("seg.png").to_pylist() == [b"s0", b"s1", b"s2", b"s3"]
    assert table.column("cls").to_pylist() == ["12"] * 4


def test_json_values_without_a_common_type_and_missing_columns_are_named(tmp_path):
    path = write(tmp_path, [*samples(300, jpg=b"i", json=b'{"id": {}}'), ("z.jpg", b"i"), ("z.json", b'{"id": "x"}')])
    assert "'json.id'" in refused(path, "tar", {"caption": "json.id", "extra": ("json.id",)} | {"caption": "jpg"})
    message = refused(path, "tar")
    assert "'txt'" in message and "jpg, json" in message and "columns.caption" in message
    assert "json.id" in refused(path, "tar", {"caption": "json.caption"})
    assert "'png'" in refused(path, "tar", {"image": "png", "caption": "json"})


def test_rows_come_from_a_side_car_and_its_lies_are_told(tmp_path):
    path = write(tmp_path, PLAIN)
    counted = scan_of(path, "tar")
    assert counted.rows == (20,)
    for name, right, wrong in (
        ("00000.idx", b"v1.2 20\njpg 512 9 000000.jpg txt 1536 6 000000.txt\n", b"v1.2 19\n"),
        ("00000_stats.json", b'{"count": 30, "successes": 20}', b'{"count": 30, "successes": 21}'),
        ("sizes.json", b'{"00000.tar": 20, "00001.tar": 5}', b'{"00000.tar": 2000}'),
    ):
        beside = tmp_path / name
        beside.write_bytes(right)
        assert scan_of(path, "tar") == counted  # the fingerprint does not depend on it
        beside.write_bytes(wrong)
        assert scan_of(path, "tar").rows != counted.rows
        message = refused(path, "tar")
        assert "20 samples" in message and "00000.tar" in message and "beside it" in message
        beside.write_bytes(b"no such thing")
        assert scan_of(path, "tar").rows == counted.rows
        beside.unlink()


def test_a_side_car_saves_the_pass_but_not_the_columns(tmp_path, caplog):
    path = write(tmp_path, [*samples(100, jpg=b"i", txt=b"t"), ("late.jpg", b"i"), ("late.cls", b"7")])
    (tmp_path / "00000.idx").write_bytes(b"v1.2 101\n")
    assert scan_of(path, "tar", {"extra": ("cls",)}).columns.field("cls").type == pa.string()
    assert "cls" not in scan_of(path, "tar").columns.names  # it looked at the first samples only
    assert read_all(path, "tar", {"extra": ("cls",)}).column("cls").to_pylist() == [None] * 100 + ["7"]


def test_links_devices_and_bad_names_are_left_out_and_logged(tmp_path, caplog):
    members = [
        ("0.jpg", b"i"), ("0.txt", b"zero"),
        special("1.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"), ("1.txt", b"one"),
        special("2.jpg", tarfile.LNKTYPE, linkname="0.jpg"), ("2.txt", b"two"),
        special("3.jpg", tarfile.CHRTYPE), special("4.jpg", tarfile.FIFOTYPE),
        ("/abs/5.jpg", b"i"), ("a/../../6.jpg", b"i"), ("x" * 1001 + ".jpg", b"i"),
    ]  # fmt: skip
    path = write(tmp_path, members, header_format=tarfile.PAX_FORMAT)
    before = sorted(os.walk(tmp_path))
    table = read_all(path, "tar")
    assert rows_of(table) == [(b"i", ["zero"]), (None, ["one"]), (None, ["two"])]
    assert sorted(os.walk(tmp_path)) == before
    assert "4 links" in caplog.text and "2 absolute" in caplog.text and "1 names of more than 1000" in caplog.text
    only = write(tmp_path, [special("1.jpg", tarfile.SYMTYPE, linkname="0.jpg")], "only.tar")
    assert "links" in refused(only, "tar")


def test_damaged_archives_are_one_clear_line(tmp_path):
    whole = pack(PLAIN)
    cases = {
        "inside a member": (whole[: 512 * 10 + 5], "cut off"),
        "inside a header": (whole[: 512 * 12 + 100], "cut off"),
        "damaged header": (whole[: 512 * 8] + b"\7" * 512 + whole[512 * 9 :], "damaged"),
        "damaged length": (whole[: 512 * 8 + 124] + b"\xff" * 12 + whole[512 * 8 + 136 :], "damaged"),
        "no tar": (b"<html>404 not found</html>" * 100, "no tar file"),
        "empty": (b"", "no tar file"),
        "compressed": (gzip.compress(whole), "compressed with gzip"),
    }
    for name, (content, expected) in cases.items():
        path = tmp_path / "a.tar"
        path.write_bytes(content)
        message = refused(path, "tar")
        assert expected in message and "a.tar" in message, name
    assert scan_of(tmp_path / "b.tar", "tar").rows == () if (tmp_path / "b.tar").write_bytes(bytes(10240)) else False
    (tmp_path / "c.tar").write_bytes(whole[: 512 * 2 * len(PLAIN)])  # no end mark, as of a writer that was stopped between two samples
    assert read_all(tmp_path / "c.tar", "tar").num_rows == 20


def test_limits_on_members_and_headers(tmp_path):
    path = write(tmp_path, PLAIN)
    assert read_all(path, "tar", limits=SourceLimits(max_members=40)).num_rows == 20
    assert "data.max_members" in refused(path, "tar", limits=SourceLimits(max_members=39))
    bomb = tarfile.TarInfo("long")
    bomb.type, bomb.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (tmp_path / "bomb.tar").write_bytes(pack(PLAIN)[: 512 * 80] + bomb.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    assert "header of 8589934592 bytes" in refused(tmp_path / "bomb.tar", "tar")
    sparse = tarfile.TarInfo("s.jpg")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    (tmp_path / "sparse.tar").write_bytes(pack(PLAIN)[: 512 * 80] + sparse.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    assert read_all(tmp_path / "sparse.tar", "tar").num_rows == 20


def test_a_remote_shard_equals_the_local_one(tmp_path):
    path = write(tmp_path, [*samples(50, jpg=os.urandom(3000), txt=b"t {}"), ("late.png", b"p")])
    remote = fsspec.filesystem("memory")
    remote.pipe("/shards/00000.tar", path.read_bytes())
    table, scan = read_all("memory://shards/00000.tar", "tar"), scan_of("memory://shards/00000.tar", "tar")
    assert table.equals(read_all(path, "tar")) and scan == scan_of(path, "tar")
    remote.pipe("/shards/00000_stats.json", b'{"successes": 50}')
    assert "51 samples" in refused("memory://shards/00000.tar", "tar")


@pytest.mark.parametrize("change", ["content", "name"])
def test_the_digest_follows_the_ends_of_a_shard(tmp_path, change):
    before = scan_of(write(tmp_path, PLAIN), "tar").digest
    changed = list(PLAIN)
    changed[-1] = (changed[-1][0], b"TEXT 19") if change == "content" else ("000019.text", changed[-1][1])
    assert scan_of(write(tmp_path, changed), "tar").digest != before
