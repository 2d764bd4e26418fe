"""Two machines, as namespaces: networks, host names, processes, disks and clocks of their own, one shared folder, and accelerate on each.

The run directory is shared; scratch is on each machine's own disk. What is checked: which rank is lost and how soon the other machine's launcher ends, and
that the relaunched run's final weights are those of a run in two processes of one machine.
"""

import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.hosts import Hosts, why_not
from tests.support import ROOT, TINY, final_tensors, metrics, output, overrides, pretrain, zero_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

TIMEOUT_SECONDS = 30  # a machine may also be that much later than the other one to begin
VALUES = (
    *(value for value in TINY if not value.startswith(("run.trace_rows", "schedule.total"))),
    "model.image.name=test_convnext",
    "schedule.total=40 episodes",
    "run.checkpoint_steps=16",
    "run.keep_checkpoints=2",
    f"run.timeout_minutes={TIMEOUT_SECONDS / 60}",
    "run.hang_seconds=5",
)
STEPS = 160
THREE_DAYS = 3 * 86400
LATE_CLOCK = f"import time\n_real = time.time\ntime.time = lambda: _real() - {THREE_DAYS}\n"  # the second host's Python lives three days ago
SAYS_THE_TIME = [sys.executable, "-c", "import time; print(time.time())"]


class Machines:
    """Two hosts, one rank on each, and a folder that both see."""

    def __init__(self, folder: Path):
        (folder / "late").mkdir()
        (folder / "late/sitecustomize.py").write_text(LATE_CLOCK)
        environment = dict(os.environ) | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        self.late = [f"PYTHONPATH={folder / 'late'}:{ROOT}"]
        self._hosts = Hosts(folder, ["first", "second"], environment)
        self.first, self.second = self._hosts.all["first"], self._hosts.all["second"]
        self.logs = [folder / "first.log", folder / "second.log"]

    def launch(self, run: Path, configuration: str, *faults: str) -> list[subprocess.Popen]:
        """The line of docs/launching.md on each of them; ``faults``: environment of the ranks."""
        processes = []
        for rank, host in enumerate((self.first, self.second)):
            late = self.late if rank else []
            command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{configuration}", "--num_machines", "2"]
            command += ["--machine_rank", str(rank), "--num_processes", "2", "--main_process_ip", self.first.address, "--main_process_port", "29500"]
            command += ["launch/pretrain.py", "--recipe", "recipes/demo_clip.yaml", "--run-dir", str(run), "--expect-ranks", "2"]
            command += overrides((*VALUES, f"run.scratch_dir={host.local}/scratch"))
            processes.append(host.start("env", *late, *faults, *command, log=self.logs[rank]))
        return processes

    def said(self, rank: int) -> str:
        """The one line that a rank ended with."""
        lines = [line for line in self.logs[rank].read_text(errors="replace").splitlines() if "error: " in line and "lost" in line]
        assert len(lines) == 1, self.logs[rank].read_text(errors="replace")[-4000:]
        return lines[0]

    def close(self) -> None:
        self._hosts.close()


@pytest.fixture
def machines(tmp_path):
    made = Machines(tmp_path)
    yield made
    made.close()


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 600
    while not ((run / "metrics.jsonl").exists() and any(line["step"] >= step for line in metrics(run, "train"))):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), "no step was taken"
        time.sleep(0.05)


def ended(process: subprocess.Popen) -> int:
    """A launcher's exit code. Gloo's own limit is 30 minutes, a launcher's for its ranks half a minute; the rest is for a busy machine."""
    return process.wait(timeout=TIMEOUT_SECONDS + 180)


def same_weights(run: Path, other: Path) -> bool:
    expected, found = final_tensors(other), final_tensors(run)
    return expected.keys() == found.keys() and all(tensor.equal(found[name]) for name, tensor in expected.items() if name.startswith("model/"))


CONFIGURATIONS = {"cpu.yaml": {}, "cpu_zero2.yaml": zero_environment(2, ranks=2)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[str], Path]:
    """The run that a configuration makes in two processes of one machine: strategies differ by rounding."""

    @functools.cache
    def run_of(configuration: str) -> Path:
        run = tmp_path_factory.mktemp("undisturbed") / "run"
        assert pretrain(run, "demo_clip.yaml", VALUES, ranks=2, env=CONFIGURATIONS[configuration]) == [0, 0], output(run)
        return run

    return run_of


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_two_machines_train_and_one_that_is_switched_off_is_named(tmp_path, machines, configuration):
    run = tmp_path / "run"
    processes = machines.launch(run, configuration)
    wait_for_step(run, 20, processes)
    assert "2 ranks on 2 hosts" in machines.logs[0].read_text()
    machines.second.start("env", *machines.late, *SAYS_THE_TIME, log=tmp_path / "clock").wait()
    assert time.time() - float((tmp_path / "clock").read_text()) > THREE_DAYS - 3600
    assert any((tmp_path / "disks/first/scratch").rglob("*.arrow")) and any((tmp_path / "disks/second/scratch").rglob("*.arrow"))
    assert not list(run.rglob("*.arrow")), "the spool is on each machine's own disk"
    machines.second.kill()
    assert ended(processes[0]) == 1
    assert re.search(r"error: rank 0: lost rank 1 on second \(pid \d+\), last heard \d+ s ago in \w+, episode \d+, step \d+", machines.said(0))
    assert json.loads((run / "status.json").read_text())["message"].startswith("lost rank 1 on second")
    assert len(metrics(run, "train")) < STEPS


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_cut_cable_is_told_on_both_sides_and_the_run_goes_on_from_its_checkpoint(tmp_path, machines, undisturbed, configuration):
    run = tmp_path / "run"
    processes = machines.launch(run, configuration)
    wait_for_step(run, 40, processes)
    machines.second.cut_off()
    assert [ended(process) for process in processes] == [1, 1]
    assert "error: rank 0: lost rank 1 on second" in machines.said(0)
    assert "error: rank 1: lost rank 0 on first" in machines.said(1) and f"at {machines.first.address}:29500, does not answer" in machines.said(1)
    assert "no progress for" in (run / "log.txt").read_text()
    assert 40 <= len(metrics(run, "train")) < STEPS
    machines.second.cut_off(cut=False)
    for log in machines.logs:
        log.unlink()
    assert [process.wait(timeout=900) for process in machines.launch(run, configuration)] == [0, 0], machines.logs[0].read_text()[-4000:]
    assert "lost rank" not in machines.logs[0].read_text() and len({line["step"] for line in metrics(run, "train")}) == STEPS
    assert min(line["step"] for line in metrics(run, "train") if line["attempt"] == 2) > 16, "it goes on from a checkpoint"
    assert same_weights(run, undisturbed(configuration))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named_on_the_other_machine(tmp_path, machines, rank):
    """Rank 0's launcher keeps the store, and may end before the other machine has asked it."""
    run = tmp_path / "run"
    processes = machines.launch(run, "cpu.yaml", f"PROTOCLIP_KILL_AT=train.step:20@{rank}")
    assert [ended(process) for process in processes] == [1, 1]
    assert f"error: rank {1 - rank}: lost rank {rank} on {('first', 'second')[rank]}" in machines.said(1 - rank)


def test_a_rank_that_fails_ends_the_other_machine_with_its_reason(tmp_path, machines):
    run = tmp_path / "run"
    processes = machines.launch(run, "cpu.yaml", "PROTOCLIP_RAISE_AT=train.forward:20@0")
    assert [ended(process) for process in processes] == [1, 1]
    assert "error: rank 1: rank 0 on first failed: RuntimeError: as PROTOCLIP_RAISE_AT asks for" in machines.logs[1].read_text()


def test_a_run_directory_on_each_machines_own_disk_is_refused(tmp_path, machines):
    run = machines.first.local / "run"
    assert [ended(process) for process in machines.launch(run, "cpu.yaml")] == [1, 1]
    assert f"error: {run} is another folder on second than on rank 0's host" in machines.logs[0].read_text()
    assert not (tmp_path / "disks/second/run").exists(), "nothing is written on the other machine"
