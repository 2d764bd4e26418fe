"""A whole evaluation on held-out rows of the demo corpus, with a real (untrained or trained-by-hand) model."""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from protoclip_scale.data.decode import Limits, decode_image
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.data.transforms import eval_transform
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation import pixels
from protoclip_scale.evaluation.encode import encode_images, encode_texts
from protoclip_scale.evaluation.pixels import PixelStore
from protoclip_scale.evaluation.run import baseline, evaluate
from protoclip_scale.evaluation.sets import cached_set, load_set
from protoclip_scale.models.build import build_model
from protoclip_scale.recipe import load_recipe
from protoclip_scale.recipe.schema import Evaluation, EvaluationSet
from tests.support import CORPUS, RECIPES, TINY, spawn

CPU = torch.device("cpu")
UNSEEN = {"name": "unseen", "files": "eval_unseen_concept-*.parquet", "classify": ["coarse", "label"], "exclude": {"coarse": ["flag"]}, "templates": ["{}", "a picture of {}"]}
VAL = {"name": "val", "files": "val-*.parquet", "classify": ["coarse"], "exclude": {"coarse": ["flag"]}}
SECTION = {"sets": [UNSEEN, VAL], "gallery": {"both": ["unseen", "val"]}, "probe_train": {**VAL, "name": "train"}, "batch": 32}


def recipe_with(section):
    recipe = load_recipe(RECIPES / "demo_clip.yaml", TINY)
    return recipe.model_copy(update={"evaluation": Evaluation.model_validate(section)})


@functools.cache
def tokenizer():
    return tokenizer_for(recipe_with(SECTION).model.text)


def tiny_model(recipe):
    return build_model(recipe, frozenset({"image", "text"}), seed=0)


def rows_of(*patterns):
    tables = [pq.read_table(file) for pattern in patterns for file in sorted(CORPUS.glob(pattern))]
    return pa.concat_tables(tables).to_pylist()


@functools.cache
def figures_of_demo():
    recipe = recipe_with(SECTION)
    return evaluate(tiny_model(recipe), recipe, tokenizer(), CPU)


def test_counts_and_constants_are_those_of_the_rows():
    kept = [row for row in rows_of("eval_unseen_concept-*") if row["coarse"] != "flag"]
    names = [row["coarse"] for row in kept if row["coarse"]]
    figures = figures_of_demo()
    assert figures["unseen/retrieval/n"] == len(kept) == 159
    assert figures["unseen/retrieval/captions"] == sum(len(set(row["caption"])) for row in kept) > 2 * len(kept)
    assert figures["unseen/zero_shot/coarse/n"] == len(names)
    assert figures["unseen/zero_shot/coarse/classes"] == len(set(names)) and "flag" not in names
    assert figures["unseen/zero_shot/coarse/constant"] == pytest.approx(max(map(names.count, names)) / len(names))
    assert figures["unseen/retrieval/chance_R@10"] == pytest.approx(10 / 159)
    assert figures["both/val/retrieval/n"] == 159 + figures["val/retrieval/n"]
    assert figures["both/unseen/retrieval/image_to_text/R@10"] <= figures["unseen/retrieval/image_to_text/R@10"]
    assert figures["unseen/probe/coarse/n"] <= len(names)
    assert figures["val/probe/coarse/top1"] > figures["val/probe/coarse/constant"]  # fitted on these very rows
    assert "unseen/probe/label/top1" not in figures
    assert 0 < figures["unseen/modality_gap"] < 2


def test_figures_equal_a_slow_twin_without_batches_caches_or_shared_texts():
    recipe = recipe_with(SECTION)
    model = tiny_model(recipe).eval()
    kept = [row for row in rows_of("eval_unseen_concept-*") if row["coarse"] != "flag"]
    with torch.no_grad():
        images = torch.cat([model.encode_image(eval_transform(decode_image(row["image"]["bytes"]), 32)[None]) for row in kept])
        texts = [torch.cat([model.encode_text(*tokenizer()([text])) for text in dict.fromkeys(row["caption"])]) for row in kept]
        names = sorted({row["label"] for row in kept} - {""})
        classes = [torch.cat([model.encode_text(*tokenizer()([template.replace("{}", name)])) for template in UNSEEN["templates"]]) for name in names]
    classes = torch.nn.functional.normalize(torch.stack([rows.mean(0) for rows in classes]), dim=1)
    right = [names[(classes @ image).argmax()] == row["label"] for image, row in zip(images, kept, strict=True)]
    all_texts = torch.cat(texts)
    ranks = [(all_texts @ image > (own @ image).max() + 1e-6).sum().item() for image, own in zip(images, texts, strict=True)]
    gap = (images.mean(0) - torch.stack([own[0] for own in texts]).mean(0)).norm().item()
    figures = figures_of_demo()
    assert figures["unseen/zero_shot/label/top1"] == pytest.approx(np.mean(right), abs=1.5 / len(kept))
    assert figures["unseen/retrieval/image_to_text/R@10"] == pytest.approx(np.mean([rank < 10 for rank in ranks]), abs=2.5 / len(kept))
    assert figures["unseen/modality_gap"] == pytest.approx(gap, abs=1e-5)


def _figures_in_worlds(rank, world, folder):
    recipe = recipe_with(SECTION)
    figures = {}
    for size in range(1, world + 1):
        if rank < size:
            torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
            figures[size] = evaluate(tiny_model(recipe), recipe, tokenizer(), CPU)
            torch.distributed.destroy_process_group()
    return figures


def test_1_2_and_3_ranks_give_the_same_figures(tmp_path):
    by_rank = spawn(_figures_in_worlds, 3, str(tmp_path))
    alone = by_rank[0][1]
    assert len(alone) > 50
    for size in (2, 3):
        assert all(by_rank[rank][size] == alone for rank in range(size))


def test_undecodable_images_are_counted_and_left_out(tmp_path):
    rows = rows_of("val-*")[:24]
    damaged = [dict(row) for row in rows]
    damaged[3]["image"] = {"bytes": rows[3]["image"]["bytes"][:40], "path": None}
    damaged[7]["image"] = {"bytes": b"", "path": None}
    damaged[11]["image"] = {"bytes": None, "path": None}
    damaged[13]["image"] = {"bytes": b"GIF89a nothing", "path": None}
    bad = (3, 7, 11, 13)
    sound = [row for number, row in enumerate(rows) if number not in bad]
    section = {"sets": [{"name": name, "files": f"{name}.parquet", "classify": ["coarse"]} for name in ("damaged", "sound")], "batch": 5}
    for name, content in (("damaged", damaged), ("sound", sound)):
        pq.write_table(pa.Table.from_pylist(content, schema=pq.read_schema(CORPUS / "val-00000-of-00001.parquet")), tmp_path / f"{name}.parquet", row_group_size=10)
    recipe = recipe_with(section)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(tmp_path)})})
    figures = evaluate(tiny_model(recipe), recipe, tokenizer(), CPU)
    assert figures.pop("damaged/undecodable") == len(bad)
    assert figures.pop("sound/undecodable") == 0
    of_damaged = {key.removeprefix("damaged/"): value for key, value in figures.items() if key.startswith("damaged/")}
    of_sound = {key.removeprefix("sound/"): value for key, value in figures.items() if key.startswith("sound/")}
    assert of_damaged == pytest.approx(of_sound, abs=1e-6)


def test_rows_without_captions_or_classes_are_left_out_where_they_have_none(tmp_path):
    rows = rows_of("val-*")[:12]
    for number, row in enumerate(rows):
        row["caption"] = ["", "  ", None] if number == 0 else row["caption"]
        row["coarse"] = None if number == 1 else "animal" if number % 2 else "food"
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(CORPUS / "val-00000-of-00001.parquet")), tmp_path / "rows.parquet")
    recipe = recipe_with({"sets": [{"name": "rows", "files": "rows.parquet", "classify": ["coarse"]}]})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(tmp_path)})})
    figures = evaluate(tiny_model(recipe), recipe, tokenizer(), CPU)
    assert figures["rows/retrieval/n"] == 11
    assert (figures["rows/zero_shot/coarse/n"], figures["rows/zero_shot/coarse/classes"]) == (11, 2)


def test_images_are_decoded_once_unless_they_exceed_the_budget(monkeypatch):
    rows = load_set(EvaluationSet.model_validate(UNSEEN), str(CORPUS))
    decoded = []
    monkeypatch.setattr(pixels, "decode_image", lambda data, limits: decoded.append(1) or decode_image(data, limits))
    recipe = recipe_with(SECTION)
    model = tiny_model(recipe)
    kept, fresh = PixelStore(32, Limits()), PixelStore(32, Limits(), budget_bytes=len(rows) * 3 * 32 * 32 - 1)
    first, second = (encode_images(model, kept.pixels_of(rows), len(rows), 50, CPU)[0] for _ in range(2))
    assert len(decoded) == len(rows) == 159
    third, fourth = (encode_images(model, fresh.pixels_of(rows), len(rows), 50, CPU)[0] for _ in range(2))
    assert len(decoded) == len(rows) + 2 * 4 * 50  # the last batch is a full one
    assert torch.equal(first, second) and torch.equal(first, third) and torch.equal(first, fourth)


def test_evaluation_leaves_the_model_as_it_was():
    recipe = recipe_with({**SECTION, "probe_train": None, "gallery": {}})
    model = tiny_model(recipe).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, recipe, tokenizer(), CPU)
    assert model.training and model.image_tower.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_order_and_company_of_texts_do_not_matter():
    model = tiny_model(recipe_with(SECTION))
    texts = ["clapping hands", "dog", "a much longer caption about nothing in particular", "cat"]
    whole = encode_texts(model, tokenizer(), texts, 4, CPU)
    torch.testing.assert_close(encode_texts(model, tokenizer(), texts[::-1], 3, CPU).flip(0), whole, atol=1e-6, rtol=0)


def test_baseline_is_the_untrained_model_whatever_the_recipe_starts_from():
    recipe = recipe_with({"sets": [VAL]})
    started = recipe.model_copy(update={"model": recipe.model.model_copy(update={"init_from": "nowhere/at-all"})})
    expected = evaluate(build_model(recipe, frozenset({"image", "text"}), recipe.run.seed), recipe, tokenizer(), CPU)
    assert baseline(started, tokenizer(), CPU) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": "nothing-*.parquet"}, "no files match.*nothing"),
        ({"classify": ["genus"]}, "no column 'genus'.*its columns are.*coarse"),
        ({"exclude": {"genus": ["x"]}}, "no column 'genus'"),
        ({"columns": {"image": "image", "caption": "text"}}, "no column 'text'"),
        ({"exclude": {"source": ["noto", "fluent-emoji-3d", "openclipart", "twemoji"]}}, "no row is left"),
        ({"templates": ["a photo"]}, "no place for the class name"),
    ],
)
def test_bad_sets_are_one_line(change, message):
    recipe = recipe_with({"sets": [{**UNSEEN, **change}]})
    with pytest.raises(UserError, match=message) as caught:
        evaluate(tiny_model(recipe), recipe, tokenizer(), CPU)
    assert "\n" not in str(caught.value)


def test_galleries_and_names_are_checked():
    for section, message in (({"sets": [VAL], "gallery": {"both": ["vall"]}}, "did you mean val"), ({"sets": [VAL, VAL]}, "two sets have the name")):
        recipe = recipe_with(section)
        with pytest.raises(UserError, match=message):
            evaluate(tiny_model(recipe), recipe, tokenizer(), CPU)


def test_a_set_is_read_once_per_process():
    settings = EvaluationSet.model_validate(VAL)
    assert cached_set(settings, str(CORPUS)) is cached_set(EvaluationSet.model_validate(VAL), str(CORPUS))
