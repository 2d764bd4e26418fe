"""Work spread over processes: results, the count of rows, and what happens when a worker fails, is killed, or loses its parent."""

import io
import multiprocessing.forkserver
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from protoclip_scale.errors import UserError
from protoclip_scale.preparation import pool
from protoclip_scale.preparation.progress import ProgressBar
from tests import support


def work(job: dict, item: int, advance) -> int:
    """Counts to 100 x item; the job says which item ends otherwise, and how."""
    for _ in range(100 * item):
        advance(1)
    if item == job.get("raises"):
        raise UserError("this item is wrong")
    if item == job.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    if "pids" in job:
        (Path(job["pids"]) / str(os.getpid())).touch()
        time.sleep(60)
    return item * job["factor"]


@pytest.fixture(autouse=True)
def server():
    multiprocessing.forkserver.ensure_running()  # with what tests.support preloads


@pytest.mark.parametrize("processes", [1, 2])
def test_every_item_gives_its_result_and_all_rows_are_counted(processes):
    rows = []
    assert sorted(pool.run(work, {"factor": 3}, range(1, 6), processes, rows.append)) == [3, 6, 9, 12, 15]
    assert sum(rows) == 1500


@pytest.mark.parametrize("processes", [1, 2])
def test_the_error_of_one_is_raised(processes):
    with pytest.raises(UserError, match="this item is wrong"):
        list(pool.run(work, {"factor": 1, "raises": 2}, range(1, 6), processes, lambda rows: None))


def test_a_killed_worker_is_one_line():
    with pytest.raises(UserError, match="a worker process was killed.*goes on where it stopped"):
        list(pool.run(work, {"factor": 1, "dies": 2}, range(1, 6), 2, lambda rows: None))


@pytest.mark.slow  # its parent must start a server of its own, which imports everything again
def test_workers_end_when_their_parent_is_killed(tmp_path):
    assert support._run(_work_until_killed, 1, {}, [(str(tmp_path),)])[0] == -9
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)


def _work_until_killed(pids: str) -> None:
    def advance(rows: int) -> None:
        if len(list(Path(pids).iterdir())) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    list(pool.run(work, {"factor": 1, "pids": pids}, range(1, 3), 2, advance))


def test_progress_on_a_pipe_is_lines_and_on_a_terminal_a_bar(monkeypatch):
    monkeypatch.setattr("protoclip_scale.preparation.progress.SECONDS_BETWEEN_LINES", 0.0)
    pipe = io.StringIO()
    with ProgressBar("encoding", 1000, done=500, stream=pipe) as bar:
        bar.note = "3 bad"
        bar.advance(250)
    first, last = pipe.getvalue().splitlines()
    assert "encoding: 750/1,000 rows (75%)" in first and "eta" in first and first.endswith("3 bad")
    assert "encoding: 750 rows in" in last

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    with ProgressBar("encoding", 1000, stream=screen) as bar:
        bar.advance(400)
    assert "400/1000" in screen.getvalue() and "\x1b[" in screen.getvalue()
