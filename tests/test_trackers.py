"""Trackers through Accelerate: what each one holds after an uninterrupted run and after one that was killed and went on, read back with its own reader."""

import json
import os
import signal
import struct
import time
from pathlib import Path

import pytest
from accelerate import PartialState
from pydantic import ValidationError

from protoclip_scale.engine.run_log import RunLog
from protoclip_scale.engine.trackers import Trackers, following, kinds
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import load_recipe
from protoclip_scale.recipe.schema import Run
from tests.support import RECIPES, TINY, metrics, output, pretrain, spawn

STEPS, KILLED_AFTER, RESUMED_AT = 12, 8, 5
PASSWORD = "open-sesame-31"
FIGURES = [{"loss": 8.0 / step, "loss/clip": 6.0 / step} for step in range(1, STEPS + 1)]
WANTED = {"train/loss": [(step, 8.0 / step) for step in range(1, STEPS + 1)], "eval/val/zero_shot/c/top1": [(4, 0.04), (8, 0.08), (12, 0.12)]}


def attempt(rank: int, world: int, folder: str, name: str, number: int, first: int, last: int, then_killed: bool) -> list[str]:
    """What an attempt does with its log and its trackers; gives what it told."""
    PartialState(cpu=True)
    folder, said = Path(folder), []
    recipe = load_recipe(RECIPES / "demo_clip.yaml", ["run.tracker_project=trial", f"run.copy_to=s3://me:{PASSWORD}@bucket/x"])
    log = RunLog(folder, number, is_main=True)
    log.discard_after(first)
    trackers = Trackers(folder, recipe, (name,), "0123456789ab", number, said.append)
    trackers.begin(first)
    for step in range(first + 1, last + 1):
        log.metrics("train", step, 64 * step, **FIGURES[step - 1])
        if step % 4 == 0:
            log.metrics("eval", step, 64 * step, **{"val/zero_shot/c/top1": step / 100, "weights": "ema"})
            log.metrics("checkpoint", step, 64 * step, path="x")
    if then_killed:
        while sent(folder, name) != ({} if name == "wandb" else {"train": last, "eval": last // 4 * 4}):
            time.sleep(0.05)
        time.sleep(3 if name == "wandb" else 0)  # its lines are taken, and lost
        os.kill(os.getpid(), signal.SIGKILL)
    trackers.finish(240)
    return said


def sent(folder: Path, name: str) -> dict[str, int] | None:
    """What is not sent again; None before the tracker is open."""
    kept = folder / "trackers.json"
    return json.loads(kept.read_text())[name]["sent"] if kept.exists() else None


def of_tensorboard(folder: Path) -> dict[str, list]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
    found.Reload()
    assert "recipe/text_summary" in found.Tags()["tensors"]
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def of_mlflow(folder: Path) -> dict[str, list]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    runs = [run for run in client.search_runs([each.experiment_id for each in client.search_experiments()]) if run.info.run_id == kept_id(folder, "mlflow")]
    assert len(runs) == 1 and runs[0].data.params["optim.lr"] == "0.001" and runs[0].data.tags["protoclip_scale.run_id"] == "0123456789ab"
    return {name: [(each.step, each.value) for each in client.get_metric_history(runs[0].info.run_id, name)] for name in runs[0].data.metrics}


def of_trackio(folder: Path) -> dict[str, list]:
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("trial") == [kept_id(folder, "trackio")]
    found: dict[str, list] = {}
    for line in SQLiteStorage.get_logs("trial", kept_id(folder, "trackio")):
        for name, value in line.items():
            found.setdefault(name, []).append((line["step"], value))
    return found


def of_wandb(folder: Path) -> dict[str, list]:
    """Out of the files of offline runs: blocks of 32 KiB with records that may go over several of them."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list] = {}
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert files and {path.stem for path in files} == {"run-0123456789ab"}, "one id"
    for path in files:
        data, place, whole = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            if 32768 - place % 32768 < 7 or kind == 0:
                place += 32768 - place % 32768
                continue
            whole, place = whole + data[place + 7 : place + 7 + length], place + 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                record, whole = Record.FromString(whole), b""
                for item in record.history.item if record.WhichOneof("record_type") == "history" else ():
                    found.setdefault(item.key or "/".join(item.nested_key), []).append((record.history.step.num, float(item.value_json)))
    return found


def kept_id(folder: Path, name: str) -> str:
    return json.loads((folder / "trackers.json").read_text())[name]["id"]


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "trackio": of_trackio, "mlflow": of_mlflow}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(READERS))
def test_a_run_that_was_killed_stands_there_as_one_that_was_not(name, tmp_path, monkeypatch):
    pytest.importorskip(name, reason=f"pip install 'protoclip-scale[{name}]'")
    env = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "TRACKIO_DIR": str(tmp_path / "whole" / "trackio"), "A_PASSWORD": PASSWORD}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    assert spawn(attempt, 1, str(whole), name, 1, 0, STEPS, False, env=env) == [[]]
    env["TRACKIO_DIR"] = str(tmp_path / "killed" / "trackio")
    with pytest.raises(AssertionError):
        spawn(attempt, 1, str(killed), name, 1, 0, KILLED_AFTER, True, env=env)
    first_id = kept_id(killed, name)
    assert spawn(attempt, 1, str(killed), name, 2, RESUMED_AT, STEPS, False, env=env) == [[]]
    assert kept_id(killed, name) == first_id
    assert sent(killed, name) == sent(whole, name) == {"train": STEPS, "eval": STEPS}
    for folder in (whole, killed):
        for place, value in env.items():
            monkeypatch.setenv(place, value.replace("killed", folder.name) if place == "TRACKIO_DIR" else value)
        if name == "trackio":
            import trackio.utils

            monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", folder / "trackio")
            assert trackio.utils
        found = READERS[name](folder)
        assert not [key for key in found if key.startswith("checkpoint") or key.endswith(("/weights", "/attempt"))]
        for key, series in WANTED.items():
            assert [step for step, _ in found[key]] == [step for step, _ in series], (folder.name, key)
            assert [value for _, value in found[key]] == pytest.approx([value for _, value in series]), (folder.name, key)
        assert found["train/samples"][-1][1] == 64 * STEPS
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path


def test_a_new_tracker_is_sent_what_the_run_has_done_so_far(tmp_path):
    log = RunLog(tmp_path, 1, is_main=True)
    for step in range(1, 6):
        log.metrics("train", step, 64 * step, **FIGURES[step - 1])
    spawn(attempt, 1, str(tmp_path), "tensorboard", 2, 5, STEPS, False)
    assert [step for step, _ in of_tensorboard(tmp_path)["train/loss"]] == list(range(1, STEPS + 1))


def test_a_tracker_that_fails_is_told_once_and_tried_again(tmp_path, monkeypatch):
    sent, said = [], []

    class Tracker:
        def log(self, values, step):
            if len(sent) == 2 and not said:
                raise ConnectionError("https://me:secret@host/ is away")
            sent.append(step)

        def finish(self):
            raise OSError("away again")

    monkeypatch.setitem(kinds.OPENERS, "tensorboard", lambda opening: kinds.Opened(Tracker(), "x"))
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(following, "PATIENCE_SECONDS", 0.01)
    log = RunLog(tmp_path, 1, is_main=True)
    trackers = Trackers(tmp_path, load_recipe(RECIPES / "demo_clip.yaml"), ("tensorboard",), "id", 1, said.append)
    trackers.begin(0)
    for step in range(1, 6):
        log.metrics("train", step, 64 * step, loss=1.0)
    trackers.finish()
    assert sent == [1, 2, 3, 4, 5], "none lost, none twice"
    assert len(said) == 1 and "tensorboard fails (ConnectionError: https://***@host/ is away)" in said[0]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"tensorboard": {"id": "x", "sent": {"train": 5}}}


def test_a_tracker_that_hangs_holds_up_nothing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setitem(kinds.OPENERS, "wandb", lambda opening: time.sleep(3600))
    trackers = Trackers(tmp_path, load_recipe(RECIPES / "demo_clip.yaml"), ("wandb",), "id", 1, said.append)
    trackers.begin(0)
    trackers.finish(0.05)
    assert said == ["warning: run.trackers: wandb did not take the last figures within 0 s; they are in metrics.jsonl"]


def test_names_that_are_not_known_or_not_installed(monkeypatch):
    with pytest.raises(ValidationError):
        Run(trackers=["comet"])
    with pytest.raises(UserError, match="run.trackers"):
        load_recipe(RECIPES / "demo_clip.yaml", ["run.trackers=[tensorbord]"])
    assert kinds.missing(("tensorboard",)) is None
    monkeypatch.setattr(kinds.importlib.util, "find_spec", lambda name: None)
    assert kinds.missing(("mlflow",)) == "run.trackers: mlflow is not installed here: pip install 'protoclip-scale[mlflow]', or leave mlflow out"


def test_a_real_run_that_was_killed_in_a_step(tmp_path):
    values = (*TINY, "schedule.total=2 episodes", "run.checkpoint_steps=2", "run.trackers=[tensorboard]")
    assert pretrain(tmp_path / "whole", "demo_clip.yaml", values) == [0], output(tmp_path / "whole")
    assert pretrain(tmp_path / "killed", "demo_clip.yaml", values, env={"PROTOCLIP_KILL_AT": "train.step:7"}) == [-9]
    assert pretrain(tmp_path / "killed", "demo_clip.yaml", values) == [0], output(tmp_path / "killed")
    losses = [(line["step"], pytest.approx(line["loss"])) for line in metrics(tmp_path / "whole", "train")]
    for name in ("whole", "killed"):
        assert of_tensorboard(tmp_path / name)["train/loss"] == losses and len(losses) == 8
