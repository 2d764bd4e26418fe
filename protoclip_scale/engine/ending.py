"""How an attempt's end is told: to the other ranks, in status.json and the log, and by the exception that sets the exit code."""

import contextlib
import errno
import sys
from pathlib import Path

import torch

from protoclip_scale import collectives
from protoclip_scale.engine.disk import disk_problem
from protoclip_scale.engine.report_writer import ReportWriter
from protoclip_scale.engine.run_log import RunLog
from protoclip_scale.engine.watch import NoWatch, aside
from protoclip_scale.errors import STOPPED_EXIT_CODE, LostRank, UserError
from protoclip_scale.report.console import Console
from protoclip_scale.report.plain import append_log

STATUS_SECONDS = 2.0  # for status.json, before the terminal gets its line
_PASSING_NUMBERS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}  # what a network file system says whose server is away
_OF_THE_DEVICE = ("CUDA error", "cuDNN error", "HIP error")  # of a library, where torch raises a plain RuntimeError
_LASTING = ("out of memory", "ALLOC_FAILED", "device-side assert")  # the run's own doing


def may_pass(error: BaseException) -> bool:
    """Whether the cause may be gone at another start, perhaps on other machines: an outage, or a GPU that has failed."""
    if isinstance(error, UserError):
        return error.may_pass
    if isinstance(error, OSError):
        return error.errno in _PASSING_NUMBERS
    text = str(error)
    of_the_device = isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and text.startswith(_OF_THE_DEVICE))
    return of_the_device and not any(word in text for word in _LASTING)


class Ending:
    """Of an attempt in ``folder``, whose log and console are there once ``report_to`` was called."""

    def __init__(self, folder: Path, watch: NoWatch):
        self._folder, self._watch = folder, watch
        self._log: RunLog | None = None
        self._console = Console()
        self._report = ReportWriter(folder, False, self._console.event)

    def report_to(self, log: RunLog, console: Console, report: ReportWriter) -> None:
        self._log, self._console, self._report = log, console, report
        self._watch.report_to(self._folder, self._tell, self._ended_by_watch)

    def done(self) -> None:
        self._watch.close()
        self._log.write_status("done", 0, resumable=False)
        self._report.finish()
        self._console.close()

    def stopped(self) -> None:
        self._watch.close()
        self._console.close()
        self._log.write_status("stopped", STOPPED_EXIT_CODE, "stopped by a signal after a checkpoint was saved")
        self._report.leave()
        self._console.event("stopped by a signal; the same command goes on from the checkpoint")

    def failed(self, error: BaseException) -> BaseException:
        """Tell why this rank fails; gives the exception to end with: a UserError where the cause is another rank or a disk, otherwise the error itself."""
        passes = may_pass(error)
        if not isinstance(error, UserError):
            if line := self._watch.cause(error):
                error = LostRank(line)
                error.speaks = self._watch.speaks()
            elif line := disk_problem(error, self._folder):
                error = UserError(line)
        line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, UserError):
            self._console.failure(line)
            error.told = self._log is not None
        self._console.close()
        self._write_status(line, lost_rank=isinstance(error, LostRank), may_pass=passes)
        self._watch.failed(line, own=not isinstance(error, LostRank))
        self._watch.close()
        self._report.leave()
        return error

    def _write_status(self, line: str, **facts: bool) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):  # the disk may be what failed
                self._log.write_status("failed", 1, line, any_rank=True, **facts)

    def _tell(self, line: str) -> None:
        """A warning of the watch's, from its thread."""
        if collectives.rank() == 0:
            self._console.event(f"warning: {line}")
            return
        line = f"rank {collectives.rank()}: {line}"
        with contextlib.suppress(OSError):
            append_log(self._folder / "log.txt", f"warning: {line}")
        print(f"warning: {line}", file=sys.stderr, flush=True)

    def _ended_by_watch(self, line: str) -> None:
        """The last words of a process whose main thread hangs, perhaps at the disk."""
        speaks = self._watch.speaks()
        aside(lambda: self._write_status(line, lost_rank=True)).join(STATUS_SECONDS)
        if speaks:
            print(f"error: rank {collectives.rank()}: {line}", file=sys.stderr, flush=True)
        self._console.failure(line)
