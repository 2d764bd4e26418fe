"""What several tests share: where things lie, short settings, and real processes."""

import ctypes
import functools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from protoclip_scale.engine import checkpoint

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
CORPUS = RECIPES / "demo_corpus"

# A run of seconds: the demo recipe with small towers, batches and episodes. Real rows, every phase.
TINY = (
    "model.image.name=test_resnet",
    "model.image.size=32",
    "model.embed_dim=32",
    "model.text={width: 32, heads: 2, layers: 1, context_length: 16}",
    "model.prototype_heads={dim: 16, hidden_dim: 32}",
    "data.plan={seed: 0, episode_size: 256, lanes: 4, global_batch: 64}",
    "data.workers=0",
    "schedule.total=3 episodes",
    "schedule.warmup_steps=2",
    "run.threads=1",
    "run.log_steps=1",
    "run.trace_rows=true",
    "run.export=null",
    "run.report=false",
    "evaluation=null",
)
TINY_PROTOTYPES = (*TINY, "prototypes.clusters=16", "prototypes.iterations=3", "prototypes.pictures=0")


def _group_of(ranks: int) -> dict[str, str]:
    """Sharded strategies want a group for one process, too; several get theirs from ``_run``."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return alone if ranks == 1 else {}


def fsdp2_environment(ranks: int) -> dict[str, str]:
    """What accelerate sets in the processes of launch/accelerate/fsdp2.yaml."""
    return _group_of(ranks) | {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_USE_CPU": "false",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
    }


def zero_environment(stage: int, ranks: int) -> dict[str, str]:
    """What accelerate sets in the processes of launch/accelerate/cpu_zero1.yaml, 2 or 3; on a machine with GPUs, of zero1.yaml, 2 or 3."""
    return _group_of(ranks) | ({} if torch.cuda.is_available() else {"CUDA_VISIBLE_DEVICES": "-1,-1"}) | {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        "ACCELERATE_USE_CPU": "false",
    }


ENDED_BY_US = -1000  # a rank that was still running when another had died

# Processes are forked from a clean server that has imported everything once: an import costs ten seconds, a fork none. DeepSpeed, whose import looks for
# GPUs, is left to those who need it, but for the three seconds of torch's compiler that it takes.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["protoclip_scale.engine.attempt", "protoclip_scale.engine.run", "protoclip_scale.engine.check", "protoclip_scale.data.clip_bpe", "datasets", "torch._inductor.compile_fx", "tests.support"]
)


def overrides(values: tuple[str, ...]) -> list[str]:
    return [argument for value in values for argument in ("--set", value)]


def metrics(run_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def output(run_dir: Path, rank: int = 0) -> str:
    """What a rank of ``pretrain`` wrote to its streams, in all attempts."""
    return (run_dir.parent / f"{run_dir.name}-rank{rank}.log").read_text(errors="replace")


def errors(run_dir: Path, rank: int = 0) -> list[str]:
    """The lines with which a rank of ``pretrain`` said what was wrong, in all attempts."""
    return [line for line in output(run_dir, rank).splitlines() if line.startswith("error: ")]


def final_tensors(run_dir: Path, step: str = "latest") -> dict[str, torch.Tensor]:
    folder, manifest, _ = checkpoint.find(run_dir, step)
    return checkpoint.read_tensors(folder, manifest)


def launch(*arguments: str | Path, ranks: int = 1, script: str = "launch/pretrain.py", timeout: int = 280, config: str = "cpu") -> subprocess.CompletedProcess:
    """Run a launch script as its users do, through accelerate; the finished process with its output as text. ``config``: of several ranks."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if ranks > 1:
        command += ["--config_file", f"launch/accelerate/{config}.yaml", "--num_processes", str(ranks), "--main_process_port", str(_free_port())]
    return subprocess.run([*command, script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def pretrain(
    run_dir: Path,
    recipe: str,
    values: tuple[str, ...],
    *arguments: str,
    ranks: int = 1,
    env: dict[str, str] | None = None,
    small_disk: tuple[Path, int] | None = None,
    patience: float = 1,
    setup: Callable[[], None] | None = None,
) -> list[int]:
    """launch/pretrain.py's command in ``ranks`` real processes; their exit codes, -9 for a kill. When one is killed or fails the others are killed, after
    ``patience`` seconds.

    ``small_disk``: a folder that is a file system of its own for each of them, of so many bytes, and empty. ``setup`` is called in each of them first.
    """
    command = ["--recipe", str(RECIPES / recipe), "--run-dir", str(run_dir), *overrides(values), *arguments]
    logs = [str(run_dir.parent / f"{run_dir.name}-rank{rank}.log") for rank in range(ranks)]
    return _run(_pretrain, ranks, env or {}, [(log, command, small_disk, setup) for log in logs], patience=patience)


def spawn(function: Callable, world: int, *arguments, env: dict[str, str] | None = None) -> list:
    """``function(rank, world, *arguments)`` in ``world`` processes that can join over gloo; what each returned (tensors and plain values)."""
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{rank}.pt" for rank in range(world)]
        codes = _run(_call, world, env or {}, [(str(path), function, rank, world, arguments) for rank, path in enumerate(results)])
        problems = [path.with_suffix(".txt").read_text() for path in results if path.with_suffix(".txt").exists()]
        assert codes == [0] * world, "\n".join(problems)
        return [torch.load(path, weights_only=True, map_location="cpu") for path in results]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run(target: Callable, ranks: int, env: dict[str, str], arguments: list[tuple], seconds: float = 900, patience: float = 1) -> list[int]:
    """Exit codes of ``target(*arguments[rank])`` in one process per rank, joined as a launcher joins them."""
    if ranks > 1:
        env = env | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    places = [({"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"} if ranks > 1 else {}) | env for rank in range(ranks)]
    workers = [_PROCESSES.Process(target=_enter, args=(places[rank], target, arguments[rank])) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    deadline, failed_at = time.monotonic() + seconds, None
    try:
        while any(worker.is_alive() for worker in workers):
            now = time.monotonic()
            assert now < deadline, "the processes hang"
            if any(worker.exitcode not in (None, 0, 75) for worker in workers):
                failed_at = failed_at or now
                if now - failed_at > patience:  # the others may be about to say why, too
                    break
            time.sleep(0.02)
        return [worker.exitcode if worker.exitcode is not None else ENDED_BY_US for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _enter(env: dict[str, str], target: Callable, arguments: tuple) -> None:
    os.environ.update(env)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    if env.get("ACCELERATE_USE_DEEPSPEED"):
        sys.modules.setdefault("mlflow", None)  # its autotuner, which nothing here uses, would import that for seconds
    if env.get("TEST_DETERMINISTIC"):  # on GPUs sums are else in any order
        torch.use_deterministic_algorithms(True, warn_only=True)
    target(*arguments)


def mount_small_disk(folder: Path, num_bytes: int) -> None:
    """A real file system (tmpfs) of this process and those that it starts from now on, in a user and mount namespace of their own: it needs no root."""
    global _PROCESSES
    _PROCESSES = multiprocessing.get_context("fork")  # the server's would not see the disk
    system = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user = 0x00020000, 0x10000000
    user, group = os.getuid(), os.getgid()
    folder.mkdir(parents=True, exist_ok=True)
    if system.unshare(new_namespace | new_user):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount(folder, 0, f"size={num_bytes}")


def remount(folder: Path, read_only: bool) -> None:
    """Change what may be done with the disk of ``mount_small_disk``."""
    remounted, reads_only = 32, 1
    _mount(folder, remounted | reads_only * read_only, "")


def _mount(folder: Path, flags: int, options: str) -> None:
    if ctypes.CDLL(None, use_errno=True).mount(b"none", str(folder).encode(), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")


@functools.cache
def can_mount() -> bool:
    """Whether this system lets a process have a file system of its own; some containers do not."""
    child = os.fork()
    if child == 0:
        try:
            mount_small_disk(Path(tempfile.gettempdir()), 1 << 20)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


needs_small_disk = pytest.mark.skipif(not can_mount(), reason="user namespaces are not allowed here, so no small disk can be mounted")


def _pretrain(log: str, command: list[str], small_disk: tuple[Path, int] | None, setup: Callable[[], None] | None) -> None:
    from protoclip_scale.engine.command import main

    if setup:
        setup()
    if small_disk:
        mount_small_disk(*small_disk)
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = 1
        try:
            code = main(command)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(path: str, function: Callable, rank: int, world: int, arguments: tuple) -> None:
    try:
        torch.save(function(rank, world, *arguments), path)
    except BaseException:
        Path(path).with_suffix(".txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        sys.exit(1)  # without a second traceback among the tests' output
