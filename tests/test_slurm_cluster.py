"""launch/slurm on a real Slurm with two nodes: jobs train over both, survive what Slurm does to them, and end as one that was left alone.

The nodes are namespaces of this machine (tests/slurm). Jobs are submitted from a copy of the checkout, as users do.
"""

import contextlib
import io
import json
import runpy
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import Cluster, why_no_cluster
from tests.support import CORPUS, ROOT, TINY_PROTOTYPES, final_tensors, metrics, overrides
from tests.test_launch_commands import SMALL_YFCC, yfcc_shards  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
LONG = (*TINY_PROTOTYPES, "schedule.total=16 episodes", "data.workers=1")  # a loader's processes hear Slurm's signals, too
ON_PROCESSORS = {"PROTOCLIP_ACCELERATE": "launch/accelerate/cpu.yaml", "PROTOCLIP_RANKS_PER_NODE": "1", "PROTOCLIP_CLUSTER_ENV": "/dev/null"}


class Job:
    """A submitted job and its log."""

    def __init__(self, cluster: Cluster, number: int | str, log: Path):
        self.cluster, self.number, self._log = cluster, number, log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def ended(self, state: str = "COMPLETED", restarts: int = 0) -> None:
        """Wait for its end, which must be this one, after so many starts beyond the first."""
        about = self.cluster.wait(self.number, *ENDED, seconds=900, log=self._log)
        assert (about["JobState"], about["Restarts"]) == (state, str(restarts)), self.log[-6000:]


class Desk:
    """A user's place on the login host: a checkout, and what was submitted from it."""

    def __init__(self, cluster: Cluster, folder: Path, environment: dict[str, str]):
        self.cluster, self.checkout, self.environment = cluster, folder, environment

    def sbatch(self, *words: str | Path, **variables: str) -> Job:
        log = self.checkout / f"log-{time.monotonic_ns()}.out"
        number = self.cluster.submit("--output", log, *words, cwd=self.checkout, environment=self.environment | variables)
        return Job(self.cluster, number, log)

    def train(self, name: str, recipe: str, values: tuple[str, ...], *options: str, **variables: str) -> tuple[Job, Path]:
        """``sbatch launch/slurm/pretrain.sbatch recipe ...``: the job and the run directory."""
        folder = self.checkout / "runs" / name
        return self.sbatch(*options, "launch/slurm/pretrain.sbatch", recipe, *overrides(values), "--run-dir", folder, **variables), folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := why_no_cluster():
        pytest.skip(f"no Slurm can be started here: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


def copy_of_checkout(folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "cluster.env"))
    return folder


@pytest.fixture(scope="module")
def desk(cluster, tmp_path_factory) -> Desk:
    venv = {"PROTOCLIP_ENVIRONMENT": f"venv:{sys.prefix}"} if (Path(sys.prefix) / "bin/accelerate").exists() else {}
    folder = copy_of_checkout(tmp_path_factory.mktemp("checkout"), "launch", "protoclip_scale", "recipes")
    scratch = {"PROTOCLIP_SCRATCH": str(cluster.login.local / "scratch"), "PYTHONPATH": ""}
    return Desk(cluster, folder, ON_PROCESSORS | venv | scratch)


@pytest.fixture(scope="module")
def stand_in(cluster, tmp_path_factory) -> Desk:
    """Where tests/slurm/stand_in.py stands for training and for accelerate: it starts at once and ends as it is told to."""
    folder = copy_of_checkout(tmp_path_factory.mktemp("stand-in"), "launch")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "protoclip_scale").symlink_to(ROOT / "protoclip_scale")
    (folder / "lines").mkdir()
    programs = folder / "venv/bin"
    programs.mkdir(parents=True)
    call = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.slurm import stand_in; "
    (folder / "launch/pretrain.py").write_text(f"{call}sys.exit(stand_in.pretrain(sys.argv[1:]))\n")
    (programs / "accelerate").write_text(f"#!{sys.executable}\n{call}stand_in.accelerate(sys.argv[1:])\n")
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    return Desk(cluster, folder, ON_PROCESSORS | {"PROTOCLIP_ENVIRONMENT": f"venv:{programs.parent}", "STAND_IN_LINES": str(folder / "lines")})


def until(condition: Callable[[], bool], what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def status(run_dir: Path) -> dict:
    file = run_dir / "status.json"
    return json.loads(file.read_text()) if file.exists() else {}


def until_it_trains(job: Job, run_dir: Path, attempt: int) -> None:
    """Until this attempt has made a step; the job must not end before."""

    def trains() -> bool:
        assert job.cluster.state(job.number) not in ENDED, job.log[-6000:]
        lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
        return any(f'"attempt": {attempt},' in line and '"kind": "train"' in line for line in lines)

    until(trains, f"start {attempt} trains", seconds=900)


def test_each_end_of_a_run_leads_where_it_should(stand_in):
    """Submitted together, since each takes a node for some seconds."""
    cases = {
        "done": ("done", {}, "COMPLETED", 0, ""),
        "fails": ("failed", {}, "FAILED", 0, "the run failed, see"),
        "lost": ("lost", {}, "FAILED", 0, "before a new checkpoint was saved (srun's code"),
        "never-begins": ("silent", {}, "FAILED", 0, "the run was not begun), so the job is not started again"),
        "killed-but-gets-on": ("killed,done", {}, "COMPLETED", 1, "ranks were lost, after a new checkpoint; the job is started again (1 of at most 100)"),
        "too-often": ("killed,done", {"PROTOCLIP_MAX_RESTARTS": "0"}, "FAILED", 0, "has been started again 0 times (PROTOCLIP_MAX_RESTARTS)"),
        "killed-and-stuck": ("killed,lost,done", {}, "FAILED", 1, "before a new checkpoint was saved"),
        "lost-another": ("bereft,done", {}, "COMPLETED", 1, "ranks were lost, after a new checkpoint"),
    }  # fmt: skip
    jobs = {name: stand_in.train(name, "recipes/demo.yaml", (), "--nodes=1", STAND_IN=ends, **more)[0] for name, (ends, more, *_) in cases.items()}
    for name, (_, _, state, restarts, message) in cases.items():
        jobs[name].ended(state, restarts)
        assert message in jobs[name].log
        assert any(line.startswith("error: ") for line in jobs[name].log.splitlines()) == (state == "FAILED"), jobs[name].log


def test_a_bad_recipe_is_one_line_before_anything_starts(stand_in):
    job, folder = stand_in.train("bad", "recipes/demo.yaml", ("optim.l=1",), STAND_IN="done")
    job.ended("FAILED")
    assert job.log == "error: --set: optim.l is not a key, did you mean lr?\n" and not folder.exists()
    empty = stand_in.sbatch("launch/slurm/pretrain.sbatch")
    empty.ended("FAILED")
    assert empty.log.startswith("error: name a recipe") and len(empty.log.splitlines()) == 1


def test_a_cancelled_job_saves_and_stays_cancelled(stand_in):
    job, folder = stand_in.train("cancelled", "recipes/demo.yaml", (), STAND_IN="saves,done")
    until(lambda: job.log.count("start 0") == 2, "both ranks began")
    stand_in.cluster.login.run("scancel", str(job.number))
    job.ended("CANCELLED")
    assert status(folder)["state"] == "stopped" and "the run was stopped and has saved; Slurm has the job as" in job.log


def test_a_signal_that_comes_while_the_ranks_start_is_heard(stand_in):
    job, _ = stand_in.train("early", "recipes/demo.yaml", (), STAND_IN="saves,done")
    until((stand_in.checkout / "logs" / str(job.number) / "start-0").is_dir, "the nodes begin")
    stand_in.cluster.login.run("scancel", "--signal=USR1", "--batch", str(job.number))
    job.ended("COMPLETED", restarts=1)


def test_the_time_limit_stops_and_starts_again_by_slurms_own_clock(stand_in):
    """Slurm looks at it twice a minute; it may do so before the ranks begin, and again when they have been started again."""
    job, _ = stand_in.train("time-limit", "recipes/demo.yaml", (), "--nodes=1", "--time=1", "--signal=B:USR1@55", STAND_IN="saves,saves,saves,done")
    until(lambda: "the job is started again (1 of at most 100)" in job.log, "the job is started again")
    stand_in.cluster.login.run("scancel", str(job.number))
    stand_in.cluster.wait(job.number, "CANCELLED", seconds=600)


def test_where_slurm_may_not_start_it_again_the_job_says_so(stand_in):
    job, folder = stand_in.train("not-again", "recipes/demo.yaml", (), "--no-requeue", STAND_IN="saves,done")
    until(lambda: job.log.count("start 0") == 2, "both ranks began")
    stand_in.cluster.login.run("scancel", "--signal=USR1", "--batch", str(job.number))
    job.ended("FAILED")
    assert "the run was stopped and has saved, but Slurm does not start this job again; the same sbatch line goes on" in job.log


def test_nodes_know_their_numbers_and_a_restart_resumes(stand_in):
    job, folder = stand_in.train("numbers", "recipes/demo.yaml", (), STAND_IN="saves,done", PROTOCLIP_SCRATCH="/local/a b")
    until(lambda: job.log.count("start 0") == 2, "both ranks began")
    stand_in.cluster.login.run("scancel", "--signal=USR1", "--batch", str(job.number))
    job.ended("COMPLETED", restarts=1)
    lines = {path.name: path.read_text().splitlines() for path in (stand_in.checkout / "lines").glob(f"{job.number}-*")}
    assert sorted(lines) == [f"{job.number}-{start}-{node}" for start in (0, 1) for node in (0, 1)]
    for name, words in lines.items():
        _, start, node = name.split("-")
        said = dict(zip(words, words[1:], strict=False))
        assert (said["--machine_rank"], said["--num_machines"], said["--num_processes"], said["--expect-ranks"]) == (node, "2", "2", "2")
        assert (said["--main_process_ip"], said["--main_process_port"], said["--rdzv_backend"]) == ("node0", str(15000 + job.number), "static")
        assert said["--set"] == "run.scratch_dir=/local/a b" and words[-4:-2] == (["--resume", "auto"] if start == "1" else ["--run-dir", str(folder)])


# What Slurm accepts --------------------------------------------------------------------------------------------------


def test_one_job_of_an_array_is_stopped_and_started_again_alone(stand_in):
    """The last job of an array has the array's number: a command for that number would go to all of them."""
    script = stand_in.checkout / "array.sbatch"
    on_processors = ("--nodes", "1", "--gpus-per-node", "0", "--accelerate", "launch/accelerate/cpu.yaml")
    script.write_text(printed_by_submit("recipes/demo_clip.yaml", "recipes/demo.yaml", *on_processors).replace(str(ROOT), str(stand_in.checkout)))
    (stand_in.checkout / "logs").mkdir(exist_ok=True)
    number = stand_in.cluster.submit(script, cwd=stand_in.checkout, environment=stand_in.environment | {"STAND_IN": "saves,done"})
    jobs = {task: Job(stand_in.cluster, f"{number}_{task}", stand_in.checkout / f"logs/demo_clip-and-1-more-{number}_{task}.out") for task in (1, 0)}
    until(lambda: all("start 0" in job.log for job in jobs.values()), "both train")
    for task, job in jobs.items():
        stand_in.cluster.login.run("scancel", "--signal=USR1", "--batch", f"{number}_{task}")
        job.ended(restarts=1)
        if task:
            assert stand_in.cluster.state(f"{number}_0") == "RUNNING", jobs[0].log


def printed_by_submit(*arguments: str) -> str:
    """submit.py's output, in the checkout that is tested."""
    said = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(said):
        assert runpy.run_path("launch/slurm/submit.py")["main"](list(arguments)) == 0
    return said.getvalue()


def test_slurm_accepts_the_files_and_what_submit_prints(desk):
    def test_only(*words: str | Path) -> tuple[int, str]:
        done = desk.cluster.login.run("sbatch", "--test-only", *words, cwd=desk.checkout, check=False)
        return done.returncode, done.stderr

    script = desk.checkout / "printed.sbatch"
    script.write_text(printed_by_submit("recipes/yfcc15m_clip.yaml", "recipes/yfcc15m.yaml", "--seeds", "0", "1", "--time", "2:00:00", "--sbatch=--comment=a;b"))
    for words in (["launch/slurm/pretrain.sbatch", "recipes/yfcc15m.yaml"], ["launch/slurm/evaluate.sbatch", "runs/yfcc15m"], [script]):
        code, said = test_only(*words)
        assert code == 0 and "to start at" in said, said
    code, said = test_only("--nodes=3", script)  # the test can fail
    assert code != 0 and "to start at" not in said


@pytest.fixture(scope="module")
def under_ddp(desk) -> Path:
    """The demo recipe over two nodes."""
    job, folder = desk.train("ddp", "recipes/demo.yaml", TINY_PROTOTYPES)
    job.ended()
    assert "2 ranks on 2 hosts" in job.log
    logs = desk.checkout / "logs" / str(job.number)
    assert sorted(path.relative_to(logs).parts[:2] for path in logs.rglob("stderr.log")) == [("start-0", "node-0"), ("start-0", "node-1")]
    assert "2 ranks on 2 hosts" in "".join(path.read_text() for path in logs.glob("start-0/node-0/**/stdout.log"))
    return folder


def test_nothing_of_a_node_is_in_the_shared_run_directory(desk, under_ddp):
    assert status(under_ddp)["state"] == "done"
    assert not (under_ddp / "scratch").exists()  # the run directory is shared: nothing that belongs to a node is in it


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_the_demo_recipe_trains_over_two_nodes_under(strategy, desk, under_ddp):
    pytest.importorskip("deepspeed")
    job, folder = desk.train(strategy, "recipes/demo.yaml", TINY_PROTOTYPES, PROTOCLIP_ACCELERATE=f"launch/accelerate/cpu_{strategy}.yaml")
    job.ended()
    assert "2 ranks on 2 hosts" in job.log
    losses, others = ([line["loss"] for line in metrics(run, "train")] for run in (folder, under_ddp))
    assert len(losses) == 12 and losses == pytest.approx(others, rel=1e-3)


def test_a_job_that_slurm_stops_three_times_ends_like_one_that_was_left_alone(desk):
    """The time limit's signal, `scontrol requeue`, a pre-emption."""
    alone, expected = desk.train("alone", "recipes/demo.yaml", LONG)
    alone.ended()
    job, folder = desk.train("stopped", "recipes/demo.yaml", LONG)
    slurm = desk.cluster.login

    until_it_trains(job, folder, attempt=1)
    slurm.run("scancel", "--signal=USR1", "--batch", str(job.number))  # what Slurm sends --signal seconds before the time limit
    until_it_trains(job, folder, attempt=2)
    disks = desk.cluster.folder / "disks"
    assert all(any((disks / f"node{number}/scratch").rglob("*.arrow")) for number in (0, 1)), "each node reads its own rows"

    slurm.run("scontrol", "requeue", str(job.number))
    until_it_trains(job, folder, attempt=3)

    other = desk.sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap=true")
    other.ended()
    job.ended(restarts=3)
    assert job.log.count("the run was stopped and has saved") == 3, job.log[-6000:]
    assert sorted(path.name for path in (folder / "attempts").iterdir()) == ["0001", "0002", "0003", "0004"]
    losses, others = ([(line["step"], line["loss"]) for line in metrics(run, "train")] for run in (folder, expected))
    assert losses == others and len(losses) == 64
    ours, theirs = final_tensors(folder), final_tensors(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_job_that_loses_a_rank_goes_on_from_its_last_checkpoint(desk, under_ddp):
    """The rank on the second node is killed in the tenth step of every start; the run has twelve, and saves after each fourth."""
    job, folder = desk.train("bereft", "recipes/demo.yaml", TINY_PROTOTYPES, PROTOCLIP_KILL_AT="train.step:10@1")
    job.ended(restarts=1)
    assert "lost rank 1 on node1" in job.log and "ranks were lost, after a new checkpoint" in job.log
    ours, theirs = final_tensors(folder), final_tensors(under_ddp)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_array_over_two_recipes_trains_both(desk):
    """As submit.py writes it: a node for each, two ranks on it."""
    script = desk.checkout / "array.sbatch"
    written = printed_by_submit(
        "recipes/demo_protoclip.yaml", "recipes/demo.yaml", "--nodes", "1", "--ranks-per-node", "2", "--gpus-per-node", "0", "--accelerate", "launch/accelerate/cpu.yaml",
        *overrides(TINY_PROTOTYPES),
    )  # fmt: skip
    script.write_text(written.replace(str(ROOT), str(desk.checkout)))
    (desk.checkout / "logs").mkdir(exist_ok=True)
    number = desk.cluster.submit(script, cwd=desk.checkout, environment=desk.environment)
    for task, name in enumerate(("demo_protoclip", "demo")):
        log = desk.checkout / f"logs/demo_protoclip-and-1-more-{number}_{task}.out"
        Job(desk.cluster, f"{number}_{task}", log).ended()
        assert "2 ranks on 1 host" in log.read_text()
        assert status(desk.checkout / "runs" / name)["state"] == "done"


def test_evaluation_over_two_nodes(desk, under_ddp):
    suite, out = desk.checkout / "suite.yaml", desk.checkout / "figures.json"
    suite.write_text(f"sets: [{{name: val, files: {CORPUS}/val-*.parquet, classify: [coarse]}}]\n")
    job = desk.sbatch("--nodes=2", "launch/slurm/evaluate.sbatch", under_ddp, "--suite", suite, "--out", out)
    job.ended()
    (result,) = json.loads(out.read_text())["results"]
    assert result["step"] == 12 and 0 <= result["figures"]["val/zero_shot/coarse/top1"] <= 1


@pytest.mark.parametrize("strategy", ["cpu", "cpu_zero2", "cpu_zero3"])
def test_the_second_line_users_type(strategy, desk, yfcc_shards):  # noqa: F811
    """``sbatch launch/slurm/pretrain.sbatch recipes/yfcc15m.yaml``, with --set for small towers and batches: 20 steps."""
    values = (f"data.root={yfcc_shards}", *SMALL_YFCC, f"name={strategy}")
    job = desk.sbatch("launch/slurm/pretrain.sbatch", "recipes/yfcc15m.yaml", *overrides(values), PROTOCLIP_ACCELERATE=f"launch/accelerate/{strategy}.yaml")
    job.ended()
    assert [line["step"] for line in metrics(desk.checkout / "runs" / strategy, "train")] == list(range(1, 21))
    assert "2 ranks on 2 hosts" in job.log
