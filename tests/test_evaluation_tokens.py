"""A whole evaluation by tokens on held-out rows of the demo corpus: which figures a model gets, their slow twin, and any number of ranks."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from protoclip_scale.data.decode import decode_image
from protoclip_scale.data.transforms import eval_transform
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.encoded import EncodedSet
from protoclip_scale.evaluation.late_interaction import questions_of_classes, questions_of_texts
from protoclip_scale.evaluation.pixels import Preprocessing
from protoclip_scale.evaluation.provenance import provenance
from protoclip_scale.evaluation.run import baseline, evaluate, evaluate_suite
from protoclip_scale.evaluation.sets import cached_set
from protoclip_scale.evaluation.suites import suite_of_recipe
from protoclip_scale.evaluation.token_figures import _Work
from protoclip_scale.evaluation.token_scores import TokenEncoder, late_scores
from protoclip_scale.models.build import build_model
from protoclip_scale.objectives import build_objectives, features_of, heads_of
from protoclip_scale.objectives.compared import Compared, compared_by
from protoclip_scale.objectives.shared.late_interaction import Tokens
from protoclip_scale.recipe import load_recipe
from protoclip_scale.recipe.schema import Evaluation
from protoclip_scale.report.evaluation_table import evaluation_rows
from tests.support import RECIPES, TINY, spawn
from tests.test_evaluation_run import CPU, UNSEEN, VAL, rows_of, tokenizer

KINDS = ("filip_image", "filip_text")
FOUR_PLACES = (*TINY, "model.image.size=64", "objectives.filip.dim=16")  # of the image tower's map
MASKED = "model.text.mask_token=true"
SECTION = {"sets": [{**UNSEEN, "subset": 60}, {**VAL, "subset": 40}], "gallery": {"both": ["unseen", "val"]}, "probe_train": {**VAL, "name": "train"}, "knn": {}, "few_shot": {"shots": [2], "draws": 2}, "batch": 16}


def recipe_with(*values, name="demo_filip", section=SECTION):
    recipe = load_recipe(RECIPES / f"{name}.yaml", (*FOUR_PLACES, *values))
    return recipe.model_copy(update={"evaluation": Evaluation.model_validate(section)})


def model_of(recipe):
    objectives = build_objectives(recipe)
    return build_model(recipe, features_of(objectives), 0, heads=heads_of(objectives))


@functools.cache
def figures_of_demo():
    recipe = recipe_with()
    return evaluate(model_of(recipe), recipe, tokenizer(), CPU)


def measures(figures):
    return {key.split("/")[1] for key in figures if key.startswith("unseen/") and key.count("/") > 1}


@torch.no_grad()
def tokens_by_hand(model, rows, texts):
    """Of each image [T, D], and of each text [its length, D], one at a time."""
    model.eval()
    image_head, text_head = model.filip_image_head, model.filip_text_head
    images = []
    for row in rows:
        pixels = model.normalize_images(eval_transform(decode_image(row["image"]["bytes"]), 64)[None])
        images.append(F.normalize(image_head.linear(model.image_tower(pixels).tokens[0, image_head.prefix :]), dim=-1))
    found = {}
    for text in texts:
        ids, lengths = tokenizer()([text])
        found[text] = F.normalize(text_head.linear(model.text_tower(ids, lengths).tokens[0, : lengths[0]]), dim=-1)
    return images, found


def similarity(queries, keys):
    return (queries @ keys.T).amax(1).mean().item()


def test_scores_equal_a_slow_twin_without_batches_padding_or_shared_passes():
    recipe, rows = recipe_with(), rows_of("val-*")[:10]
    model = model_of(recipe)
    captions = [text for row in rows for text in dict.fromkeys(row["caption"])]
    names, prompts = ["dog", "cat food", "flag"], lambda name: [f"{name}", f"a picture of one {name}"]
    images, texts = tokens_by_hand(model, rows, [*captions, *(prompt for name in names for prompt in prompts(name))])
    pixels = torch.stack([eval_transform(decode_image(row["image"]["bytes"]), 64) for row in rows])
    encoder = TokenEncoder(model, compared_by(recipe).tokens, tokenizer(), 4, CPU)
    asked = [questions_of_classes(names, prompts), questions_of_texts(captions)]
    for budget in (1, 1 << 30):  # a batch of images at a time, and all
        (classes,), (of_images, of_texts) = late_scores(encoder, lambda places: (pixels[list(places)], None), len(rows), asked, budget)
        for row, image in enumerate(images):
            assert classes[row].tolist() == pytest.approx([sum(similarity(image, texts[prompt]) for prompt in prompts(name)) / 2 for name in names], abs=1e-5)
            assert of_images[row].tolist() == pytest.approx([similarity(image, texts[text]) for text in asked[1].texts], abs=1e-5)
            assert of_texts[row].tolist() == pytest.approx([similarity(texts[text], image) for text in asked[1].texts], abs=1e-5)


def test_a_model_of_tokens_alone_has_no_figures_of_embeddings():
    figures = figures_of_demo()
    assert measures(figures) == {"zero_shot_tokens", "retrieval_tokens", "probe_tokens", "few_shot_tokens", "knn_tokens"}
    assert figures["unseen/rows"] == 60 and not any("modality" in key or "positive" in key for key in figures)
    assert figures["unseen/zero_shot_tokens/coarse/n"] <= 60 and 0 < figures["unseen/zero_shot_tokens/coarse/constant"] < 1
    assert figures["both/val/retrieval_tokens/n"] == 100 and figures["unseen/retrieval_tokens/n"] == 60
    assert figures["both/val/retrieval_tokens/text_to_image/R@10"] <= figures["val/retrieval_tokens/text_to_image/R@10"]


def test_figures_are_those_of_the_similarities():
    """Zero-shot and both directions of retrieval of a set of 12 rows, by hand."""
    section = {"sets": [{**VAL, "subset": 12, "templates": ["{}", "a {}"]}], "batch": 5}
    recipe = recipe_with(section=section)
    model, figures = model_of(recipe), evaluate(model_of(recipe), recipe, tokenizer(), CPU)
    chosen = suite_of_recipe(recipe)
    held_out = cached_set(chosen.evaluation.sets[0], chosen.root, chosen.retry_seconds)
    rows = [{"image": {"bytes": image}} for image in held_out.image_bytes(range(12))]
    names = sorted(set(held_out.classes["coarse"]) - {""})
    images, texts = tokens_by_hand(model, rows, [*(text for own in held_out.captions for text in own), *(prompt for name in names for prompt in (name, f"a {name}"))])
    right = hits = found = asked = 0
    everything = [(text, row) for row, own in enumerate(held_out.captions) for text in own]
    for row, image in enumerate(images):
        scores = [similarity(image, texts[name]) + similarity(image, texts[f"a {name}"]) for name in names]
        right += names[max(range(len(names)), key=scores.__getitem__)] == held_out.classes["coarse"][row]
        best = max(similarity(image, texts[text]) for text in held_out.captions[row])
        hits += sum(similarity(image, texts[text]) > best + 1e-6 for text, _ in everything) < 5
        for text in held_out.captions[row]:
            own = similarity(texts[text], image)
            found, asked = found + (sum(similarity(texts[text], other) > own + 1e-6 for other in images) < 5), asked + 1
    assert figures["val/zero_shot_tokens/coarse/top1"] == pytest.approx(right / 12, abs=1e-9)
    assert figures["val/retrieval_tokens/image_to_text/R@5"] == pytest.approx(hits / 12, abs=1e-9)
    assert figures["val/retrieval_tokens/text_to_image/R@5"] == pytest.approx(found / asked, abs=1e-9)


def test_a_model_with_both_has_both():
    recipe = recipe_with("objectives.clip.weight=1", section={**SECTION, "probe_train": None, "knn": None, "few_shot": None})
    figures = evaluate(model_of(recipe), recipe, tokenizer(), CPU)
    assert measures(figures) == {"zero_shot", "retrieval", "zero_shot_tokens", "retrieval_tokens"}
    shared = {key: value for key, value in figures_of_demo().items() if "shot_tokens/c" in key and "zero" in key or "retrieval_tokens" in key}
    assert len(shared) > 20 and all(figures[key] == value for key, value in shared.items())  # the same towers, untrained


def test_which_recipes_compare_what():
    assert compared_by(recipe_with()) == Compared(False, ("filip_image", "filip_text"))
    assert compared_by(recipe_with(MASKED, name="demo_defilip")) == Compared(True, ("filip_image", "filip_text"))
    assert compared_by(recipe_with("objectives.siglip={}")).embeddings
    assert not compared_by(recipe_with("objectives.simclr={}", "objectives.clip.weight=0")).embeddings  # its head reads the tower
    assert compared_by(recipe_with("objectives.filip.weight=0", "objectives.clip.weight=1")) == Compared()


def test_a_masked_caption_is_not_what_is_evaluated():
    """DeFILIP trains on tokens of the masked view; its model is asked for those of the main one."""
    recipe = recipe_with(MASKED, name="demo_defilip", section={"sets": [{**VAL, "subset": 12}]})
    assert "filip_text" not in features_of(build_objectives(recipe))
    assert "val/zero_shot_tokens/coarse/top1" in evaluate(model_of(recipe), recipe, tokenizer(), CPU)


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside the context held at once."""

    def __init__(self):
        super().__init__()
        self.living, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.living = {key: each for key, each in self.living.items() if not each[0].expired()}
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                self.living[each.untyped_storage()._cdata] = StorageWeakRef(each.untyped_storage()), each.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.living.values()))
        return result


class OneToken(TokenEncoder):
    """Of an image the vector of its number, of a text that of its length: nothing but the answers is large."""

    def images(self, pixels):
        return Tokens(self._row(pixels), torch.ones(len(pixels), 1, dtype=torch.bool))

    def texts(self, texts):
        return self._row(torch.tensor([len(text) for text in texts]))

    def _row(self, numbers):
        return torch.stack([numbers.cos(), numbers.sin()], -1)[:, None]


def _answers_held(rank, world, folder, images=480, texts=800):
    """The answers of captions in ranks that share them out, and for how many of these all that each rank held at once is enough."""
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    encoder = OneToken(torch.nn.Identity(), KINDS, None, 50, CPU)
    with Held() as held:
        answers = late_scores(encoder, lambda places: (torch.tensor(list(places)) * 0.1, None), images, [questions_of_texts(["x" * number for number in range(texts)])])
    return held.peak / (images * texts * 8), answers[0]


def test_no_more_is_held_than_the_answers():
    expected = (torch.arange(480.0)[:, None] * 0.1 - torch.arange(800.0)).cos()
    share, answers = _answers_held(0, 1, None)
    assert share < 1.1 and max((each - expected).abs().max() for each in answers) < 1e-4


def test_a_part_of_the_images_is_forgotten_before_the_next_one_is_encoded():
    class ManyTokens(OneToken):
        def images(self, pixels):
            return Tokens(torch.ones(len(pixels), 64, 1).expand(-1, -1, 64) * pixels[:, None, None], torch.ones(len(pixels), 64, dtype=torch.bool))

        def texts(self, texts):
            return torch.ones(len(texts), 1, 64)

    encoder, size = ManyTokens(torch.nn.Identity(), KINDS, None, 10, CPU), 64 * 64 * 4
    with Held() as held:
        late_scores(encoder, lambda places: (torch.tensor(list(places)) * 0.1, None), 480, [questions_of_texts(["a", "b"])], budget_bytes=240 * size)
    assert held.peak < 300 * size  # those of 240 images, and some batches of 10 in work


@pytest.mark.slow
def test_rank_0_alone_holds_all_answers(tmp_path):
    """Another rank has its share of the images, and each 50 of the 480 images' in one direction while they go to rank 0."""
    (first, found), (second, nothing) = spawn(_answers_held, 2, str(tmp_path))
    assert first < 1.15 and second < 0.65 and torch.equal(torch.stack(found), torch.stack(_answers_held(0, 1, None)[1])) and not nothing


def test_figures_of_captions_copy_no_answers():
    images, texts, captions = 400, [f"{number}" for number in range(3000)], [[f"{number}"] if number % 2 else [] for number in range(400)]
    row = EncodedSet(SimpleNamespace(name="own"), torch.empty(images, 0), torch.empty(images, 0), torch.empty(images, 0), captions, {}, 0, list(range(images)))
    work, asked = _Work(Evaluation.model_validate({"sets": [], "gallery": {}}), {"own": row}), [questions_of_texts(texts)]
    answers = [[torch.rand(images, len(texts)), torch.rand(images, len(texts))]]
    with Held() as held:
        work.take("own", asked, answers)
    assert held.peak < 0.3 * 8 * images * len(texts) and work.figures["own/retrieval_tokens/n"] == 200 and not work.pairs


def _figures_in_worlds(rank, world, folder):
    recipe, figures = recipe_with(section={**SECTION, "batch": 7}), {}
    pixels = torch.randint(0, 256, (17, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    asked = [questions_of_texts(["a", "one cat", "two cats and a dog", "", "hen", "the end of it"])]
    for size in range(1, world + 1):
        if rank < size:
            torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
            encoder = TokenEncoder(model_of(recipe), compared_by(recipe).tokens, tokenizer(), 4, CPU)
            scores = late_scores(encoder, lambda places: (pixels[list(places)], None), len(pixels), asked, budget_bytes=1)
            figures[size] = evaluate(encoder.model, recipe, tokenizer(), CPU), scores[0]
            torch.distributed.destroy_process_group()
    return figures


@pytest.mark.slow
def test_1_2_and_3_ranks_give_the_same_figures(tmp_path):
    by_rank = spawn(_figures_in_worlds, 3, str(tmp_path))
    alone, scores = by_rank[0][1]
    assert len(alone) > 50 and len(scores) == 2 and scores[0].shape == (17, 6) and scores[0].std() > 0
    for size in (2, 3):
        assert all(by_rank[rank][size][0] == alone for rank in range(size))
        assert all(torch.equal(each, expected) for each, expected in zip(by_rank[0][size][1], scores, strict=True)) and not by_rank[1][size][1]


def test_baseline_is_measured_alike():
    recipe = recipe_with(section={"sets": [{**VAL, "subset": 12}]})
    assert baseline(recipe, tokenizer(), CPU) == evaluate(build_model(recipe, features_of(build_objectives(recipe)), recipe.run.seed, heads=heads_of(build_objectives(recipe))), recipe, tokenizer(), CPU)


def test_tables_and_result_files_show_them():
    recipe, figures = recipe_with(), figures_of_demo()
    rows = {row.label.split(" (")[0]: row for row in evaluation_rows(figures, figures)["unseen"]}
    assert {"zero-shot coarse, top 1, by tokens", "image to text, R@10, by tokens", "mean recall, R@1/5/10, by tokens", "linear probe coarse, top 1 [tokens]"} <= rows.keys()
    assert rows["zero-shot coarse, top 1, by tokens"].reference not in ("", "-")
    about = provenance(suite_of_recipe(recipe), figures, Preprocessing.of(64), "fp32")
    assert about["unseen"]["value"] == figures["unseen/zero_shot_tokens/coarse/top1"]
    json.dumps(about)


def test_a_suite_has_its_average_by_tokens(tmp_path):
    recipe = recipe_with(section={"sets": [{**VAL, "subset": 12}, {**VAL, "name": "pairs", "classify": [], "exclude": {}, "subset": 12}]})
    suite = dataclasses.replace(suite_of_recipe(recipe), name="mine")
    figures = evaluate_suite(model_of(recipe), suite, 64, tokenizer(), CPU, compared=compared_by(recipe))
    assert figures["mine/average"] == pytest.approx((figures["val/zero_shot_tokens/coarse/top1"] + figures["pairs/retrieval_tokens/mean_recall"]) / 2)


def test_an_untrained_projection_is_not_probed():
    section = {**SECTION, "probe": {"features": "projected"}}
    with pytest.raises(UserError, match="no objective trains this model's projections"):
        evaluate(model_of(recipe_with()), recipe_with(section=section), tokenizer(), CPU)


@pytest.mark.slow
def test_a_probe_of_the_tower_is_called_that():
    figures = evaluate(model_of(recipe_with()), recipe_with(section={**SECTION, "probe": {"features": "tower"}, "knn": None, "few_shot": None}), tokenizer(), CPU)
    assert "unseen/probe/coarse/top1" in figures and "unseen/probe_tokens/coarse/top1" not in figures
