"""tools/watch.py on runs: each checkpoint once, whatever is deleted, damaged, half-written, trained again or killed meanwhile."""

import json
import os
import runpy
import shutil
import sys
import time
from collections import Counter

import pytest
import torch

from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.checkpoint.retention import remove
from protoclip_scale.evaluation import figures_csv, follow
from protoclip_scale.evaluation.run import evaluate
from protoclip_scale.evaluation.suites import suite_of_recipe
from protoclip_scale.models.build import build_model
from protoclip_scale.recipe import dump, load_recipe
from tests import support
from tests.support import CORPUS, RECIPES, ROOT, TINY, metrics, output, pretrain
from tests.test_evaluation_run import CPU, tokenizer

SETS = {"sets": [{"name": "val", "files": f"{CORPUS}/val-*.parquet", "classify": ["coarse"], "subset": 40}], "gallery": {}, "probe_train": None}
SETTINGS = (*(value for value in TINY if not value.startswith(("evaluation", "run.trace"))), f"evaluation={json.dumps(SETS)}")
KEY = "val/retrieval/mean_recall"


def _tool(log, arguments):
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.argv = ["watch.py"]
        os._exit(runpy.run_path(str(ROOT / "tools/watch.py"), run_name="tool")["main"](arguments))


def start_watch(log, run_dir, kill_at=""):
    """A real process of the tool; the log is where its lines go."""
    arguments = [str(run_dir), "--until-done", "--poll", "0.05", "--device", "cpu"]
    process = support._PROCESSES.Process(target=support._enter, args=({"PROTOCLIP_KILL_AT": kill_at}, _tool, (str(log), arguments)))
    process.start()
    return process


def ended(process) -> int:
    process.join(120)
    process.kill()
    assert process.exitcode is not None, "the watch hangs"
    return process.exitcode


def marks_of(run_dir):
    return sorted((mark.step, mark.attempt) for mark in figures_csv.read(run_dir)[1])


def test_a_watch_that_was_there_first_sees_every_checkpoint_once(tmp_path):
    """Killed twice, between figures and file and right after; meanwhile a checkpoint is deleted, one is damaged, one is half-written."""
    run_dir, log = tmp_path / "run", tmp_path / "watch.log"
    first = start_watch(log, run_dir, kill_at="watch.figures:3")
    while "waiting for a run" not in (log.read_text() if log.exists() else ""):
        assert first.is_alive(), log.read_text()
        time.sleep(0.05)
    assert not run_dir.exists()
    more = ("run.checkpoint_steps=2", "evaluation.every_episodes=0", "schedule.total=2 episodes", "run.keep_checkpoints=0")
    assert pretrain(run_dir, "demo_clip.yaml", (*SETTINGS, *more)) == [0], output(run_dir)
    assert ended(first) == -9
    steps = [line["step"] for line in metrics(run_dir, "checkpoint")]
    assert len(steps) >= 4 and len(marks_of(run_dir)) == 2
    deleted = next(step for step in steps if (step, 1) not in marks_of(run_dir))
    remove(checkpoint.folder_of(run_dir, deleted))
    shutil.copytree(checkpoint.folder_of(run_dir, steps[-1]), damaged := checkpoint.folder_of(run_dir, 7000))
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8] + b"scribble")
    half = checkpoint.folder_of(run_dir, 8000)
    half.mkdir()
    (half / shard.name).write_bytes(b"begun")

    assert ended(start_watch(log, run_dir, kill_at="watch.appended:1")) == -9
    assert len(marks_of(run_dir)) == 3
    assert ended(start_watch(log, run_dir)) == 0, log.read_text()

    assert marks_of(run_dir) == [(step, 1) for step in steps if step != deleted]
    rows, _ = figures_csv.read(run_dir)
    assert set(Counter((row.step, row.key) for row in rows).values()) == {1}
    assert all(row.samples == 64 * row.step for row in rows)
    said = log.read_text()
    assert f"deleted before they were evaluated: step {deleted};" in said and "step 8000" not in said
    assert "warning: step 7000 is skipped: checkpoint" in said and "sha256 differs" in said
    (last,) = metrics(run_dir, "eval")
    assert {row.key: row.value for row in rows if row.step == last["step"]} == pytest.approx({key: last[key] for key in last if key.startswith("val/")})


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with checkpoints of unlike weights at steps 2 and 4, of a run that is done."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump(load_recipe(RECIPES / "demo_clip.yaml", SETTINGS)))
    (folder / "status.json").write_text(json.dumps({"state": "done"}))
    publish(folder, 2), publish(folder, 4)
    return folder


def publish(folder, step, attempt=1, seed=None):
    recipe = load_recipe(folder / "recipe.yaml")
    weights = build_model(recipe, frozenset({"image", "text", "logit_scale"}), seed=step if seed is None else seed).state_dict()
    about = checkpoint.describe(checkpoint.Cursor(0, "train", 0, step), samples=64 * step, attempt=attempt)
    checkpoint.save(checkpoint.folder_of(folder, step), checkpoint.replicated_pieces({f"model/{name}": tensor for name, tensor in weights.items()}), about, lambda: None)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "checkpoint", "step": step, "samples": 64 * step, "attempt": attempt}) + "\n")


def watch(folder, **changes):
    """In this process, until the run is done: how many were evaluated, and what was said."""
    said = []
    options = follow.Options(suite_of_recipe, "recipe", None, "fp32", 0.01, True)._replace(**changes)
    return follow.Follower(folder, options, CPU, said.append).follow(), said


def test_steps_that_were_trained_again_are_evaluated_again_under_their_attempt(run_dir):
    assert watch(run_dir)[0] == 2 and watch(run_dir)[0] == 0
    checkpoint.set_aside(run_dir, after=2, attempt=2)
    publish(run_dir, 4, attempt=2, seed=99)
    count, said = watch(run_dir)
    assert count == 1 and not any("deleted" in line for line in said)
    assert marks_of(run_dir) == [(2, 1), (4, 1), (4, 2)]
    recipe = load_recipe(run_dir / "recipe.yaml")
    expected = evaluate(build_model(recipe, frozenset({"image", "text"}), seed=99), recipe, tokenizer(), CPU)
    assert {row.key: row.value for row in figures_csv.read(run_dir)[0] if row.attempt == 2} == pytest.approx(expected)


def test_what_goes_while_it_is_read_is_skipped_with_a_line(run_dir, monkeypatch):
    load = follow.load_model

    def load_late(folder, step, weights):
        if step == "2":
            remove(checkpoint.folder_of(run_dir, 2))
        if step == "4" and not (run_dir / "checkpoints" / "discarded-0002-step-00000004").exists():  # rewound, and trained again
            checkpoint.set_aside(run_dir, after=2, attempt=2)
            publish(run_dir, 4, attempt=2)
        return load(folder, step, weights)

    monkeypatch.setattr(follow, "load_model", load_late)
    count, said = watch(run_dir)
    assert count == 1 and marks_of(run_dir) == [(4, 2)]
    assert any("step 2: deleted while it was read" in line for line in said) and any("step 4: replaced while it was read" in line for line in said)


def test_another_suite_is_another_evaluation_and_a_torn_file_hurts_nobody(run_dir):
    assert watch(run_dir)[0] == 2
    with (run_dir / "evaluation.csv").open("a") as file:
        file.write("4,256,1,val/torn")
    changed = load_recipe(RECIPES / "demo_clip.yaml", (*SETTINGS, "evaluation.batch=17"))
    (run_dir / "recipe.yaml").write_text(dump(changed))
    assert watch(run_dir)[0] == 2
    assert len(figures_csv.read(run_dir)[1]) == 4
    assert watch(run_dir, precision="bf16")[0] == 2


def _watch_of_rank(rank, world, folder, run_dir):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    return watch(run_dir)[0]


@pytest.mark.slow
def test_two_ranks_watch_as_one(run_dir, tmp_path):
    assert support.spawn(_watch_of_rank, 2, str(tmp_path), run_dir) == [2, 2]
    assert marks_of(run_dir) == [(2, 1), (4, 1)]
    recipe = load_recipe(run_dir / "recipe.yaml")
    expected = evaluate(build_model(recipe, frozenset({"image", "text"}), seed=4), recipe, tokenizer(), CPU)
    assert {row.key: row.value for row in figures_csv.read(run_dir)[0] if row.step == 4} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--device", "tpu"], "neither auto, cpu nor"), (["--poll", "0"], "more than 0 seconds"), (["--suite", "/nowhere.yaml"], "cannot be read")],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, capsys):
    assert runpy.run_path(str(ROOT / "tools/watch.py"), run_name="tool")["main"]([str(tmp_path / "run"), *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1
