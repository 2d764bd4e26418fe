"""SLIP's branch: the numeric cases S1 to S7 of methods.md, and that its views cost what they must and no more."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from protoclip_scale.engine.freezing import features_wanted
from protoclip_scale.engine.schedules import Schedule
from protoclip_scale.models.batch_norm import GroupBatchNorm
from protoclip_scale.models.build import build_model
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.image import ImageTower
from protoclip_scale.models.text import TextTower
from protoclip_scale.objectives import Targets, build_objectives, features_of, heads_of, views_of
from protoclip_scale.objectives.clip import clip_loss
from protoclip_scale.objectives.simclr import simclr_loss
from protoclip_scale.recipe import Recipe, load_recipe
from tests.support import RECIPES, TINY

ROWS = 8


def ang(*degrees: float) -> torch.Tensor:
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack((radians.cos(), radians.sin()), 1)


def loss(first: torch.Tensor, second: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    return simclr_loss(first, second, first, second, temperature, torch.arange(len(first)))


def slow_twin(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """The textbook's NT-Xent over all 2N rows: a row's own column is not there at all."""
    rows = torch.cat((first, second))
    losses = []
    for row in range(len(rows)):
        others = [column for column in range(len(rows)) if column != row]
        losses.append(F.cross_entropy((rows[row] @ rows[others].T / temperature)[None], torch.tensor([others.index((row + len(first)) % len(rows))])))
    return torch.stack(losses).mean()


def recipe(*values: str) -> Recipe:
    return load_recipe(RECIPES / "demo_slip.yaml", [*TINY, "objectives.simclr={hidden_dim: 24, dim: 12}", *values])


def model_of(chosen: Recipe) -> DualEncoder:
    objectives = build_objectives(chosen)
    return build_model(chosen, features_of(objectives), 0, heads=heads_of(objectives)).double().train()


def batch() -> tuple[tuple[torch.Tensor, ...], dict[str, tuple[torch.Tensor, ...]]]:
    draws = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (ROWS, 3, 32, 32), generator=draws, dtype=torch.uint8) for _ in range(3)]
    main = images[0], torch.randint(1, 49_000, (ROWS, 16), generator=draws), torch.randint(3, 17, (ROWS,), generator=draws)
    return main, {"image@ssl_a": (images[1],), "image@ssl_b": (images[2],)}


@pytest.mark.parametrize(("temperature", "expected"), [(0.1, 0.00626870), (0.5, 0.4145031)])
def test_s1_value(temperature, expected):
    views = ang(0, 90), ang(20, 80)
    assert loss(*views, temperature).item() == pytest.approx(expected, rel=1e-6)
    assert slow_twin(*views, temperature).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 300])
def test_s2_collapsed_rows_are_guessed(rows):
    same = ang(*[40.0] * rows)
    assert loss(same, same).item() == pytest.approx(math.log(2 * rows - 1), abs=1e-9)


def test_s3_exchanged_views_and_scaled_embeddings_change_nothing():
    draws = torch.Generator().manual_seed(2)
    first, second = (F.normalize(torch.randn(6, 5, generator=draws, dtype=torch.float64), dim=1) for _ in range(2))
    assert loss(first, second).item() == pytest.approx(loss(second, first).item(), rel=1e-12)
    model, (main, views) = model_of(recipe()), batch()
    before = model(*main, wants=frozenset({"simclr@ssl_a"}), views=views)["simclr@ssl_a"]
    last = model.simclr_head.layers[-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter *= 3
    torch.testing.assert_close(model(*main, wants=frozenset({"simclr@ssl_a"}), views=views)["simclr@ssl_a"], before)


def test_s4_the_sum_with_clip_and_a_weight_of_zero():
    image, text = ang(0, 60), ang(15, 50)
    clip = clip_loss(image, text, image, text, torch.tensor([10.0], dtype=torch.float64), torch.arange(2))
    assert (clip + loss(ang(0, 90), ang(20, 80))).item() == pytest.approx(0.0572076, abs=1e-7)
    without = recipe("objectives.simclr.weight=0")
    objectives = build_objectives(without)
    assert views_of(objectives).images == {} and heads_of(objectives) == {} and features_of(objectives) == {"image", "text", "logit_scale"}
    with_it, alone = model_of(recipe()).state_dict(), model_of(without).state_dict()
    assert len(with_it) > len(alone) and all(torch.equal(tensor, with_it[name]) for name, tensor in alone.items()), "towers start alike"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_s5_a_row_is_not_held_against_itself(dtype):
    """Loss and gradient are those of the twin in which the own column does not exist; half precision is no obstacle."""
    draws = torch.Generator().manual_seed(3)
    rows = [F.normalize(torch.randn(7, 5, generator=draws, dtype=torch.float64), dim=1).to(dtype).requires_grad_() for _ in range(2)]
    loss(*rows).backward()
    twins = [each.detach().double().requires_grad_() for each in rows]
    slow_twin(*twins, 0.1).backward()
    tolerance = {torch.float64: 1e-12, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert loss(*rows).item() == pytest.approx(slow_twin(*twins, 0.1).item(), rel=1e-5 if dtype != torch.float64 else 1e-12)
    for row, twin in zip(rows, twins, strict=True):
        torch.testing.assert_close(row.grad.double(), twin.grad, rtol=tolerance, atol=tolerance)


def test_s6_the_learning_rate_of_the_published_schedule():
    slip = load_recipe(RECIPES / "yfcc15m_slip.yaml", ["schedule.total=25 epochs", "schedule.warmup_steps=100"])
    rates = Schedule(slip, steps_per_episode=100, num_rows=100 * slip.data.plan.global_batch)
    assert rates.total_steps == 2500
    for step, expected in {0: 1e-6, 50: 1.515646e-3, 99: 3e-3, 100: 3e-3, 1300: 1.505e-3, 2499: 1.00013e-5}.items():  # methods.md says 1.000013e-5 of the last, a zero too many
        assert rates.learning_rates(step)["visual"] == pytest.approx(expected, rel=3e-6), step


def simclr_gradients(model: DualEncoder, chosen: Recipe) -> dict[str, torch.Tensor | None]:
    main, views = batch()
    objective = build_objectives(chosen)["simclr"]
    features = model(*main, wants=objective.needs, views=views)
    objective.coupled(features, features, Targets(torch.arange(ROWS), num_columns=ROWS)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_s7_only_the_image_tower_and_the_head_learn_from_it():
    chosen = recipe()
    moved = {name.split(".")[0] for name, gradient in simclr_gradients(model_of(chosen), chosen).items() if gradient is not None}
    assert moved == {"image_tower", "simclr_head"}


def test_each_view_goes_through_the_head_by_itself():
    model, (main, views) = model_of(recipe()), batch()
    found = model(*main, wants=frozenset({"simclr@ssl_a", "simclr@ssl_b"}), views=views)
    norms = [layer for layer in model.simclr_head.modules() if isinstance(layer, GroupBatchNorm)]
    assert len(norms) == 2 and {int(layer.num_batches_tracked) for layer in norms} == {2}
    for view in ("ssl_a", "ssl_b"):
        pooled = model.image_tower(model.normalize_images(views[f"image@{view}"][0])).pooled
        torch.testing.assert_close(found[f"simclr@{view}"], F.normalize(model.simclr_head(pooled), dim=1))


def test_a_view_is_one_pass_of_its_tower(monkeypatch):
    calls = {ImageTower: 0, TextTower: 0}
    for tower, name in {ImageTower: "forward", TextTower: "pooled"}.items():
        run = getattr(tower, name)
        monkeypatch.setattr(tower, name, functools.partialmethod(lambda self, *inputs, tower, run, **more: calls.update({tower: calls[tower] + 1}) or run(self, *inputs, **more), tower=tower, run=run))
    for values, expected in (((), (3, 1)), (("objectives.simclr.weight=0",), (1, 1)), (("objectives.clip.weight=0",), (2, 0))):
        chosen, (main, views) = recipe(*values), batch()
        calls.update(dict.fromkeys(calls, 0))
        model_of(chosen)(*main, wants=features_wanted({name: each for name, each in build_objectives(chosen).items() if each.active(0)}), views=views)
        assert tuple(calls.values()) == expected, values


def test_it_stops_in_the_locked_ending():
    objective = build_objectives(recipe("episodes.lit={start: 3}", "schedule.total=4 episodes"))["simclr"]
    assert [objective.active(episode) for episode in range(4)] == [True, True, False, False]
