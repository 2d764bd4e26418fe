"""Law 3: killed with SIGKILL at named events and resumed equals never killed, at one rank and at two."""

import shutil

import numpy as np
import pytest
import torch

from protoclip_scale.engine.trace import read_trace
from tests.support import TINY_PROTOTYPES, final_tensors, metrics, output, pretrain

SETTINGS = (*TINY_PROTOTYPES, "run.checkpoint_steps=2")
# The events come in the order of the run; each kill is of a run that went on from the one before.
KILLS = (
    "fetch.block:2",
    "train.step:3",  # episode 1, after a checkpoint inside the episode
    "prefetch.block:1",
    "extract.block:2",
    "cluster.iteration:3",
    "cluster.labels:1",  # labels found, not yet published
    "train.forward:2",  # inside a step
    "checkpoint.written:1",  # shards written, not yet renamed
    "train.step:1",
    "extract.block:3",
    "cluster.iteration:6",
)


def history(run_dir) -> dict[int, dict]:
    """The last thing said of each step."""
    return {line["step"]: {k: v for k, v in line.items() if k.startswith(("loss", "lr", "grad", "scale"))} for line in metrics(run_dir, "train")}


def rows_of_final_weights(run_dir) -> dict[int, list[int]]:
    """Row ids of each step, over all attempts: of a step that was repeated, those of the last attempt."""
    steps: dict[int, dict[str, list[int]]] = {}
    for path in sorted((run_dir / "trace").glob("rows-*.arrows")):
        _, attempt, rank = path.stem.split("-")
        table = read_trace(path)
        step, row = table["step"].to_numpy(), table["row_id"].to_numpy()
        for number in np.unique(step):
            kept = steps.setdefault(int(number), {"attempt": attempt})
            if kept["attempt"] != attempt:
                kept.clear()
                kept["attempt"] = attempt
            kept[rank] = row[step == number].tolist()
    return {number: sum((rows for rank, rows in sorted(kept.items()) if rank != "attempt"), []) for number, kept in steps.items()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.timeout(500)
def test_a_run_killed_at_every_phase_equals_one_never_killed(tmp_path, ranks):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert pretrain(whole, "demo.yaml", SETTINGS, ranks=ranks) == [0] * ranks, output(whole)
    kills = KILLS if ranks == 1 else KILLS[1::3]
    for number, event in enumerate(kills):
        on_rank = number % ranks if not event.startswith(("fetch", "prefetch")) else 0
        codes = pretrain(killed, "demo.yaml", SETTINGS, ranks=ranks, env={"PROTOCLIP_KILL_AT": f"{event}@{on_rank}"})
        assert codes[on_rank] == -9, f"{event} never fired: {output(killed, on_rank)[-2000:]}"
    assert pretrain(killed, "demo.yaml", SETTINGS, ranks=ranks) == [0] * ranks, output(killed)

    assert history(killed) == history(whole)
    assert rows_of_final_weights(killed) == rows_of_final_weights(whole)
    expected, found = final_tensors(whole), final_tensors(killed)
    assert expected.keys() == found.keys() and len(expected) > 100
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.timeout(300)
def test_resuming_in_training_extracts_nothing_and_a_stop_saves(tmp_path):
    run = tmp_path / "run"
    codes = pretrain(run, "demo.yaml", TINY_PROTOTYPES, env={"PROTOCLIP_STOP_AT": "train.step:6"})
    assert codes == [75], output(run)
    assert metrics(run, "checkpoint")[-1]["step"] == 6
    before = (run / "log.txt").read_text()
    shutil.rmtree(run / "scratch")  # another machine
    assert pretrain(run, "demo.yaml", TINY_PROTOTYPES) == [0], output(run)
    after = (run / "log.txt").read_text()[len(before) :]
    assert "episode 2/3 train" in after and "episode 2/3 extract" not in after and "episode 3/3 extract" in after
