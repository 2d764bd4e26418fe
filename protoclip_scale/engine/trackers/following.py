"""Trackers follow metrics.jsonl, each in a thread of its own: one that is slow, or whose server is away, holds up neither training nor the others."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from protoclip_scale.data.sources.retry import text_of
from protoclip_scale.engine.trackers.kinds import OPENERS, Opened, Opening
from protoclip_scale.files import publish_json
from protoclip_scale.recipe import Recipe
from protoclip_scale.redact import redact_text, redacted

NAME = "trackers.json"
SENT_KINDS = ("train", "episode", "eval")
RESERVED = ("kind", "step", "attempt", "time")
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 60.0  # between tries while a tracker fails
LAST_SECONDS = 30.0  # for what is not sent yet when the run ends
STOPPED_SECONDS = 10.0  # where it is stopped or fails


class Trackers:
    """Of a run, on rank 0; ``names`` is empty elsewhere. Ids, and what was sent, are kept in RUN/trackers.json."""

    def __init__(self, folder: Path, recipe: Recipe, names: tuple[str, ...], run_id: str, attempt: int, tell: Callable[[str], None]):
        self._folder, self._recipe, self._names = folder, recipe, names
        self._run_id, self._attempt, self._tell = run_id, attempt, tell
        self._followers: list[_Follower] = []

    def begin(self, resumed_step: int) -> None:
        """Send what metrics.jsonl holds and a tracker lacks, and from now on every new line. Called once lines after ``resumed_step`` are taken back."""
        settings, config, kept = self._recipe.run, flat(redacted(self._recipe)), _Kept(self._folder / NAME)
        for name in self._names:
            known = kept.of(name)
            opening = Opening(self._folder, settings.tracker_project, self._recipe.name, self._run_id, known.get("id"), resumed_step, config)
            self._followers.append(_Follower(name, opening, kept, self._attempt, self._tell))
        for follower in self._followers:
            follower.start()

    def finish(self, seconds: float = LAST_SECONDS) -> None:
        """Send the rest and close; what is not sent within ``seconds`` is sent when the run is started again, or never."""
        deadline = time.monotonic() + seconds
        for follower in self._followers:
            follower.stop()
        for follower in self._followers:
            follower.join(max(0.0, deadline - time.monotonic()))
            if follower.is_alive():
                self._tell(f"warning: run.trackers: {follower.name} did not take the last figures within {seconds:.0f} s; they are in metrics.jsonl")
        self._followers = []


class _Kept:
    """trackers.json: {name: {id, sent: {kind of line: the last step that was sent}}}, written by the threads of one process."""

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        try:
            self._found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or one that a full disk has torn: trackers are then new to the run
            self._found = {}

    def of(self, name: str) -> dict[str, Any]:
        """What earlier attempts kept; {} of a tracker that is new to the run."""
        return self._found.get(name, {})

    def put(self, name: str, value: dict[str, Any]) -> None:
        with self._lock:
            self._found[name] = value
            publish_json(self._path, self._found)


class _Follower(threading.Thread):
    """Sends lines of metrics.jsonl, in order."""

    def __init__(self, name: str, opening: Opening, kept: _Kept, attempt: int, tell: Callable[[str], None]):
        super().__init__(name=name, daemon=True)
        self._opening, self._kept, self._attempt, self._tell = opening, kept, attempt, tell
        self._floor: dict[str, int] = dict(kept.of(name).get("sent", {}))
        self._sent = dict(self._floor)
        self._unsettled: deque[tuple[float, str, int]] = deque()  # when taken, kind of line, step
        self._ended = threading.Event()
        self._offset = 0
        self._told = False

    def stop(self) -> None:
        self._ended.set()

    def run(self) -> None:
        opened = None
        while True:
            last_round = self._ended.is_set()
            try:
                if opened is None:
                    opened = self._open()
                self._send_news(opened)
                wait = POLL_SECONDS
            except Exception as error:  # whatever a tracker does, training goes on
                self._tell_once(error)
                wait = PATIENCE_SECONDS
            if last_round:
                break
            self._ended.wait(wait)
        if opened:
            try:
                opened.tracker.finish()
                self._settle(opened, time.monotonic())
            except Exception as error:
                self._tell_once(error)

    def _open(self) -> Opened:
        opened = OPENERS[self.name](self._opening)
        if opened.rewinds:
            self._floor = {kind: min(step, self._opening.resumed_step) for kind, step in self._floor.items()}
        self._keep(opened)
        return opened

    def _send_news(self, opened: Opened) -> None:
        """From where the last call ended; a line that cannot be sent is tried again by the next call."""
        try:
            for offset, line in _lines_from(self._opening.folder / "metrics.jsonl", self._offset):
                kind = line.get("kind")
                if kind in SENT_KINDS and line["attempt"] <= self._attempt and line["step"] > self._floor.get(kind, -1):
                    opened.tracker.log(figures_of(line), step=line["step"])
                    self._unsettled.append((time.monotonic(), kind, line["step"]))
                self._offset = offset
        finally:
            self._settle(opened, time.monotonic() - opened.settles)

    def _settle(self, opened: Opened, until: float) -> None:
        """What was taken by then is never sent again."""
        settled = False
        while self._unsettled and self._unsettled[0][0] <= until:
            _, kind, step = self._unsettled.popleft()
            self._sent[kind], settled = step, True
        if settled:
            self._keep(opened)

    def _keep(self, opened: Opened) -> None:
        self._kept.put(self.name, {"id": opened.id, "sent": dict(self._sent)})

    def _tell_once(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            self._tell(f"warning: run.trackers: {self.name} fails ({redact_text(text_of(error))}); its figures are in metrics.jsonl, and are sent when it answers again")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{'optim.lr': 0.001, ...}: numbers and text; lists as JSON, null as text."""
    if not isinstance(value, dict):
        is_plain = isinstance(value, int | float | str)
        return {prefix[:-1]: value if is_plain else json.dumps(value)}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{prefix}{key}.")
    return found


def figures_of(line: dict[str, Any]) -> dict[str, float]:
    """{'train/loss': 3.1, 'train/samples': 1280, ...}: the numbers of a line under its kind."""
    return {f"{line['kind']}/{name}": value for name, value in line.items() if name not in RESERVED and isinstance(value, int | float) and not isinstance(value, bool)}


def _lines_from(path: Path, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(where it ends, line) of the whole lines after a byte; torn ones are passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for text in file:
            if not text.endswith(b"\n"):
                return
            offset += len(text)
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield offset, line
