"""run.profile: traces hold the steps that were asked for, and no loss changes."""

import gzip
import json

import pytest
import torch

from protoclip_scale.errors import UserError
from protoclip_scale.recipe import load_recipe
from tests.strategies import environment
from tests.support import RECIPES, TINY, metrics, output, pretrain

MARKS = ("data wait", "towers", "losses", "backward", "update")


def recorded(run) -> dict[str, dict[str, int]]:
    """By trace: how often each mark was recorded by the profiler."""
    found = {}
    for path in sorted((run / "profile").glob("*.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found[path.name] = {mark: sum(each.get("name") == mark and each.get("cat") == "user_annotation" for each in events) for mark in MARKS}
        assert any(each.get("name") == "[memory]" for each in events)
        assert "Self CPU Mem" in path.with_name(path.name.replace(".json.gz", ".txt")).read_text()
    return found


@pytest.mark.slow
def test_profiled_steps_cost_nothing_but_time(tmp_path):
    """Two episodes of four steps; steps 3 to 6 lie in both, and the run is stopped inside the second part. Losses are those of an unprofiled run."""
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    short = (*TINY, "schedule.total=2 episodes")
    assert pretrain(plain, "demo_clip.yaml", short) == [0], output(plain)
    settings = (*short, "run.profile.steps=[3, 6]", "run.peak_tflops=0.01")
    assert pretrain(profiled, "demo_clip.yaml", settings, env={"PROTOCLIP_STOP_AT": "train.step:4"}) == [75], output(profiled)
    assert pretrain(profiled, "demo_clip.yaml", settings) == [0], output(profiled)
    steps = {"rank-00000-steps-3-4.json.gz": 2, "rank-00000-steps-5-5.json.gz": 1, "rank-00000-steps-6-6.json.gz": 1}
    found = recorded(profiled)
    assert {name: each["update"] for name, each in found.items()} == steps
    assert all(each[mark] in (each["update"], each["update"] + 1) for each in found.values() for mark in MARKS)  # the wait for a batch that never came
    assert "profile of steps 3 to 4: " in output(profiled)
    before, after = (metrics(run, "train") for run in (plain, profiled))
    assert [line["loss"] for line in before] == [line["loss"] for line in after]
    assert not any("mfu" in line for line in before)  # nobody told what this machine can do
    assert all(line["samples_per_second_per_rank"] == line["samples_per_second"] and line["mfu"] > 0 for line in after)
    assert " | MFU " in output(profiled) and "samples/s (" not in output(profiled)


@pytest.mark.parametrize(("steps", "message"), [("[6, 3]", "the first comes after the last; swap them"), ("[13, 14]", r"begin after the 12 steps of schedule.total '3 episodes'")])
def test_steps_that_will_never_be_taken_are_refused(steps, message):
    with pytest.raises(UserError, match=message):
        load_recipe(RECIPES / "demo_clip.yaml", [*TINY, f"run.profile.steps={steps}"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_every_rank_writes_its_own(tmp_path, strategy):
    run = tmp_path / "run"
    assert pretrain(run, "demo_clip.yaml", (*TINY, "run.profile.steps=[2, 3]"), ranks=2, env=environment(strategy, 2)) == [0, 0], output(run)
    assert {name: each["backward"] for name, each in recorded(run).items()} == {f"rank-{rank:05d}-steps-2-3.json.gz": 2 for rank in range(2)}
    assert " each) | " in output(run)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpus_memory_is_recorded(tmp_path):
    run = tmp_path / "run"
    assert pretrain(run, "demo_clip.yaml", (*TINY, "run.profile.steps=[2, 3]")) == [0], output(run)
    assert (run / "profile" / "rank-00000-steps-2-3-memory.pickle").stat().st_size > 10_000
    assert "rank-00000-steps-2-3-memory.pickle (pytorch.org/memory_viz)" in output(run)
