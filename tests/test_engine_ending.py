"""How an attempt's end is told: whether another start may help, who prints what a machine's ranks all know, and what the watch writes last."""

import dataclasses
import errno
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from protoclip_scale import collectives, standing
from protoclip_scale.data.sources.retry import retry
from protoclip_scale.engine import ending as endings
from protoclip_scale.engine import scratch, signals
from protoclip_scale.engine.ending import Ending, may_pass
from protoclip_scale.engine.report_writer import ReportWriter
from protoclip_scale.engine.run_log import RunLog
from protoclip_scale.engine.watch import NoWatch, heard, watch
from protoclip_scale.engine.watch.heard import Beat, Failure, Member, this_member
from protoclip_scale.engine.watch.watch import Watch
from protoclip_scale.errors import LostRank, Outage, UserError
from protoclip_scale.recipe.schema import Run
from protoclip_scale.report.console import Console
from tests.support import TINY, output, pretrain, spawn


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (UserError("data: 9 of 10 rows could not be decoded"), False),
        (Outage("s3://bucket: reading failed for 300 s"), True),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_which_failures_may_be_gone_at_another_start(tmp_path, error, passes):
    """Job scripts read it from status.json."""
    assert may_pass(error) == passes
    ending = Ending(tmp_path, NoWatch())
    ending.report_to(RunLog(tmp_path, 1, is_main=True), Console(), ReportWriter(tmp_path, False, print))
    ending.failed(error)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and status.get("may_pass", False) == passes and "lost_rank" not in status


def raise_from_rank_zero(rank: int, world: int) -> list:
    dist.init_process_group("gloo")

    def wait_for_a_place_that_is_away() -> None:
        retry(lambda: (_ for _ in ()).throw(ConnectionResetError("away")), 0.0, "reading", "s3://bucket", remote=True)

    found = []
    for collective in (collectives.from_rank_zero, collectives.on_each_machine):
        try:
            collective(wait_for_a_place_that_is_away)
        except UserError as error:
            found.append((type(error).__name__, error.may_pass, str(error)))
    return found


def test_an_outage_is_one_on_all_ranks():
    """Any of them may be the first to write status.json."""
    first, second = spawn(raise_from_rank_zero, 2)
    assert first == second and [error[:2] for error in first] == [("Outage", True)] * 2 and "away" in first[0][2]


def watch_of(me: int, machines: str) -> Watch:
    """Of a rank among others, without its threads; ``machines``: a letter for each rank."""
    members = [Member(rank, machine, 100 + rank, f"machine {machine}", 0) for rank, machine in enumerate(machines)]
    found = object.__new__(Watch)
    found._me, found._gone, found._doomed_since, found._lost_after, found._longest = me, {}, None, 60.0, 600.0
    found._view = watch.View(members, me, 0.0)
    found._view.answered = found._view.listened = 1000.0
    for member in members:
        found._view.hear(member.rank, Beat(7, "train", 0, 5, 3, 0.1, "", waits=True), 1000.0)
    return found


def test_one_rank_of_each_machine_prints_what_all_know(monkeypatch):
    states = {}
    monkeypatch.setattr(heard, "_process", lambda pid: (states.get(pid, "S"), 0))
    assert [watch_of(me, "aabb").speaks() for me in range(4)] == [True, False, True, False]
    for state in "ZXT":  # rank 0 cannot any more
        states[100] = state
        assert [watch_of(me, "aaa").speaks() for me in (1, 2)] == [True, False]
    states.clear()
    hangs = watch_of(1, "aa")
    hangs._view.heard[0] = dataclasses.replace(hangs._view.heard[0], at=1000.0 - 60)
    assert hangs.speaks()
    for failure, speaks in ((Failure(0, "no rows", own=True), True), (Failure(0, "lost rank 3 on b", own=False), False)):
        states[100] = "X"
        told = watch_of(1, "aa")
        told._view.failure = failure
        assert told.speaks() == speaks


def test_a_lost_rank_is_told_by_the_rank_that_speaks(tmp_path):
    class Lost(NoWatch):
        def __init__(self, speaks: bool):
            self.speaks = lambda: speaks

        def cause(self, error: BaseException) -> str:
            return "lost rank 3 on h1"

    for speaks in (True, False):
        error = Ending(tmp_path, Lost(speaks)).failed(RuntimeError("gloo"))
        assert isinstance(error, LostRank) and error.speaks == speaks


def test_a_silent_rank_is_lost_after_lost_seconds_where_the_store_answers_and_nothing_gets_on(monkeypatch):
    monkeypatch.setattr(heard, "_process", lambda pid: ("S", 0))
    monkeypatch.setattr(standing.HERE, "since", 900.0)
    silent = watch_of(0, "ab")
    silent._view.heard[1] = dataclasses.replace(silent._view.heard[1], at=930.0)
    assert silent._doom(1000.0).startswith("lost rank 1 on b")  # silent for 70 s, nothing got on for 100 s
    monkeypatch.setattr(standing.HERE, "since", 990.0)
    assert silent._doom(1000.0) is None
    monkeypatch.setattr(standing.HERE, "since", 900.0)
    silent._view.listened = silent._view.answered = 940.0
    assert silent._doom(1000.0) is None  # the store is silent: timeout_minutes


def test_a_rank_waits_in_one_collective_no_longer_than_it_may(monkeypatch):
    """Under NCCL nothing is raised; a loop that polls for what another rank does, or this rank's own long work, is no such wait."""
    monkeypatch.setattr(heard, "_process", lambda pid: ("S", 0))
    monkeypatch.setattr(standing.HERE, "since", 300.0)
    monkeypatch.setattr(watch.stacks, "whereabouts", lambda: ("any_rank in training.py:50", True))
    waits = watch_of(0, "ab")
    waits._view.hear(1, Beat(8, "train", 0, 4, 3, 600.0, "decode.py:7", waits=False), 1000.0)
    assert waits._doom(1000.0).startswith("other ranks were waited for in vain for 700 s: rank 1 on b is late, working in train, episode 1, step 4 at decode.py:7")
    monkeypatch.setattr(standing.HERE, "waits", True)
    assert waits._doom(1000.0) is None
    monkeypatch.setattr(standing.HERE, "waits", None)
    monkeypatch.setattr(watch.stacks, "whereabouts", lambda: ("decode.py:7", False))
    assert waits._doom(1000.0) is None
    monkeypatch.setattr(watch.stacks, "whereabouts", lambda: ("any_rank in training.py:50", True))
    monkeypatch.setattr(standing.HERE, "since", 500.0)
    assert waits._doom(1000.0) is None


@pytest.fixture
def store(monkeypatch):
    """Where a rank of two says how it is; the other one is the test's, and silent. Ending the process holds the thread that does it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setattr(collectives, "broadcast_object", lambda value: "watch")
    monkeypatch.setattr(collectives, "all_gather_objects", lambda value: [this_member(0), Member(1, "h1", 5, "another", 0)])
    beats = dist.PrefixStore("watch", server)
    beats.set("1", json.dumps(dataclasses.asdict(Beat(1, "train", 0, 5, 3, 100.0, "", waits=True))))
    ended = threading.Event()

    def end(code: int) -> None:
        ended.set()
        if not isinstance(threading.current_thread(), threading.Timer):
            threading.Event().wait()  # of a thread that nobody waits for

    monkeypatch.setattr(watch, "os", SimpleNamespace(_exit=end))
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(watch, "FAREWELL_SECONDS", 0.5)
    watches: list[Watch] = []

    def begin(**settings: float) -> Watch:
        watches.append(Watch(Run(**settings)))
        return watches[-1]

    yield SimpleNamespace(beats=beats, ended=ended, begin=begin)
    for begun in watches:
        begun.close()


def test_a_watch_that_ends_its_process_tells_the_others_why(store, tmp_path):
    """Those on other machines, whose main threads hang at NCCL, too, would else hear nothing but silence for timeout_minutes."""
    said = []
    found = store.begin(lost_seconds=0.3)
    found.report_to(tmp_path, lambda line: None, said.append)
    standing.HERE.since = time.monotonic() - 100
    assert store.ended.wait(60)
    failure = Failure(**json.loads(store.beats.get("failure")))
    assert failure.rank == 0 and not failure.own and failure.line.startswith("lost rank 1 on h1") and said == [failure.line]


def raises(line: str) -> None:
    raise OSError(errno.EIO, "Input/output error")


def hangs(line: str) -> None:
    threading.Event().wait()  # for good: the watch would go on to end this process, when the test is over


@pytest.mark.parametrize("broken", [raises, hangs])
def test_a_file_system_that_fails_or_hangs_does_not_keep_the_watch_from_its_work(store, tmp_path, monkeypatch, broken):
    told = threading.Event()

    def tell(line: str) -> None:
        told.set()
        broken(line)

    monkeypatch.setattr(watch, "LAST_WORDS_SECONDS", 1.0)
    found = store.begin(lost_seconds=3000, timeout_minutes=60, hang_seconds=0.1)
    found.report_to(tmp_path, tell, broken)
    standing.HERE.since = time.monotonic() - 100
    assert told.wait(60)
    store.beats.set("failure", json.dumps(dataclasses.asdict(Failure(1, "no rows", own=True))))
    assert store.ended.wait(60)


def test_status_is_written_before_the_terminal_gets_its_line_and_a_disk_that_hangs_is_not_waited_for(tmp_path, monkeypatch, capsys):
    class Terminal(Console):
        def failure(self, message: str) -> None:
            assert json.loads((tmp_path / "status.json").read_text())["lost_rank"]
            raise BrokenPipeError

    ending = Ending(tmp_path, NoWatch())
    ending.report_to(RunLog(tmp_path, 1, is_main=True), Terminal(), ReportWriter(tmp_path, False, print))
    with pytest.raises(BrokenPipeError):
        ending._ended_by_watch("lost rank 3 on h1")
    monkeypatch.setattr(endings, "STATUS_SECONDS", 0.05)
    ending.report_to(SimpleNamespace(write_status=lambda *_, **__: hangs("")), Console(), ReportWriter(tmp_path, False, print))
    ending._ended_by_watch("lost rank 3 on h1")
    assert capsys.readouterr().err.count("error: rank 0: lost rank 3 on h1") == 2


def test_ctrl_c_stops_after_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    assert pretrain(run, "demo_clip.yaml", TINY, env={"PROTOCLIP_INTERRUPT_AT": "train.step:2"}) == [75], output(run)
    assert "stopping after this step and a checkpoint" in output(run)
    assert json.loads((run / "status.json").read_text())["state"] == "stopped" and list((run / "checkpoints").glob("step-*"))


def test_a_second_ctrl_c_counts_once_the_first_has_been_passed_on(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    try:
        stop = signals.StopFlag()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.raised
        now[0] += 5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_scratch_is_found_again_by_the_host_and_that_of_others_is_removed(tmp_path, monkeypatch):
    """After a requeue a machine has another number; on a disk that all share, those of this start keep theirs."""
    hosts = [(0, "n7"), (0, "n7"), (1, "n3"), (1, "n3"), (2, "n3"), (2, "n3")]
    monkeypatch.setattr(collectives, "all_gather_objects", lambda value: hosts if isinstance(value, tuple) else [None])
    monkeypatch.setattr(collectives, "local_world_size", lambda: 2)
    for name in ("run-n7-0", "run-n3-0", "run-n3-1", "run-n5-0", "other-n5-0", "run-0001"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(collectives, "rank", lambda: 2)
    assert scratch.open_scratch(tmp_path, "run") == tmp_path / "run-n3-0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other-n5-0", "run-n3-0", "run-n3-1", "run-n7-0"]
    monkeypatch.setattr(collectives, "rank", lambda: 5)
    assert scratch.open_scratch(tmp_path, "run") == tmp_path / "run-n3-1"
