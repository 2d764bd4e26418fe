"""Teacher features: the right row for every row id, other data refused, and an extraction that survives interruptions."""

import io
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from PIL import Image

from protoclip_scale.data.index import build_index
from protoclip_scale.data.rows import pack_row_ids
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.prototypes.teacher import open_teacher
from protoclip_scale.recipe.load import load_recipe
from tests.support import CORPUS, RECIPES
from tests.teachers import HashEncoder, data_of, extracted, folder_bytes, own_captions, slow_embedding
from tools import extract_teacher as tool

SHIPPED = RECIPES / "demo_corpus_teacher"


class FailingEncoder(HashEncoder):
    """Is interrupted after some calls."""

    def __init__(self, calls: int):
        super().__init__()
        self.calls = calls

    def encode(self, rows: pa.Table) -> np.ndarray:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().encode(rows)


def test_shipped_features_are_those_of_each_row_and_of_no_neighbour():
    recipe = load_recipe(RECIPES / "demo.yaml")
    captions = own_captions(recipe.data)
    teacher = open_teacher(SHIPPED, build_index(recipe.data))
    pca = safetensors.numpy.load_file(SHIPPED / "pca.safetensors")
    row_ids = np.array(list(captions))[[0, 63, 64, 700, 2047, 4948]]
    twin = np.stack([(slow_embedding(captions[row_id]) - pca["mean"]) @ pca["components"].T for row_id in row_ids])
    found = teacher.rows(row_ids)
    np.testing.assert_allclose(found, twin, atol=1e-3)
    assert teacher.dim == 64 and found.dtype == np.float32 and teacher.info["model"] == "minilm"
    neighbours = teacher.rows(np.array(list(captions))[[1, 62, 65, 701, 2048, 4947]])
    assert (np.abs(neighbours - twin).max(axis=1) > 0.05).all(), "an off-by-one would be seen"
    equal = [row_id for row_id, caption in captions.items() if caption == "8ball" or caption == captions[row_ids[0]]]
    np.testing.assert_allclose(teacher.rows(np.array(equal)), np.repeat(found[:1], len(equal), axis=0), atol=1e-3)


def test_shipped_store_is_small_and_whole():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1_000_000
    store = FeatureStore.open(SHIPPED)
    rows = np.concatenate([block for _, block in store.blocks("teacher", 0)])
    assert rows.shape == (4949, 64) and store.dtype == np.float16
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-3)
    deviations = rows.std(axis=0)
    assert (np.diff(deviations) < 1e-4).all() and deviations[0] > 2.5 * deviations[-1], "principal components, largest first, not whitened"


def test_rows_are_found_in_any_order_of_sources(tmp_path):
    files = ("train-00000-of-00010.parquet", "train-00001-of-00010.parquet", "val-*.parquet")
    extracted(data_of(CORPUS, *files), tmp_path / "teacher", dim=8)
    pca = safetensors.numpy.load_file(tmp_path / "teacher" / "pca.safetensors")
    for order in (files, files[::-1], files[1:]):
        data = data_of(CORPUS, *order)
        captions = own_captions(data)
        row_ids = np.random.default_rng(0).permutation(np.array(list(captions)))[:300]
        twin = (HashEncoder().captions([captions[row_id] for row_id in row_ids]) - pca["mean"]) @ pca["components"].T
        found = open_teacher(tmp_path / "teacher", build_index(data)).rows(row_ids)
        np.testing.assert_allclose(found, twin, atol=1e-3)
        assert np.abs(np.roll(found, 1, axis=0) - twin).max() > 0.1


def test_other_data_is_refused_naming_both(tmp_path):
    index = build_index(data_of(CORPUS, "val-*.parquet"))
    with pytest.raises(UserError) as error:
        open_teacher(SHIPPED, index)
    there = FeatureStore.open(SHIPPED).info["sources"][0]["fingerprint"]
    assert index.fingerprints[0][:16] in str(error.value) and there[:16] in str(error.value) and "val-*.parquet" in str(error.value)


def test_changed_data_of_the_same_length_is_refused(tmp_path):
    for name in ("val-00000-of-00001.parquet", "train-00000-of-00010.parquet"):
        shutil.copy(CORPUS / name, tmp_path / name)
    data = data_of(tmp_path, "val-*.parquet")
    extracted(data, tmp_path / "teacher")
    open_teacher(tmp_path / "teacher", build_index(data))
    table = pq.read_table(tmp_path / "val-00000-of-00001.parquet")
    pq.write_table(table.take(np.arange(table.num_rows)[::-1]), tmp_path / "val-00000-of-00001.parquet", row_group_size=64)
    with pytest.raises(UserError, match="made from other data"):
        open_teacher(tmp_path / "teacher", build_index(data))


def test_stores_that_are_no_teacher_are_refused(tmp_path):
    index = build_index(data_of(CORPUS, "val-*.parquet"))
    with pytest.raises(UserError, match="no manifest"):
        open_teacher(tmp_path / "nothing", index)
    store = FeatureStore.create(tmp_path / "episode", {"image": 2}, 1, 3)
    with store.writer(0) as writer:
        writer.write(slice(0, 3), {"image": np.ones((3, 2))})
    store.seal()
    with pytest.raises(UserError, match=r"not made by tools/extract_teacher\.py"):
        open_teacher(tmp_path / "episode", index)


@pytest.mark.parametrize("calls", [0, 2, 5])
def test_an_interrupted_extraction_ends_with_the_same_bytes(tmp_path, calls):
    data = data_of(CORPUS, "train-0000[01]-of-00010.parquet", "val-*.parquet")
    extracted(data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        extracted(data, tmp_path / "parts", FailingEncoder(calls))
    with pytest.raises(UserError):
        FeatureStore.open(tmp_path / "parts")
    rest = FailingEncoder(1000)
    extracted(data, tmp_path / "parts", rest)
    blocks = len(build_index(data).block_rows)
    assert 1000 - rest.calls == blocks - calls, "finished blocks are not encoded again"
    assert folder_bytes(tmp_path / "parts") == folder_bytes(tmp_path / "whole")
    assert not (tmp_path / "parts.partial").exists()


def test_a_finished_extraction_is_kept_and_another_teacher_refused(tmp_path):
    data = data_of(CORPUS, "val-*.parquet")
    extracted(data, tmp_path / "teacher")
    extracted(data, tmp_path / "teacher", FailingEncoder(0))
    with pytest.raises(UserError, match="features of another teacher"):
        extracted(data, tmp_path / "teacher", HashEncoder(caption="join"))
    (tmp_path / "teacher" / "manifest.json").unlink()
    with pytest.raises(UserError, match="features of another teacher"):
        extracted(data, tmp_path / "teacher", HashEncoder(caption="join"))
    with pytest.raises(UserError, match=r"begun with other .*info"):
        try:
            extracted(data, tmp_path / "begun", FailingEncoder(1))
        except KeyboardInterrupt:
            extracted(data, tmp_path / "begun", HashEncoder(tokens=5))
    with pytest.raises(UserError, match="--dim 9 is more than the 8 features"):
        extracted(data, tmp_path / "wide", dim=9)


def test_pca_is_that_of_numpy(tmp_path):
    data = data_of(CORPUS, "train-00000-of-00010.parquet")
    extracted(data, tmp_path / "teacher")
    embeddings = HashEncoder().captions(list(own_captions(data).values()))
    centred = (embeddings - embeddings.mean(axis=0)).astype(np.float64)
    _, values, components = np.linalg.svd(centred, full_matrices=False)
    components = components[:4] * np.sign(components[np.arange(4), np.abs(components[:4]).argmax(axis=1)])[:, None]
    store = FeatureStore.open(tmp_path / "teacher")
    np.testing.assert_allclose(store.rows("teacher", 0, np.arange(store.num_rows)), centred @ components.T, atol=2e-3)
    assert store.info["explained_variance"] == pytest.approx((values[:4] ** 2).sum() / (values**2).sum(), abs=1e-3)


@pytest.fixture
def recipe(tmp_path) -> str:
    """14 rows, one of them without a caption."""
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    captions = [[f"a picture of thing number {number}"] for number in range(12)] + [[], ["", "second"]]
    pq.write_table(pa.table({"image": [image.getvalue()] * 14, "caption": pa.array(captions, pa.list_(pa.string()))}), tmp_path / "a.parquet")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {sources: [{files: a.parquet}], plan: {global_batch: 8}}\nmodel: {image: {name: resnet10t}}\n"
        "objectives: {clip: }\noptim: {lr: 0.001}\nschedule: {total: 1 episodes, warmup_steps: 0}\n"
    )
    return str(path)


def test_the_tool_writes_what_the_recipe_opens_and_a_npy_that_comes_back(tmp_path, recipe, capsys):
    arguments = ["--recipe", recipe, "--set", "data.plan.episode_size=8", "--model", "minilm", "--out", str(tmp_path / "teacher")]
    assert tool.main([*arguments, "--dim", "6", "--npy-out", str(tmp_path / "six.npy"), "--expect-ranks", "1"]) == 0
    assert "14 rows of 6 features" in capsys.readouterr().out
    index = build_index(load_recipe(recipe, ["data.plan.episode_size=8"]).data)
    teacher = open_teacher(tmp_path / "teacher", index)
    assert teacher.rows(np.arange(14)).std(axis=0).min() > 0.01
    assert tool.main([*arguments, "--dim", "7"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --out") and error.count("\n") == 1
    assert tool.main(["--recipe", recipe, "--set", "data.plan.episode_size=8", "--from-npy", str(tmp_path / "six.npy"), "--out", str(tmp_path / "back")]) == 0
    assert np.array_equal(open_teacher(tmp_path / "back", index).rows(np.arange(14)), teacher.rows(np.arange(14)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "minilm", "--caption", "random"], "--caption random: a teacher has one feature for each row"),
        (["--model", "."], "transformers cannot load it"),
        (["--model", "minilm", "--dim", "385"], "--dim 385 is more than the 384 features of minilm"),
        (["--model", "minilm", "--dim", "14"], "--dim 14 needs more than 14 rows"),
        (["--model", "minilm", "--dim", "-1"], "--dim -1"),
        (["--image-model", "nothing_such"], "--image-model nothing_such is neither a timm model nor a folder"),
        (["--image-model", "efficientnet_lite0", "--tokens", "5"], "--tokens has no effect with --image-model; remove it"),
        (["--from-npy", "none.npy"], "--from-npy none.npy: it cannot be read"),
        (["--from-npy", "none.npy", "--dim", "8"], "--dim has no effect with --from-npy; remove it"),
        (["--weights", "w.safetensors"], "--weights has no effect with --model; remove it"),
        (["--model", "minilm", "--expect-ranks", "2"], "--expect-ranks 2, but 1 ranks run"),
        (["--model", "minilm", "--set", "data.sources=[{files: none.parquet}]"], "no files match"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, recipe, capsys, arguments, message):
    assert tool.main(["--recipe", recipe, "--set", "data.plan.episode_size=8", *arguments, "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


def test_an_output_that_cannot_be_is_told_before_anything_is_encoded(tmp_path, recipe, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken").mkdir()
    arguments = ["--recipe", recipe, "--set", "data.plan.episode_size=8", "--model", "minilm", "--dim", "6", "--out"]
    for out in ("file", "file/x", "broken"):
        for content in ("", "[1]", '{"info": 1}') if out == "broken" else ("",):
            (tmp_path / "broken" / "layout.json").write_text(content)
            assert tool.main([*arguments, str(tmp_path / out)]) == 1
            error = capsys.readouterr().err
            assert error.startswith("error: ") and error.count("\n") == 1 and str(tmp_path / out) in error
    assert (tmp_path / "file").read_text() == "mine" and not list(tmp_path.glob("*.partial"))
    (tmp_path / "broken" / "manifest.json").write_text('{"schema_version": 1}')
    with pytest.raises(UserError, match="manifest.json is damaged"):
        FeatureStore.open(tmp_path / "broken")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "run", interrupted)
    assert tool.main([*arguments, str(tmp_path / "x")]) == 130 and capsys.readouterr().err.startswith("stopped")


def test_of_parts_of_one_fingerprint_the_source_s_own_is_taken_and_what_may_differ_refused(tmp_path):
    index = build_index(data_of(CORPUS, "val-*.parquet", "val-*.parquet"))
    rows, fingerprint = index.source_rows(0), index.fingerprints[0]

    def teacher(name: str, *columns: dict[str, str]):
        info = {"kind": "teacher features", "sources": [{"name": "a", "fingerprint": fingerprint, **each} for each in columns]}
        store = FeatureStore.create(tmp_path / name, {"teacher": 1}, len(columns), rows, info=info)
        for part in range(len(columns)):
            with store.writer(part) as writer:
                writer.write(slice(0, rows), {"teacher": np.full((rows, 1), part)})
        store.seal()
        return open_teacher(tmp_path / name, index)

    first_rows = pack_row_ids(np.array([0, 1]), np.array([0, 0]), np.array([0, 0]))
    for name, columns in (("npy", {}), ("text", {"caption_column": "caption"})):
        assert teacher(name, columns, columns).rows(first_rows)[:, 0].tolist() == [0, 1]
    with pytest.raises(UserError, match="which may differ"):
        teacher("differ", {"caption_column": "caption"}, {"caption_column": "title"})
    one = build_index(data_of(CORPUS, "train-00000-of-00010.parquet", "val-*.parquet"))
    extracted(data_of(CORPUS, "val-*.parquet", "train-00000-of-00010.parquet", "val-*.parquet"), tmp_path / "three")
    assert open_teacher(tmp_path / "three", one).rows(first_rows).shape == (2, 4)
