"""Profiles of chosen steps (``run.profile``): a trace of torch.profiler, its operators as a table, and on a GPU a snapshot of its memory. Numbers stay as they are."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from protoclip_scale import collectives
from protoclip_scale.recipe.schema import Profile

ROWS_OF_TABLE = 30
MEMORY_EVENTS = 200_000


class StepProfiler:
    """Records on every rank the steps of ``settings.steps`` that one episode takes in this attempt; what is recorded when the episode ends or a stop comes is written as well.

    ``tell``: is given a line on what was written, or could not be.
    """

    def __init__(self, settings: Profile | None, folder: Path, device: torch.device, tell: Callable[[str], None]):
        self._settings, self._folder, self._device, self._tell = settings, folder / "profile", device, tell
        self._profile: profile | None = None
        self._first = self._done = 0

    @contextlib.contextmanager
    def episode(self) -> Iterator[None]:
        """Around the steps of an episode."""
        try:
            yield
        finally:
            self._finish()

    def at(self, step: int) -> None:
        """Between two steps, ``step`` of which the run has taken."""
        if self._settings is None:
            return
        first, last = self._settings.steps
        self._done = step
        if step >= last:
            self._finish()
        elif step >= first - 1 and self._profile is None:
            self._begin(step + 1)

    def _begin(self, step: int) -> None:
        on_gpu = self._device.type == "cuda"
        self._first = step
        if on_gpu and self._settings.memory:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=self._settings.memory, acc_events=True)
        self._profile.start()

    def _finish(self) -> None:
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        recorded.stop()
        if self._done >= self._first:
            try:
                self._write(recorded)
            except (OSError, RuntimeError) as error:  # training goes on without it
                self._tell(f"warning: run.profile: the profile could not be written to {self._folder}: {error}")
        if self._device.type == "cuda" and self._settings.memory:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, recorded: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{collectives.rank():05d}-steps-{self._first}-{self._done}"
        trace = self._folder / f"{name}.json.gz"
        unfinished = trace.with_name(f".{trace.name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recorded.export_chrome_trace(str(unfinished))
            order = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
            table = recorded.key_averages().table(sort_by=order, row_limit=ROWS_OF_TABLE, max_name_column_width=80)
        os.replace(unfinished, trace)
        trace.with_name(f"{name}.txt").write_text(table + "\n", encoding="utf-8")
        memory = ""
        if self._device.type == "cuda" and self._settings.memory:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}-memory.pickle"))
            memory = f", {name}-memory.pickle (pytorch.org/memory_viz)"
        self._tell(f"profile of steps {self._first} to {self._done}: {trace} (ui.perfetto.dev), {name}.txt{memory}; other ranks' beside them")
