"""metrics.jsonl over resumptions and kills, atomic status, environment without secrets, time per phase."""

import json
import os

import numpy as np
import pytest
import torch

from protoclip_scale.engine import run_log
from protoclip_scale.engine.run_log import PhaseClock, RunLog, finite, publish_text


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_flushed_json_lines_with_null_for_non_finite(tmp_path):
    log = RunLog(tmp_path / "run", attempt=2, is_main=True)
    log.metrics("train", 3, 384, loss=torch.tensor(1.5), lr=np.float32(0.25), **{"loss/clip": float("nan"), "sizes": np.arange(2), "nested": {"x": float("inf")}})
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line.pop("time") > 1e9
    assert line == {"kind": "train", "step": 3, "samples": 384, "attempt": 2, "loss": 1.5, "lr": 0.25, "loss/clip": None, "sizes": [0, 1], "nested": {"x": None}}
    with pytest.raises(AssertionError, match="attempt"):
        log.metrics("train", 4, 512, attempt=9)
    with pytest.raises(AssertionError, match="kind"):
        log.metrics("other", 4, 512)


def test_discard_after_moves_later_and_torn_lines_and_keeps_the_checkpoints_step(tmp_path):
    first = RunLog(tmp_path, attempt=1, is_main=True)
    for step in range(1, 7):
        first.metrics("train", step, step * 10, loss=1.0 / step)
    first.metrics("eval", 4, 40, top1=0.5)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "los')
    second = RunLog(tmp_path, attempt=2, is_main=True)
    assert second.discard_after(4) == 3
    kept = lines(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in kept] == [("train", 1), ("train", 2), ("train", 3), ("train", 4), ("eval", 4)]
    discarded = lines(tmp_path / "metrics.discarded.jsonl")
    assert [line.get("step") for line in discarded] == [5, 6, None] and discarded[2]["torn"].endswith('"los')
    second.metrics("train", 5, 50, loss=0.3)
    assert [line["attempt"] for line in lines(tmp_path / "metrics.jsonl")] == [1] * 5 + [2]
    assert second.discard_after(4) == 1 and len(lines(tmp_path / "metrics.discarded.jsonl")) == 4
    assert second.discard_after(4) == 0
    second.metrics("train", 5, 50, loss=0.2)
    assert lines(tmp_path / "metrics.jsonl")[-1]["loss"] == 0.2


def test_a_torn_last_line_does_not_swallow_the_next_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "ste')
    RunLog(tmp_path, 2, True).metrics("train", 1, 10)
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(text) == 2 and json.loads(text[1])["step"] == 1


def test_a_kill_between_the_two_files_loses_no_line(tmp_path, monkeypatch):
    log = RunLog(tmp_path, 1, True)
    for step in (1, 2, 3):
        log.metrics("train", step, step)

    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_log, "publish_text", killed)
        with pytest.raises(KeyboardInterrupt):
            log.discard_after(1)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    log.discard_after(1)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1]
    assert {line["step"] for line in lines(tmp_path / "metrics.discarded.jsonl")} == {2, 3}


def test_status_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    log = RunLog(tmp_path, 3, True)
    log.write_status("running", resumable=True)

    def failing(source, target):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="no space"):
            log.write_status("failed", 1, "x" * 1000, resumable=False)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
    log.write_status("stopped", 75, "SIGTERM", resumable=True)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status.pop("time") > 1e9
    assert status == {"state": "stopped", "code": 75, "message": "SIGTERM", "resumable": True, "attempt": 3}
    assert os.listdir(tmp_path) == ["status.json"], "no temporary file stays"


def test_other_ranks_write_nothing_but_a_failure_only_they_saw(tmp_path):
    log = RunLog(tmp_path, 1, is_main=False)
    log.metrics("train", 1, 1)
    log.text("hello")
    log.write_status("failed", 1, "x")
    log.write_environment()
    assert log.discard_after(0) == 0 and os.listdir(tmp_path) == []
    log.write_status("failed", 1, "out of memory on rank 3", any_rank=True)
    assert os.listdir(tmp_path) == []  # this is no folder of the attempt's: a machine that does not share it
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "0001").write_text("{}")
    log.write_status("failed", 1, "out of memory on rank 3", any_rank=True)
    assert sorted(os.listdir(tmp_path)) == ["attempts", "status.json"]


def test_environment_names_versions_and_hardware_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    log = RunLog(tmp_path, 1, True)
    log.write_environment(ranks=2)
    text = (tmp_path / "environment.json").read_text()
    found = json.loads(text)
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0] and {"python", "timm", "transformers", "accelerate", "datasets"} <= found["versions"].keys()
    assert found["hardware"]["cpus"] == os.cpu_count() and found["ranks"] == 2 and "git_commit" in found
    assert "hf_secret_value" not in text
    log.write_environment(ranks=2)
    assert not (tmp_path / "log.txt").exists()
    RunLog(tmp_path, 2, True).write_environment(ranks=8)
    assert (tmp_path / "log.txt").read_text().endswith("environment.json: ranks was 2, is 8\n")


def test_text_is_stamped(tmp_path):
    log = RunLog(tmp_path, 1, True)
    log.text("one")
    log.text("two\nthree")
    assert [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two", "three"]


def test_publish_text_makes_its_folder_and_finite_takes_paths(tmp_path):
    publish_text(tmp_path / "a" / "b.txt", "text")
    assert (tmp_path / "a" / "b.txt").read_text() == "text"
    assert finite((tmp_path, True, None, 2)) == [str(tmp_path), True, None, 2]


def test_phase_clock_takes_inner_phases_off_outer_ones_and_survives_exceptions():
    now = [0.0]
    clock = PhaseClock({"train": 10.0}, clock=lambda: now[0])
    assert PhaseClock().shares() == {}
    with clock.measure("train"):
        now[0] += 5
        with clock.measure("evaluate"):
            now[0] += 3
        now[0] += 2
    now[0] += 100
    with pytest.raises(ValueError), clock.measure("fetch"):
        now[0] += 20
        raise ValueError
    assert clock.seconds == {"train": 17.0, "evaluate": 3.0, "fetch": 20.0}
    assert clock.shares() == {"train": 17 / 40, "evaluate": 3 / 40, "fetch": 0.5}
