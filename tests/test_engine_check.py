"""--check: the figures it prints are right, and it finds every problem at once."""

import dataclasses
import functools

import pytest

from protoclip_scale.engine import cost
from protoclip_scale.engine.check import Check, run_check
from protoclip_scale.engine.memory import USABLE_SHARE, memory_by_strategy, parse_size, recommended, shared_memory, size_text
from protoclip_scale.engine.memory_report import memory_tables, place_of
from protoclip_scale.engine.model_cost import measure
from protoclip_scale.engine.strategy.base import Strategy
from protoclip_scale.engine.strategy.memory import LAYOUTS, Sizes
from protoclip_scale.engine.strategy.replicated import Replicated
from protoclip_scale.errors import UserError
from protoclip_scale.objectives import build_objectives
from protoclip_scale.prototypes import recording
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.recipe import load_recipe
from protoclip_scale.recipe.remarks import remarks_on
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


def test_what_few_would_mean_is_noted_and_what_ranks_cannot_do_is_a_problem(capsys):
    changes = ("objectives={clip: {}, multiview: {variant: reference, masked_text: true}, filip: {dim: 8}}", "model.text.mask_token=true")
    assert run_check(load_recipe(RECIPES / "demo_clip.yaml", (*TINY, *changes)), 2) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "problem objectives.filip.groups 1: the tokens of a group are chosen on one rank, and these are 2" in shown
    assert "note objectives.multiview.masked_text true takes captions with hidden tokens, and no objectives.mlm guesses them" in shown
    assert "note objectives.multiview.variant reference has the main pair of views, and objectives.clip has it, too" in shown
    remarks = remarks_on(load_recipe(RECIPES / "demo_declip.yaml", ("objectives.multiview.variant=paper",)))
    assert remarks == [*remarks_on(load_recipe(RECIPES / "demo_declip.yaml")), "objectives.multiview.variant paper leaves the main pair of views to objectives.clip, which has no weight, so it is in no loss"]


def test_token_features_of_all_rows_are_counted_however_towers_are_cut():
    """Twice, for their gradients."""
    with_tokens = load_recipe(RECIPES / "demo_clip.yaml", (*TINY, "optim.microbatch=2", "objectives={clip: {}, filip: {dim: 8, keep: 1}}"))
    cost = measure(with_tokens, build_objectives(with_tokens))
    assert cost.in_parts == {"filip_image", "filip_text"}
    found = shared_memory(cost, with_tokens, build_objectives(with_tokens), 2, "cpu")["activations (estimate)"]
    without = dataclasses.replace(cost, in_parts=frozenset())
    rows, numbers = with_tokens.data.plan.global_batch // 2, cost.sizes["filip_image"] + cost.sizes["filip_text"]
    assert found - shared_memory(without, with_tokens, build_objectives(with_tokens), 2, "cpu")["activations (estimate)"] == 2 * 4 * rows * numbers


def test_full_disk_is_a_problem(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    found, text = report(capsys, "demo_protoclip", *TINY_PROTOTYPES, f"run.scratch_dir={tmp_path}")
    assert found == 1 and "run.scratch_dir" in text and "spool and features need" in text and "1 kB are free" in text


def test_only_rank_zero_reports(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert report(capsys, "demo_clip", *TINY) == (0, "")


@functools.cache
def model_cost(*overrides: str):
    recipe = load_recipe(RECIPES / "demo_protoclip.yaml", [*TINY_PROTOTYPES, *overrides])
    objectives = build_objectives(recipe)
    return recipe, objectives, measure(recipe, objectives)


def test_flops_of_a_text_layer_are_those_of_the_textbook():
    """One layer more: 24 C w^2 for the projections and the MLP, 4 C^2 w for attention, C tokens of width w."""
    *_, one = model_cost()
    *_, two = model_cost("model.text.layers=2")
    tokens, width = 16, 32
    assert two.forward_flops - one.forward_flops == 24 * tokens * width**2 + 4 * tokens**2 * width
    assert two.num_parameters - one.num_parameters == 12 * width**2 + 13 * width  # four biases and two layer norms


def test_loss_memory_follows_ranks_and_clusters():
    recipe, objectives, counted = model_cost()
    for world in (1, 2):  # B x N logits with softmax, gradients of rows and columns; a tile of K = 16, twice, two gradients of P = 16
        found, rows = shared_memory(counted, recipe, objectives, world, "cpu"), 64 // world
        assert found["loss tiles"] == 4 * (2 * rows * 64 + 2 * (rows + 64) * 32 + 2 * rows * 16 + 2 * rows * 16)
        assert found["prototypes"] == 4 * 6 * 16 * 16  # K x P: both centroids, both translations, what both targets expect


def test_activations_follow_micro_batches_and_checkpointing():
    """All rows of both towers; in micro-batches those of the larger tower alone. Recomputed blocks keep their inputs, and one block's activations stand beside them."""
    recipe, objectives, counted = model_cost()
    image, text = counted.towers["image"], counted.towers["text"]
    outputs = 64 * (sum(counted.heads.values()) + 2 * 4 * 32)

    def activations(**changes) -> int:
        changed = recipe.model_copy(update={"optim": recipe.optim.model_copy(update=changes)})
        return shared_memory(counted, changed, objectives, 1, "cpu")["activations (estimate)"] - outputs

    assert activations() == 64 * (image.whole + text.whole)
    assert activations(microbatch=16) == 16 * max(image.whole, text.whole)
    assert activations(precision="bf16") == round(0.55 * activations())
    recomputed = recipe.model.model_copy(update={"image": recipe.model.image.model_copy(update={"grad_checkpointing": True})})
    found = shared_memory(counted, recipe.model_copy(update={"model": recomputed}), objectives, 1, "cpu")
    assert found["activations (estimate)"] - outputs == 64 * (image.checkpointed + text.whole)
    for world, times in ((1, True), (2, True), (4, False)):  # a rank of four has one micro-batch
        cut = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"microbatch": 16})})
        flops, before = (cost.flops_per_sample(counted, each, objectives, world) for each in (cut, recipe))
        assert sum(flops.values()) - sum(before.values()) == (counted.forward_flops if times else 0)


def test_frozen_towers_keep_nothing():
    *_, whole = model_cost("model.image.name=test_vit")
    *_, frozen = model_cost("model.image.name=test_vit", "model.frozen=[image_tower]")
    assert frozen.towers["image"] == (0, 0) and frozen.towers["text"] == whole.towers["text"]
    assert whole.trained == whole.num_parameters == frozen.trained + frozen.parameters["image_tower"]


SIZES = Sizes(parameters=1000, trained=800, largest_block=100, outside_blocks=300, averaged=True)


@pytest.mark.parametrize(
    ("layout", "numbers"),
    [  # weights, gradients, AdamW with the weights it steps on, averaged weights, buckets, host; of four ranks, in fp32 numbers
        ("DDP", (1000, 800, 1600, 250, 0, 0)),
        ("ZeRO-1", (1000, 1000, 600, 250, 800, 0)),
        ("ZeRO-2", (1000, 200, 600, 250, 800, 0)),
        ("ZeRO-3", (250, 200, 600, 250, 2800, 0)),
        ("FSDP2", (250, 200, 400, 250, 800, 0)),
        ("ZeRO-3 + CPU offload", (0, 0, 0, 0, 2800, 1300)),
    ],
)
def test_strategies_share_out_what_they_say(layout, numbers):
    found = next(each for each in LAYOUTS if each.title == layout).memory(SIZES, 4)
    assert found == tuple(4 * number for number in numbers)


def test_the_first_strategy_that_fits_is_recommended():
    recipe, objectives, counted = model_cost()
    found = memory_by_strategy(counted, recipe, objectives, 4, "cuda")
    assert [each.layout.title for each in found] == ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "ZeRO-3 + CPU offload"]
    for each in (found[0], found[2]):  # ZeRO-1 needs no less than DDP for so small a model: its bucket is as large as the gradients
        assert recommended(found, recipe, round(each.device / USABLE_SHARE) + 1) is each
        assert recommended(found, recipe, round(each.device / USABLE_SHARE) - 99) is not each
    compiled = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"compile_blocks": True})})
    sharded = [found[3], found[4]]  # only one of them compiles
    assert recommended(sharded, recipe, 10**9) is sharded[0] and recommended(sharded, compiled, 10**9) is sharded[1]
    assert recommended(found, recipe, 1000) is None
    assert [each.layout.title for each in memory_by_strategy(counted, recipe, objectives, 1, "cpu")] == ["single process"]


@pytest.mark.parametrize(("name", "title"), [("lamb", "LAMB"), ("adamw_sgd", "AdamW and SGD")])
def test_other_optimisers_are_called_by_their_names_under_the_strategies_that_take_them(name, title):
    changes = (f"optim.name={name}", *(["optim.sgd={lr: 0.02}"] if name == "adamw_sgd" else []))
    recipe, objectives, counted = model_cost(*changes)
    assert [each.layout.title for each in memory_by_strategy(counted, recipe, objectives, 4, "cuda")] == ["DDP"]
    assert {each.title for each in LAYOUTS if each.steps_whole} == {"single process", "DDP"} and name in Replicated.optimizers and name not in Strategy.optimizers
    text = sum(number for part, number in counted.parameters.items() if part.startswith("text_"))
    assert counted.by_sgd == (text if name == "adamw_sgd" else 0)
    assert memory_by_strategy(counted, recipe, objectives, 1, "cpu")[0].state.optimizer == 4 * (2 * counted.trained - counted.by_sgd)
    tables, line = memory_tables(counted, recipe, objectives, 2, place_of(2, parse_size("80GB")), "RECIPE")
    ((strategy, said),) = tables["Memory per rank, 2 ranks"]
    assert strategy == "DDP" and f", {title} " in said and "AdamW " not in said.replace(title, "") and "ddp.yaml" in line


def test_the_line_to_launch_with(capsys):
    """For a device that this machine has not, and for one that is too small for anything."""
    recipe = load_recipe(RECIPES / "demo_clip.yaml", TINY)
    assert run_check(recipe, 4, parse_size("80GB"), "recipes/demo_clip.yaml") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("launch with: "))
    assert line == "launch with: accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 4 launch/pretrain.py --recipe recipes/demo_clip.yaml --expect-ranks 4"
    counted, place = measure(recipe, build_objectives(recipe)), place_of(4, parse_size("1 MiB"))
    tables, line = memory_tables(counted, recipe, build_objectives(recipe), 4, place, "RECIPE")
    title, why = tables["Recommended strategy"][0]
    assert line is None and title == "none" and why.startswith("nothing fits into the 944 kB that may be used of 1.05 MB (--memory-per-rank)") and "optim.microbatch (now null)" in why


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("79.5 GiB", int(79.5 * 2**30)), ("640mb", 640 * 10**6), ("512 KiB", 512 * 1024)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "-1GB", "80 apples", "1e3"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="--memory-per-rank .* is no amount of memory; write for instance 80GB"):
        parse_size(text)


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
