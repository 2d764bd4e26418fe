"""report.html beside training: written by processes of their own, so that no step waits for one and no trouble with one reaches the run."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import protoclip_scale
from protoclip_scale.report.html import NAME

LAST_SECONDS = 300.0  # for the last report, which takes about one where the machine is not busy
PAUSE = 20  # times as long as the last report took: at most a twentieth of a core goes into reports
NICENESS = 10  # of those beside training


class ReportWriter:
    """On rank 0, where ``run.report`` is set; else every call does nothing. A report that cannot be written is told once."""

    def __init__(self, folder: Path, enabled: bool, tell: Callable[[str], None]):
        self._folder, self._enabled, self._tell = folder, enabled, tell
        self._process: subprocess.Popen | None = None
        self._errors: IO[bytes] | None = None
        self._began, self._not_before = 0.0, 0.0

    def ask(self) -> None:
        """There is news: write a report unless one is being written or has just been. Never waits."""
        if self._over() and self._enabled and time.monotonic() >= self._not_before:
            self._start(NICENESS)

    def finish(self) -> None:
        """Write the run's last report, and wait for it."""
        self.leave()
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LAST_SECONDS)
            if not self._over():
                self._end()
                self._fail(f"it took more than {LAST_SECONDS:.0f} seconds")

    def leave(self) -> None:
        """Let a last report be written after this process has ended."""
        self._end()
        if self._enabled:
            self._start(niceness=0)

    def _start(self, niceness: int) -> None:
        package = str(Path(protoclip_scale.__file__).parents[1])
        paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        self._began = time.monotonic()
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (for as long as the process lives)
            command = [sys.executable, "-m", "protoclip_scale.report.html", str(self._folder)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors, env=os.environ | {"PYTHONPATH": paths})
            os.setpriority(os.PRIO_PROCESS, self._process.pid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
        except OSError as error:
            if self._process is None:
                self._fail(str(error))

    def _over(self) -> bool:
        """Whether no report is being written; one that has failed is told."""
        if self._process is None:
            return True
        code = self._process.poll()
        if code is None:
            return False
        self._process = None
        self._not_before = time.monotonic() + PAUSE * (time.monotonic() - self._began)
        if code:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").split("\n")
            self._fail(next((line for line in reversed(lines) if line.strip()), f"exit code {code}"))
        self._errors.close()
        return True

    def _end(self) -> None:
        if not self._over():
            self._process.kill()
            self._process.wait()
            self._process = None
            self._errors.close()

    def _fail(self, why: str) -> None:
        self._enabled = False
        self._tell(f"warning: {NAME} was not written: {why.removeprefix('error: ')}; python tools/report.py {self._folder} writes it")
