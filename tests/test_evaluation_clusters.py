"""An episode's prototypes judged by the class names of held-out rows, beside figures that do not change for it."""

import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from protoclip_scale.data.decode import decode_image
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.data.transforms import eval_transform
from protoclip_scale.evaluation.run import evaluate
from protoclip_scale.models.build import build_model
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.recipe import load_recipe
from protoclip_scale.recipe.schema import Evaluation
from protoclip_scale.report.evaluation_table import rows_of_set
from tests.support import CORPUS, RECIPES, TINY_PROTOTYPES

CPU = torch.device("cpu")
SET = {"name": "val", "files": "val-*.parquet", "classify": ["coarse"], "exclude": {"coarse": ["flag"]}, "templates": ["{}", "a {}"]}


def test_clusters_of_a_held_out_set_agree_with_its_classes_as_a_slow_twin_finds():
    recipe = load_recipe(RECIPES / "demo_protoclip.yaml", TINY_PROTOTYPES)
    recipe = recipe.model_copy(update={"evaluation": Evaluation.model_validate({"sets": [SET], "batch": 32})})
    model = build_model(recipe, frozenset({"image", "text", "image_prototype", "text_prototype"}), seed=0).eval()
    tokenizer = tokenizer_for(recipe.model.text)
    rows = [row for row in pq.read_table(next(CORPUS.glob("val-*"))).to_pylist() if row["coarse"] != "flag"]
    with torch.no_grad():
        images = torch.stack([eval_transform(decode_image(row["image"]["bytes"]), recipe.model.image.size) for row in rows])
        tokens = tokenizer([row["caption"][0] for row in rows])
        features = model(images, tokens.ids, tokens.lengths, wants=frozenset({"image_prototype", "text_prototype"}))
    image, text = features["image_prototype"], features["text_prototype"]
    prototypes = EpisodePrototypes(3, {"image_centroids": image[::9], "text_centroids": text[::9], "text_from_image": text[::5], "text_from_teacher": text[::7]}, {})
    figures = evaluate(model, recipe, tokenizer, CPU, prototypes=prototypes)
    found = {key: value for key, value in figures.items() if "/clusters/" in key}
    names = [row["coarse"] or "" for row in rows]
    known = [row for row, name in enumerate(names) if name]
    expected = {}
    for title, own, centroids in (("image", image, image[::9]), ("text", text, text[::9]), ("text_from_teacher", text, text[::7])):
        clusters = torch.cdist(own.double(), centroids.double()).argmin(dim=1)[known].tolist()
        for name, score in (("ari", adjusted_rand_score), ("ami", adjusted_mutual_info_score)):
            expected[f"val/clusters/coarse/{title}/{name}"] = score([names[row] for row in known], clusters)
    assert found == pytest.approx(expected, abs=0.02)  # a batch of another size may round one row into another cluster
    assert min(found.values()) < max(found.values()) < 1
    assert {key: value for key, value in figures.items() if key not in found} == evaluate(model, recipe, tokenizer, CPU)


def test_the_table_shows_own_clusters_and_the_teachers_where_there_are_no_others():
    teacher = {"clusters/coarse/image_from_teacher/ami": 0.25, "clusters/coarse/image_from_teacher/ari": 0.1}
    assert [row[:] for row in rows_of_set(teacher, {})] == [("image from teacher clusters and coarse, AMI", "0.25", "-", "0")]
    assert [row.label for row in rows_of_set(teacher | {"clusters/label/text/ami": 0.5}, {})] == ["text clusters and label, AMI"]
