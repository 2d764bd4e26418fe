"""Frozen parts: bit-equal after training under every strategy, while the rest trains as in a slow twin that never knew of them."""

from pathlib import Path

import pytest
import torch

from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.freezing import trained_parameters
from protoclip_scale.engine.microbatches import refuse_batch_norm
from protoclip_scale.errors import UserError
from protoclip_scale.models.build import build_model
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives import build_objectives
from protoclip_scale.objectives.clip import clip_loss
from protoclip_scale.recipe import load_recipe
from tests.strategies import batches_of, environment, fill_spool, recipe_with, saved, trainer_of, weights
from tests.support import RECIPES, TINY, spawn

FEATURES = frozenset({"image", "text", "logit_scale"})
FROZEN = ("image_tower.", "text_tower.encoder.embeddings.token_embedding.")
STEPS, RATE = 3, 1e-2
# batch norm in the image tower, which a frozen tower does not update, so micro-batches are allowed
SETTINGS = ("model.frozen=[image_tower, token_embedding]", "optim.microbatch=16", "optim.eps=1e-3", "optim.weight_decay=0.5")


def trained(rank: int, world: int, spool_folder: str, folder: str) -> dict[str, torch.Tensor]:
    """All weights after some steps; what AdamW keeps moments of is told by its name alone."""
    torch.set_num_threads(1)
    accelerator = strategies.start(timeout_minutes=2)
    recipe = recipe_with("clip", *SETTINGS)
    trainer, batches = trainer_of(recipe, accelerator), batches_of(recipe, spool_folder, 0)
    trainer.build(0)
    trainer.model.train()
    for step in range(STEPS):
        trainer.strategy.set_learning_rates({"visual": RATE, "other": RATE})
        trainer.strategy.backward(trainer.loss(batches[step], 0, None).total)
        assert trainer.strategy.update().taken
    kept = {name.split("/")[1] for name in saved(trainer, Path(folder) / "saved").names("optimizer/")}
    return weights(trainer) | {f"{name} has moments": torch.ones(()) for name in kept}


def twin(spool_folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights before and after the same steps of a plain loop in which the frozen tensors are no parameters of the optimiser, and the tower evaluates."""
    recipe = recipe_with("clip", *SETTINGS)
    model = build_model(recipe, FEATURES, recipe.run.seed).train()
    model.image_tower.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    free = {name: parameter for name, parameter in model.named_parameters() if not name.startswith(FROZEN)}
    groups = [{"params": [free[name] for name in free if model.parameter_groups()[name].decay is decays], "weight_decay": 0.5 * decays} for decays in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=recipe.optim.betas, eps=1e-3)
    batches = batches_of(recipe, spool_folder, 0)
    for step in range(STEPS):
        optimizer.zero_grad()
        each = model(batches[step].images, batches[step].token_ids, batches[step].token_lengths, wants=FEATURES)
        clip_loss(each["image"], each["text"], each["image"], each["text"], each["logit_scale"], torch.arange(len(each["image"]))).backward()
        torch.nn.utils.clip_grad_norm_(free.values(), recipe.optim.max_norm or float("inf"))
        optimizer.step()
    return before, model.state_dict()


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    return fill_spool(tmp_path_factory.mktemp("spool"), recipe_with("clip"), 0)


@pytest.fixture(scope="module")
def slow(spool_folder):
    return twin(spool_folder)


@pytest.mark.parametrize("strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3", "fsdp2"))])
def test_frozen_parts_stand_still_and_the_rest_trains_as_in_the_twin(slow, spool_folder, tmp_path, strategy):
    before, after = slow
    for found in spawn(trained, 2, spool_folder, str(tmp_path), env=environment(strategy, 2)):
        frozen = [name for name in before if name.startswith(FROZEN)]
        assert len(frozen) > 20 and any("running_mean" in name for name in frozen)
        assert all(torch.equal(found[name], before[name]) for name in frozen)
        for name, tensor in after.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
            assert (f"{name} has moments" in found) == (not name.startswith(FROZEN))
        moved = [name for name in after if not torch.equal(before[name], after[name])]
        assert {"image_projection.weight", "text_projection.weight", "logit_scale.log"} <= set(moved) and not any(name.startswith(FROZEN) for name in moved)


def model_of(*values: str) -> tuple[DualEncoder, frozenset[str]]:
    recipe = load_recipe(RECIPES / "demo_clip.yaml", [*TINY, *values])
    model = build_model(recipe, FEATURES, 0)
    names = trained_parameters(model, recipe, build_objectives(recipe), 0)
    model.train_only(names)
    return model.train(), frozenset(name for name, _ in model.named_parameters()) - names


def test_each_part_is_what_it_says():
    vit = ("model.image.name=test_vit", "model.image.size=160")
    assert model_of(*vit, "model.frozen=[patch_embedding]")[1] == {"image_tower.trunk.patch_embed.proj.weight", "image_tower.trunk.patch_embed.proj.bias"}
    assert model_of("model.frozen=[token_embedding]")[1] == {"text_tower.encoder.embeddings.token_embedding.weight"}
    for side in ("image", "text"):
        model, frozen = model_of(f"model.frozen=[{side}_tower]")
        assert frozen == {name for name, _ in model.named_parameters() if name.startswith(f"{side}_tower.")}
        assert model.frozen_towers == {side} and not getattr(model, f"{side}_tower").training and model.training
    with pytest.raises(UserError, match="model.frozen names patch_embedding, but model.image.name test_resnet has none; remove it"):
        model_of("model.frozen=[patch_embedding]")


@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("side", ["image", "text"])
def test_a_frozen_tower_keeps_nothing_for_the_backward_pass_but_what_it_gives(side, microbatch):
    model, _ = model_of(f"model.frozen=[{side}_tower]", "model.image.name=test_convnext")
    inputs = torch.zeros(8, 3, 32, 32), torch.ones(8, 16, dtype=torch.int64), torch.full((8,), 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        feature = model(*inputs, wants=frozenset({side}), microbatch=microbatch)[side]
    assert feature.requires_grad  # of the projection
    width = getattr(model, f"{side}_tower").num_features
    assert sum(kept) <= 8 * (width + 4 * model.embed_dim) + width * model.embed_dim  # one pooled row each, the projection, the normalisation
    feature.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {f"{side}_projection.weight"}


def test_micro_batches_of_a_frozen_tower_with_batch_norm_are_allowed():
    cut = ("optim.microbatch=16",)
    for values, refused in ((("model.frozen=[image_tower]",), False), (("model.frozen=[text_tower]",), True), ((), True)):
        recipe = load_recipe(RECIPES / "demo_clip.yaml", [*TINY, *cut, *values])
        model = build_model(recipe, FEATURES, 0)
        if refused:
            with pytest.raises(UserError, match="has batch norm"):
                refuse_batch_norm(model, recipe, 1)
        else:
            refuse_batch_norm(model, recipe, 1)


def test_check_shows_rates_and_remarks_on_random_frozen_parts():
    from protoclip_scale.engine.check import Check

    def checked(*values: str) -> Check:
        check = Check(load_recipe(RECIPES / "demo_clip.yaml", [*TINY, *values]), 1)
        check.model()
        return check

    vit = ("model.image.name=test_vit", "model.image.size=160")
    check = checked(*vit, "model.frozen=[patch_embedding, token_embedding]", "optim.layer_decay={image: 0.5}")
    remarks = [line for line in check.remarks if "frozen" in line]
    assert remarks == ["model.frozen token_embedding keeps random weights: neither model.text.pretrained nor model.init_from gives it any"]
    (table,) = [each for each in check.tables if each.title == "Learning-rate factors"]
    assert [list(column.cells) for column in table.columns] == [["image tower", "text tower", "projections, heads, temperatures"], ["0.00781 to 0.5, 7 layers", "1", "1"]]
    both = checked("model.frozen=[image_tower, text_tower]")
    assert sum("keeps random weights" in line for line in both.remarks) == 2 and any("leaves projections, heads and temperatures" in line for line in both.remarks)
    assert not [each for each in both.tables if each.title == "Learning-rate factors"]
    problems = checked("model.frozen=[patch_embedding]").problems
    assert len(problems) == 1 and "model.image.name test_resnet has none" in problems[0]


def test_an_unknown_part_is_named():
    with pytest.raises(UserError) as caught:
        load_recipe(RECIPES / "demo_clip.yaml", [*TINY, "model.frozen=[patch_embeding]"])
    assert "model.frozen" in str(caught.value) and "did you mean patch_embedding" in str(caught.value)
