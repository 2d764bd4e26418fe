"""A rank that is killed under NCCL, whose collectives do not fail by themselves: the other one names it and ends."""

import re
import time

import pytest

from tests.gpu.devices import of, on_devices
from tests.support import TINY, output, pretrain
from tests.test_engine_lost_ranks import errors, status

PATIENCE = 60


@on_devices
@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_rank_names_the_one_that_was_killed(tmp_path, figure, device, rank):
    run, other = tmp_path / "run", 1 - rank
    env = of(device, "ddp", 2) | {"PROTOCLIP_KILL_AT": f"train.step:3@{rank}"}
    values = (*TINY, "run.checkpoint_steps=2", "run.timeout_minutes=5")  # it is not waited for
    began = time.monotonic()
    codes = pretrain(run, "demo_clip.yaml", values, ranks=2, env=env, patience=PATIENCE)
    assert codes[rank] == -9 and codes[other] == 1, output(run, other)
    (line,) = errors(run, other)
    assert re.search(rf"lost rank {rank} on \S+ \(pid \d+\), last heard \d+ s ago in \w+, episode 1, step \d", line), line
    assert (status(run)["state"], status(run)["resumable"]) == ("failed", True) and status(run)["message"] in line
    figure(f"rank {rank} killed: seconds until all had ended, start of the run included", 2, device, time.monotonic() - began)
    env = of(device, "ddp", 2)
    assert pretrain(run, "demo_clip.yaml", values, ranks=2, env=env) == [0, 0], output(run)
