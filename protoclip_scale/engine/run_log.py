"""What a run leaves to read: metrics.jsonl, log.txt, status.json and environment.json, written by rank 0."""

import contextlib
import errno
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from protoclip_scale import standing
from protoclip_scale.engine.run_folder import newest_attempt
from protoclip_scale.files import overwrite_json, publish_json, publish_text
from protoclip_scale.redact import redact_text, redacted
from protoclip_scale.report.plain import append_log

KINDS = ("train", "episode", "kmeans", "eval", "checkpoint", "phases", "warning")
PACKAGES = ("torch", "torchvision", "accelerate", "transformers", "timm", "datasets", "faiss-cpu", "faiss-gpu", "numpy", "deepspeed")


def finite(value: Any) -> Any:
    """A value that JSON can hold: numpy and torch numbers as Python's, non-finite floats as null, paths as text."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool) or value is None else str(value)


class RunLog:
    """The readable files of a run directory. On other ranks than 0 every call does nothing."""

    def __init__(self, run_dir: Path, attempt: int, is_main: bool):
        self.run_dir, self.attempt, self.is_main = Path(run_dir), attempt, is_main
        self.metrics_path = self.run_dir / "metrics.jsonl"
        self._metrics = None

    def metrics(self, kind: str, step: int, samples: int, **figures: Any) -> None:
        """Append one line, flushed, unless a newer attempt owns the run. ``kind`` is one of ``KINDS``; figures with a slash are passed as ``**{"loss/clip": x}``."""
        self._append(kind, [figures], step, samples)

    def _append(self, kind: str, lines: list[dict[str, Any]], step: int, samples: int) -> None:
        """In one write, so that a kill leaves all lines, or at most tears them at one place."""
        assert kind in KINDS, f"unknown kind of metrics line: {kind}"
        reserved = {"kind": kind, "step": int(step), "samples": int(samples), "attempt": self.attempt, "time": round(time.time(), 3)}
        for figures in lines:
            assert not reserved.keys() & figures.keys(), f"figures must not be named {sorted(reserved.keys() & figures.keys())}"
        if not self.is_main or newest_attempt(self.run_dir) > self.attempt:
            return
        if self._metrics is None:
            self._metrics = self._open_metrics()
        try:
            self._metrics.write("".join(json.dumps(finite(reserved | figures), allow_nan=False) + "\n" for figures in lines))
            self._metrics.flush()
        except OSError as error:
            error.filename = str(self.metrics_path)  # which a full disk does not say
            raise

    def _open_metrics(self):
        self.run_dir.mkdir(parents=True, exist_ok=True)
        file = self.metrics_path.open("ab+")
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")  # a kill tore the last line: it must not swallow the next one
        file.close()
        return self.metrics_path.open("a", encoding="utf-8")

    def discard_after(self, step: int) -> int:
        """Move the lines of steps after ``step``, and torn ones, to metrics.discarded.jsonl; gives how many were moved.

        The lines are safe in the second file before the first one is replaced, so a kill in between repeats lines
        there and loses none. Called when a run resumes from the checkpoint of ``step``.
        """
        if not self.is_main or not self.metrics_path.exists():
            return 0
        self.close()
        kept, discarded = [], []
        for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                is_kept = json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                is_kept, line = False, json.dumps({"torn": line, "attempt": self.attempt})
            (kept if is_kept else discarded).append(line + "\n")
        if discarded:
            with (self.run_dir / "metrics.discarded.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(discarded)
                file.flush()
                os.fsync(file.fileno())
            publish_text(self.metrics_path, "".join(kept))
        return len(discarded)

    def once(self, kind: str, step: int, samples: int, **figures: Any) -> None:
        """Append a line unless there is one of this kind and step, as there may be after a kill between the deed and its line."""
        if self.is_main and self.last(kind, step) is None:
            self.metrics(kind, step, samples, **figures)

    def table(self, kind: str, lines: list[dict[str, Any]], step: int, samples: int, **figures: Any) -> None:
        """Append several lines of one kind and step, each with ``figures``, unless there are such lines."""
        if self.is_main and self.last(kind, step, **figures) is None:
            self._append(kind, [line | figures for line in lines], step, samples)

    def last(self, kind: str, step: int | None = None, **figures: Any) -> dict[str, Any] | None:
        """The newest line of a kind, or of a kind and step, with these figures; None if there is none. Reads the file."""
        found = None
        if self.metrics_path.exists():
            for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if entry["kind"] == kind and step in (None, entry["step"]) and all(entry.get(name) == value for name, value in figures.items()):
                        found = entry
        return found

    def write_status(self, state: str, code: int | None = None, message: str = "", resumable: bool = True, any_rank: bool = False, lost_rank: bool = False, may_pass: bool = False) -> None:
        """Replace status.json, unless a newer attempt owns the run. ``any_rank``: a failure that perhaps only this rank saw; the first is kept.
        ``lost_rank``, ``may_pass``: the cause lies outside of the run, so that another start may get further (job scripts read them)."""
        newest = newest_attempt(self.run_dir)
        if newest > self.attempt or not (self.is_main or (any_rank and newest == self.attempt)):
            return  # another rank may even look at another folder, where the attempt is not
        path = self.run_dir / "status.json"
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(path.read_text(encoding="utf-8"))
            if state == "failed" and before["state"] == "failed" and before["attempt"] == self.attempt:
                return  # the first failure is the cause; the others lost a peer
        facts = {"state": state, "code": code, "message": redact_text(message), "resumable": resumable, "attempt": self.attempt, "time": round(time.time(), 3)}
        facts |= {name: True for name, holds in (("lost_rank", lost_rank), ("may_pass", may_pass)) if holds}
        try:
            publish_json(path, facts)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and path.exists():
                overwrite_json(path, facts)  # a full disk has room in a file that is there
            raise

    def write_environment(self, **facts: Any) -> None:
        """Replace environment.json with versions, hardware and git commit; a change since the last attempt goes to log.txt.

        Environment variables, command lines and host names are left out: they may carry tokens.
        """
        if not self.is_main:
            return
        path = self.run_dir / "environment.json"
        found = redacted(finite({"attempt": self.attempt, **environment(), **facts}))
        if path.exists():
            with contextlib.suppress(ValueError, AttributeError):
                before = json.loads(path.read_text(encoding="utf-8"))
                for key in found.keys() - {"attempt"}:
                    if before.get(key) != found[key]:
                        self.text(f"environment.json: {key} was {json.dumps(before.get(key))}, is {json.dumps(found[key])}")
        publish_json(path, found)

    def text(self, line: str) -> None:
        """Append to log.txt with a time stamp."""
        if self.is_main:
            append_log(self.run_dir / "log.txt", line)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def environment() -> dict[str, Any]:
    """Versions, hardware and the commit of the code."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"versions": versions, "hardware": hardware(), "git_commit": git_commit()}


def hardware() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count(), "gpus": [], "cuda": torch.version.cuda}
    with contextlib.suppress(ValueError, OSError):
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def git_commit() -> str | None:
    """The commit of the checkout this file is tracked in, with '+changes' if the checkout has any; None elsewhere."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


class PhaseClock:
    """Seconds per phase; a phase measured inside another one is taken off the outer one, so shares add up to 1."""

    def __init__(self, seconds: dict[str, float] | None = None, clock: Callable[[], float] = time.monotonic):
        self.seconds: dict[str, float] = dict(seconds or {})
        self._clock, self._open, self._since = clock, [], 0.0

    def _charge(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            with standing.inside(name):
                yield
        finally:
            self._charge()
            self._open.pop()

    def shares(self) -> dict[str, float]:
        """Each phase's part of all measured seconds."""
        total = sum(self.seconds.values())
        return {name: seconds / total for name, seconds in self.seconds.items()} if total else {}
