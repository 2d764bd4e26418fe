"""Optimisers beside AdamW: the split of DeCLIP's paper and LAMB, against the libraries' own steps, through a checkpoint, and refused where weights are flattened."""

from pathlib import Path

import pytest
import timm.optim
import torch

from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.strategy.replicated import Replicated
from protoclip_scale.errors import UserError
from protoclip_scale.models.build import build_model
from protoclip_scale.objectives import Targets, build_objectives
from protoclip_scale.recipe import load_recipe
from tests.strategies import batches_of, fill_spool, recipe_with, saved, trainer_of, weights
from tests.support import RECIPES, TINY, spawn

FEATURES = frozenset({"image", "text", "logit_scale"})
SPLIT = ("optim.name=adamw_sgd", "optim.sgd={lr: 0.02, weight_decay: 0.3, momentum: 0.8}")
LAMB = ("optim.name=lamb",)
# a tower without kinks, so that rounding, which differs with the number of ranks, stays small
COMMON = ("model.image.name=test_convnext", "optim.max_norm=null", "optim.weight_decay=0.5", "optim.eps=1e-3", "optim.lr=1e-2")
RATES = ({"visual": 1e-2, "other": 1e-2}, {"visual": 5e-3, "other": 4e-3}, {"visual": 1e-3, "other": 2e-3})


def trained(rank: int, world: int, spool_folder: str, folder: str, values: tuple[str, ...], stop: int | None) -> dict[str, torch.Tensor]:
    """All weights after some steps; with ``stop`` the model and its optimiser are made anew there from a checkpoint."""
    torch.set_num_threads(1)
    recipe = recipe_with("clip", *COMMON, *values)
    trainer, batches = trainer_of(recipe, strategies.start(timeout_minutes=2)), batches_of(recipe, spool_folder, 0)
    trainer.build(0)
    for step, rates in enumerate(RATES):
        if step == stop:
            trainer.build(0, saved(trainer, Path(folder) / "saved"))
        trainer.model.train()
        trainer.strategy.set_learning_rates(rates)
        trainer.strategy.backward(trainer.loss(batches[step], 0, None).total)
        assert trainer.strategy.update().taken
    return weights(trainer)


def twin(spool_folder: str, values: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The same steps by the libraries' optimisers over lists that are written out here."""
    recipe = recipe_with("clip", *COMMON, *values)
    model = build_model(recipe, FEATURES, recipe.run.seed).train()
    chosen = recipe.optim
    parts: dict[tuple[bool, bool, bool], list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        is_text, is_visual = name.startswith("text_"), name.startswith("image_")
        parts.setdefault((is_text, is_visual, parameter.squeeze().dim() > 1), []).append(parameter)
    optimizers = []
    for (is_text, is_visual, decays), parameters in parts.items():
        side = "visual" if is_visual else "other"
        if chosen.name == "lamb":
            each = timm.optim.Lamb(parameters, betas=chosen.betas, eps=1e-3, weight_decay=0.5 * decays, max_grad_norm=None)
        elif is_text:
            each = torch.optim.SGD(parameters, lr=1, momentum=0.8, weight_decay=0.3 * decays)
        else:
            each = torch.optim.AdamW(parameters, betas=chosen.betas, eps=1e-3, weight_decay=0.5 * decays)
        optimizers.append((each, side, 2.0 if is_text and chosen.name == "adamw_sgd" else 1.0))
    batches = batches_of(recipe, spool_folder, 0)
    objective = build_objectives(recipe)["clip"]
    for step, rates in enumerate(RATES):
        batch = batches[step]
        features = model(batch.images, batch.token_ids, batch.token_lengths, wants=FEATURES)
        loss = objective.coupled(features, features, Targets(torch.arange(len(batch.images))))
        model.zero_grad()
        loss.backward()
        for each, side, factor in optimizers:
            for group in each.param_groups:
                group["lr"] = rates[side] * factor
            each.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    return fill_spool(tmp_path_factory.mktemp("spool"), recipe_with("clip"), 0)


@pytest.mark.parametrize("values", [SPLIT, pytest.param(LAMB, marks=pytest.mark.slow)], ids=["split", "lamb"])
def test_steps_are_those_of_the_libraries_also_through_a_checkpoint(spool_folder, tmp_path, values):
    expected = twin(spool_folder, values)
    whole = spawn(trained, 1, spool_folder, str(tmp_path / "one"), values, None)[0]
    for name, tensor in expected.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    resumed = spawn(trained, 1, spool_folder, str(tmp_path / "again"), values, 2)[0]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    for found in spawn(trained, 2, spool_folder, str(tmp_path / "two"), values, 2):
        for name, tensor in whole.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_sharded_strategies_refuse_them():
    from protoclip_scale.engine.strategy.zero import Zero  # with DeepSpeed, which the processes of this file need not import

    assert Zero.optimizers == {"adamw"} and Replicated.optimizers == {"adamw", "adamw_sgd", "lamb"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("optim.name=adamw_sgd",), "optim.name adamw_sgd needs optim.sgd"),
        (("optim.sgd={lr: 0.1}",), "optim.sgd has no effect with optim.name adamw"),
        (("optim.name=adamw_sgd", "optim.sgd={lr: 0.1, momentum: 0, nesterov: true}"), "optim.sgd.nesterov true has no effect"),
        (("optim.name=adamwsgd",), "did you mean adamw_sgd"),
    ],
)
def test_settings_without_effect_are_refused(values, expected):
    with pytest.raises(UserError) as caught:
        load_recipe(RECIPES / "demo_clip.yaml", [*TINY, *values])
    assert expected in str(caught.value) and "\n" not in str(caught.value)
