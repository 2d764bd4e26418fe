"""Held-out sets: captions and class names come through the source's reader, which retries and never reads images for them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip_scale.data.sources import parquet
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.sets import load_set
from protoclip_scale.recipe.schema import EvaluationSet
from tests.support import CORPUS

ROWS = {"image": [b"0", b"1", b"2", None], "text": ["a dog", None, "a cat", "a dog"], "kind": ["pet", "thing", "pet", None], "number": [7, 8, 9, 7]}


@pytest.fixture
def folder(tmp_path):
    pq.write_table(pa.table(ROWS), tmp_path / "rows.parquet", row_group_size=2)
    return tmp_path


def held_out(folder, **settings):
    return load_set(EvaluationSet(name="held out", files="*.parquet", **({"columns": {"caption": "text"}} | settings)), str(folder), 0.0)


def test_rows_captions_classes_and_images(folder):
    rows = held_out(folder, classify=("kind", "number"), exclude={"kind": ("thing",)})
    assert rows.captions == [["a dog"], ["a cat"], ["a dog"]]
    assert rows.classes == {"kind": ["pet", "pet", ""], "number": ["7", "9", "7"]}
    assert rows.places.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert rows.image_bytes(range(3)) == [b"0", b"2", b""] and rows.image_bytes(range(1, 2)) == [b"2"]


def test_the_caption_may_be_the_class(folder):
    rows = held_out(folder, classify=("text",), exclude={"text": ("a cat",)})
    assert rows.classes == {"text": ["a dog", "", "a dog"]} and rows.captions == [["a dog"], [], ["a dog"]]


def test_images_are_not_read_for_captions(folder, monkeypatch):
    asked = []
    read = parquet.Parquet.read
    monkeypatch.setattr(parquet.Parquet, "read", lambda self, place, scan, block, source, images, limits: asked.append(images) or read(self, place, scan, block, source, images, limits))
    rows = held_out(folder)
    assert asked == [False, False]
    rows.image_bytes(range(1))
    assert asked == [False, False, frozenset({0})]


@pytest.mark.parametrize("settings", [{"classify": ("breed",)}, {"exclude": {"breed": ("x",)}}])
def test_a_missing_class_column_is_named(folder, settings):
    with pytest.raises(UserError, match=r"rows\.parquet has no column 'breed' \(classify or exclude of evaluation set 'held out'\); its columns are image, text, kind, number$"):
        held_out(folder, **settings)


def test_a_class_column_that_is_the_image_is_one_line(folder):
    with pytest.raises(UserError, match="evaluation set held out .*image twice"):
        held_out(folder, classify=("image",))


def test_a_subset_is_chosen_by_hash_and_part_of_a_larger_one(folder):
    settings = {"name": "val", "files": "val-*.parquet"}
    whole = load_set(EvaluationSet.model_validate(settings), str(CORPUS))
    few, more = (load_set(EvaluationSet.model_validate({**settings, "subset": number}), str(CORPUS)) for number in (20, 60))
    places = [[tuple(place) for place in rows.places.tolist()] for rows in (few, more, whole)]
    assert (len(few), len(more)) == (20, 60) and set(places[0]) < set(places[1]) < set(places[2])
    assert places[1] == sorted(places[1]) and places[1] != places[2][:60]
    captions = dict(zip(places[2], whole.captions, strict=True))
    assert more.captions == [captions[place] for place in places[1]] and more.image_bytes([0]) == whole.image_bytes([places[2].index(places[1][0])])
    assert places[0][:3] == [(0, 5), (0, 14), (0, 21)], "another choice of rows: figures of subsets would no longer compare"
    with pytest.raises(UserError, match="subset 100000 is more than the"):
        load_set(EvaluationSet.model_validate({**settings, "subset": 100_000}), str(CORPUS))


def test_only_the_first_captions_count_where_a_protocol_says_so(folder):
    settings = {"name": "val", "files": "val-*.parquet"}
    whole, two = (load_set(EvaluationSet.model_validate({**settings, "captions_per_image": number}), str(CORPUS)) for number in (None, 2))
    assert max(map(len, whole.captions)) > 2 == max(map(len, two.captions))
