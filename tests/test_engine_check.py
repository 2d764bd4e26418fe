"""--check: the figures it prints are right, and it finds every problem at once."""

import pytest
import torch

from protoclip_scale.engine import cost
from protoclip_scale.engine.check import Check, run_check, size_text
from protoclip_scale.models.build import build_model
from protoclip_scale.objectives import build_objectives
from protoclip_scale.prototypes import recording
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.recipe import load_recipe
from tests.support import RECIPES, TINY, TINY_PROTOTYPES


def report(capsys, name: str, *overrides: str, world: int = 1) -> tuple[int, str]:
    found = run_check(load_recipe(RECIPES / f"{name}.yaml", overrides), world)
    return found, capsys.readouterr().out


def test_a_sound_recipe_has_no_problem(capsys, tmp_path):
    found, text = report(capsys, "demo_clip", *TINY, f"run.dir={tmp_path}/run", world=2)
    assert found == 0 and text.rstrip().endswith("no problems found")
    assert "global_batch: 64" in text  # the resolved recipe
    for part in ("rows of demo_corpus", "4,949", "256: 4 steps", "12 in 3 episodes, 768 samples", "64: 32 on each of 2 ranks, 16 from each of 4 lanes", "spool, all lanes"):
        assert part in text, part
    assert f"at{tmp_path}" in "".join(text.split())  # where the free space is, folded or not
    assert not (tmp_path / "run").exists()  # nothing is written


def test_every_problem_is_told_at_once(capsys, tmp_path):
    sets = "evaluation.sets=[{name: held, files: none-*.parquet}]"
    found, text = report(capsys, "demo", *TINY_PROTOTYPES, sets, f"objectives.teacher.features={tmp_path}/none", "model.init_from=runs/no-such-run", world=3)
    problems = [line for line in text.splitlines() if line.startswith("problem ")]
    assert found == len(problems) == 4
    for part in ("world size 3 does not divide data.plan.lanes 4", "none-*.parquet", "tools/extract_teacher.py", "model.init_from runs/no-such-run"):
        assert sum(part in problem for problem in problems) == 1, part


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("data.plan.episode_size=6400", "more than the 4949 rows"),
        ("data.plan.epoch_rows=5000", "data.plan.epoch_rows 5000 is more than the 4949 rows"),
        ("data.sources.0.columns.image=picture", "picture"),
        ("model.image.name=resnet51", "resnet51"),
    ],
)
def test_problems_that_only_data_and_libraries_show(capsys, override, part):
    found, text = report(capsys, "demo_clip", *TINY, override)
    assert found == 1
    assert part in next(line for line in text.splitlines() if line.startswith("problem "))


def test_missing_data_names_the_command_that_prepares_it(capsys):
    found, text = report(capsys, "yfcc15m_clip", *TINY)
    problem = next(line for line in text.splitlines() if line.startswith("problem "))
    assert found == 1 and "no files match" in problem and "prepare it with: python tools/gather_images.py --list yfcc15m_declip" in problem


def test_a_table_whose_images_are_not_there_is_a_problem(capsys, tmp_path):
    rows = "".join(f"{number}.jpg\ta picture\n" for number in range(600))
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\n" + rows)
    values = (*TINY, f"data.root={tmp_path}", "data.sources=[{files: pairs.tsv}]")
    found, shown = report(capsys, "demo_clip", *values)
    assert found == 1
    assert "32 of 32 sampled images cannot be used" in shown and "image_root" in shown and "is missing" in shown


def test_full_disk_is_a_problem(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    found, text = report(capsys, "demo_protoclip", *TINY_PROTOTYPES, f"run.scratch_dir={tmp_path}")
    assert found == 1 and "run.scratch_dir" in text and "spool and features need" in text and "1 kB are free" in text


def test_only_rank_zero_reports(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert report(capsys, "demo_clip", *TINY) == (0, "")


def model_cost(*overrides: str):
    recipe = load_recipe(RECIPES / "demo_protoclip.yaml", [*TINY_PROTOTYPES, *overrides])
    objectives = build_objectives(recipe)
    features = frozenset().union(*(each.needs for each in objectives.values()))
    model = build_model(recipe, features, seed=0)
    return recipe, objectives, model, cost.measure(model, recipe)


def test_flops_of_a_text_layer_are_those_of_the_textbook():
    """One layer more: 24 C w^2 for the projections and the MLP, 4 C^2 w for attention, C tokens of width w."""
    *_, one = model_cost()
    *_, two = model_cost("model.text.layers=2")
    tokens, width = 16, 32
    assert two.forward_flops - one.forward_flops == 24 * tokens * width**2 + 4 * tokens**2 * width
    assert two.num_parameters - one.num_parameters == 12 * width**2 + 13 * width  # four biases and two layer norms


def test_measuring_leaves_the_model_as_it_was():
    recipe, _, model, counted = model_cost()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    cost.measure(model, recipe)
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert counted.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_memory_follows_ranks_and_clusters():
    recipe, objectives, _, counted = model_cost()
    one, two = (cost.memory_per_rank(counted, recipe, objectives, world) for world in (1, 2))
    assert one["parameters"] == two["parameters"] == 4 * counted.num_parameters
    assert one["AdamW moments"] == 8 * counted.num_parameters
    for world, found in ((1, one), (2, two)):  # B x N logits with softmax, gradients of rows and columns; a tile of K = 16, twice, two gradients of P = 16
        rows = 64 // world
        assert found["loss tiles"] == 4 * (2 * rows * 64 + 2 * (rows + 64) * 32 + 2 * rows * 16 + 2 * rows * 16)
    assert one["prototypes"] == 4 * 6 * 16 * 16  # K x P: both centroids, both translations, what both targets expect
    assert abs(one["activations (estimate)"] - 2 * two["activations (estimate)"]) <= 64


def test_micro_batches_cost_a_forward_pass_and_save_activations():
    recipe, objectives, _, counted = model_cost()
    cut = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"microbatch": 16})})
    for world, times in ((1, 4), (2, 2), (4, 1)):
        memory, whole = (cost.memory_per_rank(counted, each, objectives, world)["activations (estimate)"] for each in (cut, recipe))
        assert abs(whole - times * memory) <= 64
        flops, before = (cost.flops_per_sample(counted, each, objectives, world) for each in (cut, recipe))
        assert sum(flops.values()) - sum(before.values()) == (counted.forward_flops if times > 1 else 0)


def test_feature_bytes_are_those_of_a_store(tmp_path):
    recipe = load_recipe(RECIPES / "demo.yaml", TINY_PROTOTYPES)
    students = FeatureStore.create(tmp_path / "students", {"image": 16, "text": 16}, parts=4, rows=64, row_ids=True)
    teacher = FeatureStore.create(tmp_path / "teacher", {"teacher": 8}, parts=4, rows=64)
    for store in (students, teacher):
        for part in range(4):
            store.writer(part).close()
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*.npy"))
    assert cost.feature_store_bytes(recipe, 256, teacher_dim=8) == pytest.approx(on_disk, abs=200 * 16)  # headers of .npy files


def test_recorded_features_are_counted_where_they_lie(tmp_path):
    """In the run directory: those that a checkpoint counts on, two epochs of them for ``recorded``; and one label a row."""
    values = (*TINY_PROTOTYPES, f"run.dir={tmp_path}/run", "objectives.teacher.refresh=once", "schedule.total=60 episodes", "data.plan.epoch_rows=512", "run.keep_checkpoints=2")
    for policy, episodes in (("online", 1 + 2), ("recorded", 4 + 2)):
        recipe = load_recipe(RECIPES / "demo.yaml", (*values, f"prototypes.refresh={policy}"))
        check = Check(recipe, 1)
        check.data()
        check.model()
        assert check.recorded_bytes == {"recorded features": episodes * 256 * recording.bytes_per_row(16), "teacher's labels": 4 * 4949}
    store = recording.create(tmp_path, 0, 16, 4, 64, {})
    recording.Recorder(store, range(4)).close()
    on_disk = sum(path.stat().st_size for path in store.folder.glob("*.npy"))
    assert 256 * recording.bytes_per_row(16) == pytest.approx(on_disk, abs=200 * 16)


def test_check_needs_no_prototypes_to_run():
    recipe = load_recipe(RECIPES / "demo_clip.yaml", TINY)
    check = Check(recipe, 1)
    check.data()
    assert cost.feature_store_bytes(recipe, 256, 0) == 0
    assert list(check.needed_bytes) == ["spool"]


@pytest.mark.parametrize(("number", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e15, "3,000.0 TB")])
def test_size_text(number, text):
    assert size_text(number) == text
