"""Stands for launch/pretrain.py and for accelerate where only the job script is tested: starts at once, and ends as each start is told to.

STAND_IN=ends,of,each,start: done; failed; saves (when a signal comes); killed (after a checkpoint); lost (killed without one); silent (killed before it
begins); bereft (fails for a lost rank, after a checkpoint).
"""

import os
import signal
import sys
import time
from pathlib import Path

from protoclip_scale.engine.command import parse
from protoclip_scale.files import publish_json, publish_text


def accelerate(arguments: list[str]) -> None:
    """Runs the script named, as the one rank of this node, and leaves the whole line where a test can read it."""
    place = next(number for number, each in enumerate(arguments) if each.endswith(".py"))
    publish_text(Path(os.environ["STAND_IN_LINES"]) / f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}-{os.environ['SLURM_NODEID']}", "\n".join(arguments))
    os.execv(sys.executable, [sys.executable, *arguments[place:]])


def pretrain(arguments: list[str]) -> int:
    folder, is_main = Path(parse(arguments).run_dir), os.environ["SLURM_NODEID"] == "0"
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    end = os.environ["STAND_IN"].split(",")[start]
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))

    def tell(state: str, **more: bool) -> None:
        if is_main:
            publish_json(folder / "status.json", {"state": state, "code": None, "attempt": start + 1, "time": time.time(), **more})

    def save() -> None:
        if is_main:
            publish_text(folder / "checkpoints" / "latest", f"step-{start}")

    if end != "silent":
        tell("running")
    print(f"start {start} of {folder.name} on {os.uname().nodename}", flush=True)
    if end == "saves":
        while not asked:
            time.sleep(0.02)
        save()
        tell("stopped")
        return 75
    if end in ("killed", "bereft"):
        save()
    if end == "bereft":
        tell("failed", lost_rank=True)
        return 1
    if end in ("killed", "lost", "silent"):
        os.kill(os.getpid(), signal.SIGKILL)
    tell(end)
    return {"done": 0, "failed": 1}[end]
