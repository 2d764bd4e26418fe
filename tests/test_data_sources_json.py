"""JSON and JSON lines: blocks cut out of the file equal what json.load says, with types that hold for all of them."""

import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoclip_scale.data.sources import json_tables, lines
from tests.source_cases import read_all, refused, scan_of


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(json_tables, "BLOCK_LINES", 3)
    monkeypatch.setattr(json_tables, "CHUNK_BYTES", 64)  # values are cut everywhere
    monkeypatch.setattr(lines, "CHUNK_BYTES", 64)


def write(folder, content, name):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


text = st.text(max_size=12)
captions = st.none() | text | st.lists(text | st.none(), max_size=3)
rows = st.lists(
    st.fixed_dictionaries(
        {"image": text.filter(lambda name: "://" not in name), "number": st.integers(-(2**40), 2**40) | st.none()},
        optional={
            "caption": captions,
            "words": st.lists(text, max_size=3) | st.none(),
            "score": st.floats(allow_nan=False) | st.integers(-9, 9),
            "unused": st.dictionaries(text, text),
        },
    ),
    max_size=10,
)
LAYOUTS = {
    "lines": (
        "jsonl",
        lambda rows, **how: "\r\n".join(
            ["\ufeff" + json.dumps(row, **how) if not number else json.dumps(row, **how) + " \n" for number, row in enumerate(rows)]
        ),
    ),
    "array": ("json", lambda rows, **how: "\ufeff " + json.dumps(rows, **how)),
    "pretty": ("json", lambda rows, **how: json.dumps(rows, indent=3, **how) + "\n"),
    "object": (
        "json",
        lambda rows, **how: json.dumps({"info": {"a": [1, "]"]}, "version": 1.25e10, "images": [], "annotations": rows, "data": 3}, **how),
    ),
}


@settings(max_examples=80, deadline=None)
@given(rows, st.booleans(), st.sampled_from(sorted(LAYOUTS)))
def test_any_file_equals_its_twin(tmp_path_factory, rows, ascii_only, layout):
    rows = [{"image": "a", "caption": "c", "words": None, "score": None, "number": 1}, *rows]
    name, dump = LAYOUTS[layout]
    path = write(tmp_path_factory.mktemp("json"), dump(rows, ensure_ascii=ascii_only), f"rows.{name}")
    extra = ("number", "words", "score")
    table = read_all(path, name, {"extra": extra}, images=False)
    lists = [row.get("caption") if isinstance(row.get("caption"), list) else [row.get("caption")] for row in rows]
    assert table.column("captions").to_pylist() == [[text for text in some if text is not None] for some in lists]
    for column in extra:
        assert table.column(column).to_pylist() == [row.get(column) for row in rows]


def test_blocks_types_and_images(tmp_path):
    rows = [
        {"image": f"{number}.jpg", "caption": f"é {number}", "id": None, "mixed": number, "flags": [], "unused": {"a": 1}}
        for number in range(8)
    ]
    rows[7] |= {"id": 5, "mixed": 0.5, "flags": [True], "caption": ["a", "b"]}
    for number in range(0, 8, 2):
        (tmp_path / f"{number}.jpg").write_bytes(b"image %d" % number)
    extra = ("id", "mixed", "flags")
    for path in (
        write(tmp_path, json.dumps(rows, ensure_ascii=False), "rows.json"),
        write(tmp_path, "\n\n".join(json.dumps(row) for row in rows), "rows.jsonl"),
    ):
        layout = path.suffix[1:]
        scan = scan_of(path, layout, {"extra": extra})
        assert scan.rows == (3, 3, 2) and [scan.columns.field(name).type for name in extra] == [
            pa.int64(),
            pa.float64(),
            pa.list_(pa.bool_()),
        ]
        assert path.read_bytes()[scan.offsets[1] :].startswith(b'{"image": "3.jpg"')
        assert str(scan.columns.field("unused").type) == "null"
        table = read_all(path, layout, {"extra": extra})
        assert table.column("image").to_pylist() == [None if number % 2 else b"image %d" % number for number in range(8)]
        assert table.column("captions").to_pylist() == [[f"é {number}"] for number in range(7)] + [["a", "b"]]
        assert table.column("id").to_pylist() == [None] * 7 + [5] and table.column("mixed").to_pylist() == [0, 1, 2, 3, 4, 5, 6, 0.5]
        assert scan_of(path, layout).digest == scan.digest


def test_halves_of_characters_and_long_values(tmp_path):
    path = write(
        tmp_path,
        r'[{"image": "a", "caption": "x \ud800 y", "note": "\udfff"}, {"image": "b", "caption": "' + "long " * 100_000 + '", "note": "n"}]',
        "rows.json",
    )
    table = read_all(path, "json", {"extra": ("note",)}, images=False)
    assert table.column("captions")[0].as_py() == ["x ? y"] and table.column("note").to_pylist() == ["?", "n"]
    assert len(table.column("captions")[1].as_py()[0]) == 500_000


def test_names_that_are_not_ascii_and_numbers_across_chunks(tmp_path):
    rows = [{"image": "a", "légende": f"Ünï {number}", "größe": number} for number in range(5)]
    path = write(tmp_path, json.dumps({"version": int("1" * 300), "data": rows}, ensure_ascii=False), "rows.json")
    table = read_all(path, "json", {"caption": "légende", "extra": ("größe",)}, images=False)
    assert table.column("captions").to_pylist() == [[f"Ünï {number}"] for number in range(5)]
    assert table.column("größe").to_pylist() == list(range(5))


GOOD = '{"image": "a", "caption": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", "", "must hold an array"),
        ("a.json", f"[{GOOD}, {GOOD}", "file ends"),
        ("a.json", f"[{GOOD} {GOOD}]", "at byte 32 '{' stands where ','"),
        ("a.json", f"[{GOOD}, " + '{"image": nope, "caption": "' + "x" * 200 + '"}]', "at byte 43"),
        ("a.json", f"[{GOOD}, [1]]", "the value at byte 33 is a list"),
        ("a.json", f"{GOOD}\n{GOOD}\n", "set format: jsonl"),
        ("a.json", '{"rows": [1], "info": 2}', "its keys are rows, info"),
        ("a.json", b'[{"image": "a", "caption": "\xff"}]', "not UTF-8"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", f"[{GOOD},\n{GOOD}]", "set format: json"),
        ("a.jsonl", f"[{GOOD}]", "set format: json"),
        ("a.jsonl", f"{GOOD}\n{GOOD[:-1]}\n", "line 2 is not valid JSON"),
        ("a.jsonl", f"{GOOD}\n7\n", "line 2 is a number"),
        ("a.jsonl", GOOD.encode("utf-16"), "UTF-16"),
        ("a.jsonl", '{"image": "a", "text": "b"}', "'caption' (columns.caption of source"),
        ("a.jsonl", '{"image": 7, "caption": "b"}', "'image' holds a number"),
        ("a.jsonl", '{"image": "s3://b/a.jpg", "caption": "b"}', "tools/gather_images.py"),
        ("a.jsonl", '{"image": "a", "caption": ["b", 3]}', "'caption' holds a number"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, name, content, expected):
    message = refused(write(tmp_path, content, name), name.partition(".")[2])
    assert expected in message and name in message


def test_extra_values_without_a_common_type_or_nested_are_named(tmp_path):
    values = [1, 2, 3, 4, "five"]
    path = write(
        tmp_path, "\n".join(json.dumps({"image": "a", "caption": "b", "id": value, "box": {"x": 1}}) for value in values), "rows.jsonl"
    )
    message = refused(path, "jsonl", {"extra": ("id",)})
    assert "'id'" in message and "int64" in message and "a string" in message
    assert "'box' holds objects" in refused(path, "jsonl", {"extra": ("box",)})
    assert read_all(path, "jsonl", images=False).num_rows == 5
