"""Learning rates: cases C9 and P8 of the method specification."""

import pytest

from protoclip_scale.engine.schedules import Schedule, warmup_cosine_declip
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import load_recipe
from tests.support import RECIPES


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [(1, 1e-4), (1250, 5.498199e-4), (2499, 9.996399e-4), (2500, 1e-3), (65250, 5.000063e-4), (128000, 1.57e-13)],
)
def test_c9_declip_form(iteration, expected):
    assert warmup_cosine_declip(iteration - 1, 1e-4, 1e-3, 2500, 128001) == pytest.approx(expected, rel=5e-3 if expected < 1e-9 else 1e-6)


@pytest.mark.parametrize(
    ("step", "visual", "other"),
    [
        (0, 2.5e-8, 2.5e-8),
        (1999, 5e-5, 5e-5),
        (2000, 5e-5, 5e-5),
        (156250, 2.445149e-5, 2.525294e-5),
        (306250, 0, 4.996914e-8),
        (312499, 0, 1.28e-15),
    ],
)
def test_p8_protoclip_with_the_locked_ending(step, visual, other):
    schedule = Schedule(load_recipe(RECIPES / "cc3m_protoclip.yaml", []), steps_per_episode=3125, num_rows=2_500_000)
    rates = schedule.learning_rates(step)
    assert schedule.total_steps == 312_500
    assert rates["visual"] == pytest.approx(visual, rel=1e-6)
    assert rates["other"] == pytest.approx(other, rel=5e-3 if other < 1e-12 else 1e-6)


def test_a_learning_rate_of_the_ending_starts_a_fresh_cosine():
    recipe = load_recipe(RECIPES / "cc3m_protoclip.yaml", ["episodes.lit.lr=1e-5"])
    schedule = Schedule(recipe, steps_per_episode=3125, num_rows=2_500_000)
    assert schedule.learning_rates(306_250) == {"visual": 0.0, "other": pytest.approx(1e-5)}
    assert schedule.learning_rates(309_375)["other"] == pytest.approx(0.5e-5)


@pytest.mark.parametrize(("total", "steps"), [("2 episodes", 20), ("3 epochs", 30), ("1.5 epochs", 15), ("17 steps", 17)])
def test_units_of_the_length(total, steps):
    recipe = load_recipe(RECIPES / "demo_clip.yaml", [f"schedule.total={total}", "schedule.warmup_steps=1", "data.plan.global_batch=128"])
    assert Schedule(recipe, steps_per_episode=10, num_rows=1280).total_steps == steps


def test_a_warmup_that_never_ends_is_refused():
    recipe = load_recipe(RECIPES / "demo_clip.yaml", ["schedule.total=1 episodes", "schedule.warmup_steps=10"])
    with pytest.raises(UserError, match="warmup_steps 10"):
        _ = Schedule(recipe, steps_per_episode=10, num_rows=1280).total_steps
