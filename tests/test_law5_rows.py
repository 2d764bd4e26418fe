"""Law 5: the same data.plan and sources put the same rows in every batch, whatever the method."""

import numpy as np

from protoclip_scale.data.index import build_index
from protoclip_scale.data.plan import Plan
from protoclip_scale.engine.trace import read_trace
from protoclip_scale.recipe import load_recipe
from tests.support import RECIPES, TINY, TINY_PROTOTYPES, output, pretrain


def rows_by_step(run_dir) -> dict[int, list[int]]:
    table = read_trace(next((run_dir / "trace").glob("rows-*.arrows")))
    step, row = table["step"].to_numpy(), table["row_id"].to_numpy()
    return {int(number): row[step == number].tolist() for number in np.unique(step)}


def test_clip_and_protoclip_train_on_the_same_batches(tmp_path):
    short = ("schedule.total=2 episodes",)
    for recipe, settings in (("demo_clip.yaml", TINY), ("demo_protoclip.yaml", TINY_PROTOTYPES)):
        assert pretrain(tmp_path / recipe, recipe, (*settings, *short)) == [0], output(tmp_path / recipe)
    clip, protoclip = rows_by_step(tmp_path / "demo_clip.yaml"), rows_by_step(tmp_path / "demo_protoclip.yaml")
    assert clip == protoclip and len(clip) == 8 and all(len(set(rows)) == 64 for rows in clip.values())


def test_the_planned_rows_are_those_of_the_shipped_demo_recipes():
    plans = {name: load_recipe(RECIPES / name) for name in ("demo.yaml", "demo_clip.yaml", "demo_protoclip.yaml")}
    orders = [Plan(build_index(recipe.data), recipe.data.plan).episode(1).row_ids for recipe in plans.values()]
    assert all(np.array_equal(orders[0], order) for order in orders[1:])
