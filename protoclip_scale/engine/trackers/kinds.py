"""How each kind of tracker is opened, so that a run that goes on stands there once: under one id, every step once."""

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

SENT_IN_SECONDS = 10.0  # by the threads and processes in which some libraries send


@dataclass(frozen=True)
class Opening:
    """``run_id``: ours, the same for all attempts. ``known_id``: the tracker's own of an earlier attempt. ``resumed_step``: steps after it come again. ``config``: the
    resolved recipe as {dotted key: text or number}, secrets left out."""

    folder: Path
    project: str
    name: str
    run_id: str
    known_id: str | None
    resumed_step: int
    config: dict[str, Any]


@dataclass(frozen=True)
class Opened:
    """``id``: to be found again under. ``rewinds``: whether it forgets the steps after ``resumed_step``, so that they must be sent again; others keep them, and
    they must not. ``settles``: seconds after which what it took is kept even if this process is killed; what was not is sent again by the next attempt."""

    tracker: GeneralTracker
    id: str
    rewinds: bool = False
    settles: float = 0.0


def _tensorboard(opening: Opening) -> Opened:
    """Event files in RUN/tensorboard; ``purge_step`` in a new file tells readers to forget what older ones hold from there on."""
    tracker = TensorBoardTracker("tensorboard", opening.folder, purge_step=opening.resumed_step + 1 if opening.known_id else None)
    tracker.start()
    if not opening.known_id:
        tracker.writer.add_text("recipe", "".join(f"    {line}\n" for line in yaml.safe_dump(opening.config, sort_keys=False, allow_unicode=True).splitlines()), global_step=0)
    return Opened(tracker, "tensorboard", rewinds=True)


def _wandb(opening: Opening) -> Opened:
    """Its id is ours. Without a console, code, command line and host: they may carry secrets. WANDB_MODE and WANDB_BASE_URL say where to.

    Offline, 32 KiB at a time get to the disk; online, a step that comes twice is left out by W&B.
    """
    import wandb

    settings = wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True, x_disable_meta=True, x_disable_machine_info=True, host="not recorded")
    if wandb.setup(settings).settings.mode == "online" and not wandb.login(prompt=False):
        raise RuntimeError("no key: set WANDB_API_KEY or run `wandb login`, or set WANDB_MODE=offline")
    tracker = WandBTracker(opening.project, id=opening.run_id, name=opening.name, resume="allow", dir=str(opening.folder), settings=settings)
    tracker.start()
    tracker.run.config.update(opening.config, allow_val_change=True)
    return Opened(tracker, opening.run_id, settles=math.inf if tracker.run.offline else SENT_IN_SECONDS)


def _trackio(opening: Opening) -> Opened:
    """Goes on where a run has the same name, which therefore holds our id. TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says where to; else it stays on this machine."""
    name = f"{opening.name}-{opening.run_id}"
    tracker = TrackioTracker(opening.project, name=name, config=opening.config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    tracker.start()
    return Opened(tracker, name, settles=SENT_IN_SECONDS)


def _mlflow(opening: Opening) -> Opened:
    """Its id is MLflow's own. MLFLOW_TRACKING_URI says where to."""
    tracker = MLflowTracker(opening.project, run_id=opening.known_id, run_name=opening.name, tags={"protoclip_scale.run_id": opening.run_id})
    tracker.start()
    if not opening.known_id:  # MLflow's parameters cannot change
        tracker.store_init_configuration(opening.config)
    return Opened(tracker, tracker.active_run.info.run_id)


OPENERS: dict[str, Callable[[Opening], Opened]] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}  # each in a package of its name


def missing(trackers: Iterable[str]) -> str | None:
    """One line on the first tracker whose package is not installed; None if all are."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            return f"run.trackers: {name} is not installed here: pip install 'protoclip-scale[{name}]', or leave {name} out"
    return None
