"""FILIP's loss and its selection of tokens: F1-F5 of the method specification, law 1, its heads and module."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from protoclip_scale.engine.freezing import active_objectives, features_wanted, trained_parameters
from protoclip_scale.errors import UserError
from protoclip_scale.models.build import build_model
from protoclip_scale.models.heads import Widths
from protoclip_scale.objectives import build_objectives, features_of, heads_of
from protoclip_scale.objectives.base import Targets
from protoclip_scale.objectives.filip import ImageTokens, TextTokens, filip_loss
from protoclip_scale.objectives.shared.late_interaction import Tokens, late_similarities
from protoclip_scale.objectives.shared.selection import highest_scores, keep_best, kept_tokens, own_scores
from protoclip_scale.recipe import load_recipe
from tests.losses import angles, assert_law_1, difference, gradients, number, over_ranks, unit_rows
from tests.support import RECIPES, TINY
from tests.test_objectives_late_interaction import plain_cross_entropy

IMAGES = Tokens(torch.stack([angles(0, 40), angles(100, 160)]), torch.ones(2, 2, dtype=torch.bool))
TEXT_ROWS = torch.stack([angles(10, 50, 90), angles(110, 150, 0)])
TEXTS = Tokens(TEXT_ROWS, torch.tensor([[True, True, False], [True, True, True]]))
UNMASKED = Tokens(TEXT_ROWS, torch.ones(2, 3, dtype=torch.bool))
SCALE = number(10.0)


def whole(images: Tokens, texts: Tokens, scale=SCALE) -> torch.Tensor:
    return filip_loss(images, texts, images, texts, scale, torch.arange(len(images.rows)))


def single(rows: torch.Tensor) -> Tokens:
    return Tokens(rows[:, None], torch.ones(len(rows), 1, dtype=torch.bool))


def test_f1_one_token_a_side_is_clip():
    assert whole(single(angles(0, 60, 120)), single(angles(15, 50, 140))).item() == pytest.approx(0.0347696, abs=1e-7)


def test_f2_two_matrices_and_their_loss():
    of_images, of_texts = late_similarities(IMAGES, TEXTS), late_similarities(TEXTS, IMAGES)
    assert of_images.flatten().tolist() == pytest.approx([0.984808, 0.883022, 0.150384, 0.984808], abs=1e-6)
    assert of_texts.flatten().tolist() == pytest.approx([0.984808, 0.321394, 0.333333, 0.598656], abs=1e-6)
    assert whole(IMAGES, TEXTS).item() == pytest.approx(0.0945243, abs=1e-7)


def test_f2_counting_the_padding_gives_another_loss():
    assert whole(IMAGES, UNMASKED).item() == pytest.approx(0.1131992, abs=1e-7)
    assert late_similarities(IMAGES, UNMASKED)[1, 0].item() == pytest.approx(0.663414, abs=1e-6)
    assert late_similarities(UNMASKED, IMAGES)[0].tolist() == pytest.approx([0.870801, 0.542532], abs=1e-6)


def test_f5_scores_of_both_rules():
    image = Tokens(angles(0, 40, 100, 160)[None], torch.ones(1, 4, dtype=torch.bool))
    text = Tokens(TEXT_ROWS[:1], TEXTS.mask[:1])
    highest, own = highest_scores(image, text)[0][0], own_scores(image, Tokens(TEXT_ROWS[:1], UNMASKED.mask[:1]))[0][0]
    assert highest.tolist() == pytest.approx([0.9848, 0.9848, 0.6428, -0.3420], abs=1e-4)
    assert own.tolist() == pytest.approx([1.6276, 2.4936, 1.6276, -0.8660], abs=1e-4)
    assert own_scores(image, text)[0][0].tolist() == pytest.approx([1.6276, 1.8508, 0.6428, -1.2080], abs=1e-4), "the published code counts padding, we do not"
    assert kept_tokens(0.5, 4) == 2
    assert torch.equal(keep_best(image, highest[None], 2), image.rows[:, [0, 1]])
    assert torch.equal(keep_best(image, own.round(decimals=9)[None], 2), image.rows[:, [1, 0]]), "0 and 2 are level: the earlier one is kept"


def test_scores_equal_slow_twins(monkeypatch):
    monkeypatch.setattr("protoclip_scale.objectives.shared.selection.TILE_ELEMENTS", {"cpu": 100})
    images = Tokens(unit_rows(5, 4, 6), torch.ones(5, 4, dtype=torch.bool))
    texts = Tokens(unit_rows(5, 3, 6, seed=1), torch.arange(3) < torch.tensor([3, 1, 2, 3, 1])[:, None])
    pairs = torch.einsum("btd,nkd->btnk", images.rows, texts.rows)
    counted = pairs.masked_fill(~texts.mask, -torch.inf)
    of_images, of_texts = highest_scores(images, texts)
    assert torch.allclose(of_images, counted.amax((2, 3))) and torch.allclose(of_texts[texts.mask], pairs.amax((0, 1))[texts.mask])
    own = torch.stack([pairs[row, :, row] * texts.mask[row] for row in range(5)])
    of_images, of_texts = own_scores(images, texts)
    assert torch.allclose(of_images, own.sum(2)) and torch.allclose(of_texts[texts.mask], own.sum(1)[texts.mask])


def test_padding_is_never_kept():
    kept = keep_best(Tokens(TEXT_ROWS.masked_fill(~TEXTS.mask[..., None], torch.nan), TEXTS.mask), torch.tensor([[0.1, 0.2, torch.nan], [0.3, 0.1, 0.2]]), 3)
    assert torch.equal(kept[0], torch.stack([TEXT_ROWS[0, 1], TEXT_ROWS[0, 0], torch.zeros(2).double()]))
    assert torch.equal(kept[1], TEXT_ROWS[1, [0, 2, 1]])


TOKENS = [unit_rows(8, 5, 6), unit_rows(8, 4, 6, seed=1), number(9.0)]
TEXT_MASK = torch.arange(4) < torch.tensor([4, 1, 3, 2, 4, 2, 3, 1])[:, None]


def test_law_1_and_the_slow_twin():
    def of_rank(columns_B, local, gathered, scales):
        everything = torch.ones(8, 5, dtype=torch.bool)
        keys = Tokens(gathered[0], everything), Tokens(gathered[1], TEXT_MASK)
        return filip_loss(Tokens(local[0], everything[columns_B]), Tokens(local[1], TEXT_MASK[columns_B]), *keys, *scales, columns_B)

    def plain(image_rows, text_rows, scale):
        images, texts = Tokens(image_rows, torch.ones(8, 5, dtype=torch.bool)), Tokens(text_rows, TEXT_MASK)
        return 0.5 * (plain_cross_entropy(images, texts, scale, torch.arange(8)) + plain_cross_entropy(texts, images, scale, torch.arange(8)))

    assert_law_1(of_rank, TOKENS)
    assert difference(gradients(over_ranks(of_rank, 1), TOKENS), gradients(plain, TOKENS)) <= 1e-12


def objective(settings: str):
    return build_objectives(load_recipe(RECIPES / "demo_clip.yaml", [f"objectives.filip={settings}", "data.augmentation=declip", "data.plan.lanes=32"]))["filip"]


def of_module(made):
    """The objective on simulated ranks; what it derives is gathered, as the engine does it."""

    def of_rank(columns_B, local, gathered, scales, num_ranks):
        rows = {"filip_image": gathered[0], "filip_text": gathered[1].masked_fill(~TEXT_MASK[..., None], 0)}
        split = torch.arange(8).chunk(num_ranks)
        parts = [{name: each[part] for name, each in rows.items()} for part in split]
        derived = [made.derived(part, Targets(columns, num_columns=8)) for part, columns in zip(parts, split, strict=True)]
        whole = rows | {name: torch.cat([each[name] for each in derived]) for name in derived[0]}
        own = parts[[int(part[0]) for part in split].index(int(columns_B[0]))]
        return made.coupled(own | {"filip_scale": scales[0]}, whole, Targets(columns_B, num_columns=8))

    return of_rank


@pytest.mark.parametrize("settings", ["{groups: 4, keep: 0.5}", "{selection: reference, keep_tokens: 2}", "{keep: 1}"])
def test_law_1_with_a_selection(settings):
    """The paper's rule looks at fixed groups of lanes, so that the tokens kept do not depend on the number of ranks."""
    of_rank = of_module(objective(settings))
    expected = gradients(over_ranks(lambda *each: of_rank(*each, num_ranks=1), 1), TOKENS)
    for world in (2, 4):
        found = gradients(over_ranks(lambda *each, world=world: of_rank(*each, num_ranks=world), world), TOKENS)
        assert difference(found, expected) <= 1e-9


def test_a_selection_over_what_each_rank_holds_would_break_law_1():
    """The seeded break: as many groups as there are ranks. With one group more ranks than one are refused, before anything is computed."""
    one, two = (of_module(objective(f"{{groups: {groups}, keep: 0.25}}")) for groups in (1, 2))
    whole = gradients(over_ranks(lambda *each: one(*each, num_ranks=1), 1), TOKENS)
    assert difference(gradients(over_ranks(lambda *each: two(*each, num_ranks=2), 2), TOKENS), whole) > 1e-3
    with pytest.raises(UserError, match="objectives.filip.groups 1: the tokens of a group are chosen on one rank, and these are 2; set it to a multiple of 2"):
        objective("{groups: 1, keep: 0.25}").check_ranks(2)
    for settings, ranks in (("{groups: 4, keep: 0.25}", 2), ("{selection: reference, keep_tokens: 2}", 2), ("{keep: 1}", 2), ("{groups: 1, keep: 0.25}", 1)):
        objective(settings).check_ranks(ranks)


def test_f5_keeping_everything_equals_no_selection():
    def loss(settings):
        of_rank = of_module(objective(settings))
        return gradients(over_ranks(lambda *each: of_rank(*each, num_ranks=1), 1), TOKENS)

    everything = loss("{keep: 1}")
    assert difference(loss("{keep_tokens: 5}"), everything) <= 1e-12
    assert difference(loss("{keep_tokens: 1}"), everything) > 1e-3


def test_g4_equal_views_equal_the_single_term():
    single, average = objective("{keep: 0.5}"), objective("{keep: 0.5, further_views: true}")
    assert average.views.images == {"second": "declip"} and average.views.texts == {"eda": "eda"} and len(average.gathers) == 8
    features = {"filip_image": TOKENS[0], "filip_text": TOKENS[1].masked_fill(~TEXT_MASK[..., None], 0), "filip_scale": TOKENS[2]}
    features |= {"filip_image@second": features["filip_image"], "filip_text@eda": features["filip_text"]}
    assert single.needs < average.needs == features.keys()
    targets = Targets(torch.arange(8), num_columns=8)
    losses = [each.coupled(features, features | each.derived(features, targets), targets).item() for each in (single, average)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_wire_in_half_precision_is_near():
    features = {"filip_image": TOKENS[0].float(), "filip_text": TOKENS[1].masked_fill(~TEXT_MASK[..., None], 0).float(), "filip_scale": TOKENS[2].float()}
    targets = Targets(torch.arange(8), num_columns=8)
    losses = {}
    for products in ("fp32", "bf16"):
        made = objective(f"{{products: {products}, keep: 0.5}}")
        derived = made.derived(features, targets)
        assert {each.dtype for each in derived.values()} == {torch.float32 if products == "fp32" else torch.bfloat16}
        losses[products] = made.coupled(features, derived, targets)
    assert losses["bf16"].dtype == torch.float32 and losses["bf16"].item() == pytest.approx(losses["fp32"].item(), rel=2e-2)


def test_heads_leave_out_class_tokens_and_padding():
    torch.manual_seed(0)
    image, text = ImageTokens(7, 4, prefix=1), TextTokens(7, 4, context=6, special_tokens=True)
    tokens, mask = torch.randn(3, 5, 7), torch.arange(5) < torch.tensor([5, 3, 2])[:, None]
    of_image, of_text = image(tokens), text(tokens, mask)
    assert torch.allclose(of_image, F.normalize(image.linear(tokens[:, 1:]), dim=-1)) and of_text.shape == (3, 6, 4)
    assert torch.equal((of_text != 0).any(-1), F.pad(mask, (0, 1)))
    assert torch.allclose(of_text[mask.nonzero(as_tuple=True)].norm(dim=-1), torch.ones(10))


def test_special_tokens_are_a_choice_and_an_empty_caption_keeps_them():
    text, mask = TextTokens(7, 4, context=5, special_tokens=False), torch.arange(5) < torch.tensor([5, 3, 2])[:, None]
    kept = (text(torch.randn(3, 5, 7), mask) != 0).any(-1)
    assert kept.tolist() == [[False, True, True, True, False], [False, True, False, False, False], [True, True, False, False, False]]


def test_f3_padding_has_no_gradient_through_the_head():
    """NaN among the states of padding reaches neither weights nor other tokens."""
    torch.manual_seed(0)
    head, mask = TextTokens(7, 4, context=5, special_tokens=True), torch.arange(5) < torch.tensor([5, 3])[:, None]
    states = torch.randn(2, 5, 7)
    found = []
    for filler in (0.0, torch.nan):
        leaf = states.masked_fill(~mask[..., None], filler).requires_grad_()
        head.zero_grad()
        (head(leaf, mask) * torch.arange(4.0)).sum().backward()
        found.append([leaf.grad, head.linear.weight.grad.clone(), head.linear.bias.grad.clone()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)) and found[0][1].abs().max() > 0


def test_g3_heads_are_beside_the_embeddings():
    """The dense heads read token states: nothing that the class token's branch computes reads their weights."""
    made = objective("{}")
    assert {head.reads for head in made.heads().values()} == {("image_tokens",), ("text_tokens",), ()}
    assert all(isinstance(each.build(Widths(*[8] * len(Widths._fields)), made.recipe.model), nn.Module) for each in made.heads().values())
    assert not {"image", "text", "logit_scale"} & made.needs
    recipe = load_recipe(RECIPES / "demo_clip.yaml", [*TINY, "objectives.filip={dim: 8}"])
    objectives = build_objectives(recipe)
    model = build_model(recipe, features_of(objectives), 0, heads=heads_of(objectives)).eval()
    images, ids = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.randint(1, 400, (4, 16))
    with torch.no_grad():
        before = model(images, ids, torch.full((4,), 16), wants=features_of(objectives))
        for name, parameter in model.named_parameters():
            if name.startswith("filip_"):
                parameter.normal_()
        after = model(images, ids, torch.full((4,), 16), wants=features_of(objectives))
    changed = {name for name, rows in before.items() if not torch.equal(rows, after[name])}
    assert changed == {"filip_image", "filip_text", "filip_scale"} and before.keys() - changed == {"image", "text", "logit_scale"}


@pytest.mark.parametrize(("settings", "message"), [
    ("{keep: 0.5, keep_tokens: 16}", "objectives.filip.keep 0.5 has no effect"),
    ("{groups: 2, selection: reference}", "objectives.filip.groups 2 has no effect"),
    ("{groups: 2, keep: 1}", "objectives.filip.groups 2 has no effect"),
])  # fmt: skip
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        objective(settings)


def test_sizes_of_what_is_gathered():
    made = objective("{groups: 8}")
    sizes = {"filip_image": 49 * 256, "filip_text": 77 * 256}
    assert made.derived_sizes(sizes) == {"filip_image_keys_0": 13 * 256, "filip_text_keys_0": 20 * 256}
    assert made.loss_products(4096, sizes) == 4096 * 256 * (49 * 20 + 77 * 13) + 512 * 256 * 49 * 77
    assert objective("{keep: 1}").derived_sizes(sizes) == {}


@pytest.mark.parametrize(("tower", "size", "pooling"), [("test_convnext", 32, "head.norm."), ("mobilenetv3_small_050", 48, "conv_head."), ("test_resnet", 32, None)])
def test_what_pooling_alone_reads_trains_only_beside_an_objective_of_whole_images(tower, size, pooling):
    """Every parameter that trains has a gradient: DDP waits for all of them."""
    trained = {}
    for weight in (0.0, 1.0):
        overrides = [*TINY, f"model.image.name={tower}", f"model.image.size={size}", f"objectives={{clip: {{weight: {weight}}}, filip: {{dim: 8, keep: 1}}}}"]
        recipe = load_recipe(RECIPES / "demo_clip.yaml", overrides)
        objectives = build_objectives(recipe)
        model = build_model(recipe, features_of(objectives), 0, heads=heads_of(objectives)).train()
        trained[weight] = trained_parameters(model, recipe, objectives, 0)
        model.train_only(trained[weight])
        images, ids = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8), torch.randint(1, 400, (4, 16))
        features = model(images, ids, torch.full((4,), 16), wants=features_wanted(active_objectives(objectives, 0)))
        sum((each * torch.randn_like(each)).sum() for each in features.values()).backward()
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained[weight]
    of_images = {name.removeprefix("image_tower.trunk.") for name in trained[1.0] - trained[0.0] if name.startswith("image_tower.")}
    assert all(name.startswith(pooling) for name in of_images) and of_images if pooling else not of_images
