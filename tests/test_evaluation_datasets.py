"""Evaluation sets of any layout: columns by name, numbered classes, and refusals in place of guesses."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.pixels import Preprocessing
from protoclip_scale.evaluation.provenance import data_fingerprint, set_provenance
from protoclip_scale.evaluation.sets import check_size, load_set
from protoclip_scale.recipe.schema import EvaluationSet
from tests.support import CORPUS

CLASSES = ("animal", "food", "vehicle")


@pytest.fixture(scope="module")
def pictures():
    """Twelve real pictures, (bytes, class, caption)."""
    rows = pq.read_table(CORPUS / "val-00000-of-00001.parquet").slice(0, 12).to_pylist()
    return [(row["image"]["bytes"], CLASSES[number % 3], row["caption"][0]) for number, row in enumerate(rows)]


def loaded(folder, **settings):
    return load_set(EvaluationSet(name="set", **{"columns": {"caption": ""}, **settings}), str(folder), 0.0)


def write_numbered(folder, pictures, name="rows.parquet"):
    """As `datasets` writes it: an Image column, and a ClassLabel with its names in the footer."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = [{"img": {"bytes": data, "path": None}, "label": CLASSES.index(own)} for data, own, _ in pictures]
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / name)


def test_class_numbers_have_the_names_that_the_files_carry(tmp_path, pictures):
    write_numbered(tmp_path, pictures)
    rows = loaded(tmp_path, files="*.parquet", columns={"image": "img", "caption": ""}, classify=("label",), classes=CLASSES)
    assert rows.classes["label"] == [own for _, own, _ in pictures] and rows.captions == [[]] * 12
    assert rows.image_bytes([1, 5]) == [pictures[1][0], pictures[5][0]]


def test_files_that_name_their_numbers_differently_are_refused(tmp_path, pictures):
    write_numbered(tmp_path, pictures)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    datasets.Dataset.from_list([{"img": {"bytes": pictures[0][0], "path": None}, "label": 1}], features=features).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UserError, match="give its numbers different names"):
        loaded(tmp_path, files="*.parquet", columns={"image": "img", "caption": ""}, classify=("label",))


def test_a_folder_for_each_class(tmp_path, pictures):
    for number, (data, own, _) in enumerate(pictures):
        (tmp_path / "set" / own).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / own / f"{number:02d}.webp").write_bytes(data)
    rows = loaded(tmp_path, files="set", format="folder", classify=("folder",), classes=CLASSES)
    assert rows.classes["folder"] == sorted(own for _, own, _ in pictures)
    assert rows.image_bytes([0, 1, 4]) == [pictures[0][0], pictures[3][0], pictures[1][0]]


def test_tables_with_paths(tmp_path, pictures):
    for number, (data, _, _) in enumerate(pictures):
        (tmp_path / f"{number}.webp").write_bytes(data)
    lines = [f"{number}.webp,{own},{caption}" for number, (_, own, caption) in enumerate(pictures)]
    (tmp_path / "rows.csv").write_text("\n".join(["file,kind,text", *(line for line in lines if line.count(",") == 2)]) + "\n")
    captioned = loaded(tmp_path, files="rows.csv", columns={"image": "file", "caption": "text"}, classify=("kind",))
    assert captioned.classes["kind"][0] == "animal" and captioned.captions[0] and captioned.image_bytes([1]) == [pictures[1][0]]
    assert loaded(tmp_path, files="rows.csv", columns={"image": "file", "caption": ""}, classify=("kind",)).captions[0] == []


@pytest.fixture
def plain(tmp_path, pictures):
    """Class numbers without names."""
    table = {"image": [data for data, _, _ in pictures], "label": [CLASSES.index(own) for _, own, _ in pictures], "text": [caption for _, _, caption in pictures]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet", row_group_size=5)
    return tmp_path


def test_numbers_are_named_by_the_set(plain, pictures):
    assert loaded(plain, files="*.parquet", classify=("label",), label_names=CLASSES).classes["label"] == [own for _, own, _ in pictures]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classify": ("label",), "classes": CLASSES}, "'0' and 2 more in column 'label' is none of its 3 classes"),
        ({"classify": ("label",), "label_names": CLASSES[:2]}, "2 in column 'label' is no number of its 2 label names, 0 to 1"),
        ({"classify": ("label",), "label_names": ("animal", "fod", "vehicle"), "classes": CLASSES}, "'fod' in column 'label' is none of its 3 classes, did you mean food"),
    ],
)
def test_classes_are_never_guessed(settings, message, plain):
    with pytest.raises(UserError) as caught:
        loaded(plain, files="*.parquet", **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_excluded_rows_need_no_known_class(plain):
    rows = loaded(plain, files="*.parquet", classify=("label",), label_names=CLASSES, classes=CLASSES[:2], exclude={"label": ("vehicle",)})
    assert len(rows) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rows": 13, "classify": ("label",)}, "12 rows where there must be 13"),
        ({"num_captions": 13, "columns": {"caption": "text"}}, "12 captions where there must be 13"),
    ],
)
def test_other_sizes_than_asserted_are_refused(settings, message, plain):
    rows = loaded(plain, files="*.parquet", **settings)
    with pytest.raises(UserError, match=message):
        check_size(rows)
    check_size(rows, allow_subset=True)


def test_rows_without_a_caption_are_refused_where_all_must_have_one(tmp_path, pictures):
    pq.write_table(pa.table({"image": [data for data, _, _ in pictures], "text": [["a", "b"], [], *([["c"]] * 10)]}), tmp_path / "rows.parquet")
    rows = loaded(tmp_path, files="*.parquet", columns={"caption": "text"}, num_captions=12)
    with pytest.raises(UserError, match="1 of 12 rows have no caption"):
        check_size(rows)
    pq.write_table(pa.table({"image": [data for data, _, _ in pictures], "text": pa.array([[]] * 12, pa.list_(pa.string()))}), tmp_path / "rows.parquet")
    rows = loaded(tmp_path, files="*.parquet", columns={"caption": "text"}, metric="mean_recall")
    with pytest.raises(UserError, match="none of its 12 rows has a caption"):
        check_size(rows, allow_subset=True)


def test_the_fingerprint_follows_the_data_and_not_the_place(plain, tmp_path_factory, pictures):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "rows.parquet").write_bytes((plain / "rows.parquet").read_bytes())
    first = loaded(plain, files="*.parquet", classify=("label",))
    assert data_fingerprint(first) == data_fingerprint(loaded(elsewhere, files=str(elsewhere / "*.parquet"), classify=("label",)))
    assert data_fingerprint(first) != data_fingerprint(loaded(plain, files="*.parquet", classify=("label",), exclude={"label": ("1",)}))
    pq.write_table(pq.read_table(plain / "rows.parquet").slice(1), elsewhere / "rows.parquet")
    assert data_fingerprint(first) != data_fingerprint(loaded(elsewhere, files="*.parquet", classify=("label",)))


def test_provenance_of_a_set(plain):
    rows = loaded(plain, files="*.parquet", classify=("label",), label_names=CLASSES, classes=CLASSES, templates=("a {}", "the {}"), num_rows=13)
    figures = {"set/rows": 11, "set/undecodable": 1, "set/zero_shot/label/top1": 0.25}
    facts = set_provenance(rows, figures, Preprocessing(32), "fp32", allow_subset=True)
    assert (facts["n"], facts["undecodable"], facts["rows_found"], facts["rows_expected"], facts["subset_allowed"]) == (11, 1, 12, 13, True)
    assert (facts["prompts"], facts["templates"], facts["metric"], facts["value"], facts["classes"]) == ("ensemble", 2, "top1", 0.25, {"label": 3})
    assert facts["preprocessing"] == {"size": 32, "resize": 32, "interpolation": "bicubic", "squash": False, "mean": (), "std": ()}
    single = loaded(plain, files="*.parquet", classify=("label",), label_names=CLASSES, classes=CLASSES, templates=("a {}", "the {}"), prompts="single")
    other = set_provenance(single, figures, Preprocessing(32), "fp32", allow_subset=False)
    assert other["template_hash"] != facts["template_hash"] and other["class_hash"] == facts["class_hash"]
