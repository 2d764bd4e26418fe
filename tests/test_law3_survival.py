"""Law 3: killed with SIGKILL at named events and resumed equals never killed, at one rank and at two."""

import json
import shutil

import pytest
import torch

from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.run_folder import guard_attempt
from protoclip_scale.engine.run_log import RunLog
from protoclip_scale.errors import UserError
from tests.runs import check_equal, history, once, rows_of_final_weights, save_again, tensors_of
from tests.support import CORPUS, TINY_PROTOTYPES, final_tensors, metrics, output, pretrain

EVALUATION = f"evaluation={{every_episodes: 1, sets: [{{name: val, files: {CORPUS}/val-*.parquet, classify: [coarse]}}]}}"
# A tower without kinks: rounding, which differs with the number of ranks, grows slowly.
SETTINGS = (*TINY_PROTOTYPES, "model.image.name=test_convnext", "run.checkpoint_steps=2", "optim.ema={decay: 0.9}", EVALUATION)
# The events come in the order of the run; each kill is of a run that went on from the one before.
KILLS = {
    1: (
        "fetch.block:2",
        "train.step:3",  # episode 1, after a checkpoint inside the episode
        "evaluate.start:1",
        "extract.block:2",
        "cluster.iteration:3",
        "cluster.translate:2",  # during back translation
        "cluster.labels:1",  # labels found, not yet published
        "train.forward:2",  # inside a step, the next episode being fetched
        "checkpoint.shard:1",  # the first file of a rank written
        "checkpoint.written:1",  # all of them, not yet renamed
        "checkpoint.published:1",  # renamed, not yet pointed to
        "extract.block:3",
        "cluster.iteration:6",
    ),
    2: ("train.step:3", "extract.block:2", "cluster.iteration:3", "checkpoint.written:1", "train.forward:1", "extract.block:3"),
}


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory) -> dict:
    """Whole runs at one and at two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    for ranks in KILLS:
        assert pretrain(folder / f"{ranks}", "demo.yaml", SETTINGS, ranks=ranks) == [0] * ranks, output(folder / f"{ranks}")
    return {ranks: folder / f"{ranks}" for ranks in KILLS}


@pytest.mark.parametrize("ranks", KILLS)
def test_a_run_killed_in_every_phase_equals_one_never_killed(tmp_path, never_killed, ranks):
    whole, killed = never_killed[ranks], tmp_path / "killed"
    for number, event in enumerate(KILLS[ranks]):
        on_rank = number % ranks
        codes = pretrain(killed, "demo.yaml", SETTINGS, ranks=ranks, env={"PROTOCLIP_KILL_AT": f"{event}@{on_rank}"})
        assert codes[on_rank] == -9, f"{event} never fired: {codes} {output(killed, on_rank)[-2000:]}"
    assert pretrain(killed, "demo.yaml", SETTINGS, ranks=ranks) == [0] * ranks, output(killed)

    check_equal(killed, whole)
    for kind in ("eval", "episode"):
        assert once(killed, kind) == once(whole, kind) and once(whole, kind)
    assert {step for step, _ in once(killed, "checkpoint")} == {step for step, _ in once(whole, "checkpoint")}
    assert (killed / "checkpoints/latest").read_text() == (whole / "checkpoints/latest").read_text()
    expected = final_tensors(whole)
    assert len(expected) > 100 and "ema/logit_scale.log" in expected


def test_two_ranks_find_the_prototypes_of_one(never_killed):
    """Laws 1 and 6 in a whole run of demo.yaml: losses, prototypes and labels to rounding, with nothing but the number of processes changed."""
    one, two = history(never_killed[1]), history(never_killed[2])
    assert one.keys() == two.keys() and rows_of_final_weights(never_killed[1]) == rows_of_final_weights(never_killed[2])
    for step, expected in one.items():
        assert two[step]["loss"] == pytest.approx(expected["loss"], rel=1e-5), step
    first, second = (tensors_of(never_killed[ranks] / "checkpoints" / "step-00000010") for ranks in (1, 2))  # inside the last episode
    found = [name for name in first if name.startswith("prototypes/")]
    assert len(found) == 6 + 3 and first.keys() == second.keys()
    for name in found:
        if "labels" in name:
            assert (first[name] == second[name]).float().mean() >= 0.999, name
        else:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-4, msg=name)


def test_a_resumption_that_forgets_the_moments_fails_the_law(tmp_path, never_killed):
    run = tmp_path / "run"
    pretrain(run, "demo.yaml", SETTINGS, env={"PROTOCLIP_KILL_AT": "train.step:7"})
    save_again(run, lambda name, tensor: None if "/exp_avg" in name else tensor)
    pretrain(run, "demo.yaml", SETTINGS)
    assert history(run) != history(never_killed[1])


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    """2, 1 and 4: the same batches; the same losses to rounding, in a tower without kinks."""
    smooth = (*TINY_PROTOTYPES, "model.image.name=test_convnext", "run.checkpoint_steps=2")
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert pretrain(whole, "demo.yaml", smooth) == [0]
    assert pretrain(moved, "demo.yaml", smooth, ranks=2, env={"PROTOCLIP_KILL_AT": "cluster.iteration:2"})[0] == -9  # the teacher's, beside the extraction
    assert pretrain(moved, "demo.yaml", smooth, env={"PROTOCLIP_STOP_AT": "train.step:2"}) == [75]
    assert pretrain(moved, "demo.yaml", smooth, ranks=4) == [0] * 4, output(moved)
    assert rows_of_final_weights(moved) == rows_of_final_weights(whole)
    expected, found = history(whole), history(moved)
    assert expected.keys() == found.keys()
    assert all(found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4) for step in expected)


def test_resuming_in_training_extracts_nothing_and_a_stop_saves(tmp_path):
    run = tmp_path / "run"
    codes = pretrain(run, "demo.yaml", TINY_PROTOTYPES, env={"PROTOCLIP_STOP_AT": "train.step:5"})  # after the ranks agreed: one more is taken
    assert codes == [75], output(run)
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert metrics(run, "checkpoint")[-1]["step"] == 6
    before = (run / "log.txt").read_text()
    shutil.rmtree(run / "scratch")  # another machine
    assert pretrain(run, "demo.yaml", TINY_PROTOTYPES) == [0], output(run)
    after = (run / "log.txt").read_text()[len(before) :]
    assert "episode 2/3 train" in after and "episode 2/3 extract" not in after and "episode 3/3 extract" in after


def test_extending_a_run_that_ended_inside_an_episode_equals_the_longer_run(tmp_path):
    """The rest of the episode is trained, with its own prototypes; a constant learning rate makes the two runs comparable."""
    constant = (*TINY_PROTOTYPES, "schedule.final_lr=1e-3", "schedule.warmup_steps=0")
    long, extended = tmp_path / "long", tmp_path / "extended"
    assert pretrain(long, "demo_protoclip.yaml", (*constant, "schedule.total=12 steps")) == [0]
    assert pretrain(extended, "demo_protoclip.yaml", (*constant, "schedule.total=6 steps")) == [0]
    assert pretrain(extended, "demo_protoclip.yaml", (*constant, "schedule.total=12 steps")) == [1]
    assert "schedule.total" in output(extended)
    assert pretrain(extended, "demo_protoclip.yaml", (*constant, "schedule.total=12 steps"), "--extend") == [0], output(extended)
    assert history(extended) == history(long) and rows_of_final_weights(extended) == rows_of_final_weights(long)


def test_an_older_attempt_stops_without_publishing(tmp_path):
    """A rank on a lost machine may still be alive when the next attempt has begun."""
    run = tmp_path / "run"
    assert pretrain(run, "demo_clip.yaml", TINY_CLIP, env={"PROTOCLIP_STOP_AT": "train.step:1"}) == [75]
    (run / "attempts/0003").write_text((run / "attempts/0001").read_text())  # attempt 3 began while 2 was asleep
    before = sorted((path, path.stat().st_mtime) for path in run.rglob("*") if ".writing" not in str(path))
    RunLog(run, attempt=2, is_main=True).write_status("failed", 1, "from the past")
    with pytest.raises(UserError, match="attempt 3 has taken this run over"):
        checkpoint.save(run / "checkpoints/step-00000003", checkpoint.replicated_pieces({"a": torch.ones(3)}), {}, lambda: guard_attempt(run, 2))
    after = sorted((path, path.stat().st_mtime) for path in run.rglob("*") if ".writing" not in str(path))
    assert [path for path, _ in after] == [path for path, _ in before] and checkpoint.list_checkpoints(run)[-1].name == "step-00000002"


TINY_CLIP = tuple(value for value in TINY_PROTOTYPES if not value.startswith("prototypes"))
