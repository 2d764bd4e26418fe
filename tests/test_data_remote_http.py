"""Data over HTTP from a real server that is busy, drops connections, hangs, goes down and comes back: nothing is lost and no run is killed."""

from pathlib import Path

import pyarrow as pa
import pytest

from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan
from protoclip_scale.data.sources import filesystems, retry
from protoclip_scale.data.spool import Spool
from protoclip_scale.engine import checkpoint
from protoclip_scale.errors import UserError
from tests.remote_cases import RECIPE, check_equal, check_told, data, settings
from tests.servers import Server
from tests.support import CORPUS, metrics, output, pretrain

FAULTS = {"unavailable_every": 7, "half_every": 9}


@pytest.fixture(scope="module")
def server():
    with Server("http_server", "--root", CORPUS) as server:
        yield server


@pytest.fixture
def cache(tmp_path, monkeypatch) -> dict[str, str]:
    """No file is known from another test; the environment of real runs."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    return {"PROTOCLIP_CACHE": str(tmp_path / "cache")}


def test_blocks_are_those_of_the_files_through_every_fault(server, cache, monkeypatch):
    """503 with and without Retry-After, half answers, and answers that take longer than a client waits: while listing, scanning and reading."""
    monkeypatch.setattr(filesystems, "READ_SECONDS", 0.3)
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.05)
    server.faults(unavailable_every=9, half_every=5, hang_every=13, hang_seconds=2.0)
    (remote,), (local,) = open_readers(data(server.url)), open_readers(data(CORPUS))
    assert remote.fingerprint == local.fingerprint and remote.block_rows.tolist() == local.block_rows.tolist()
    blocks = range(0, len(local.block_rows), 4)
    assert pa.concat_tables([remote.read(block) for block in blocks]) == pa.concat_tables([local.read(block) for block in blocks])
    answers = [request["answer"] for request in server.requests()]
    assert {503, "half", "hang"} <= set(answers), answers
    assert all(remote.file_of_block(block)[0].startswith(server.url) for block in blocks)


@pytest.mark.parametrize(
    ("files", "faults", "told"),
    [
        ("nothing-here.parquet", {}, "404"),
        ("nothing-*.parquet", {}, "lists no file"),
        ("train-00000-of-00010.parquet", {"down_from": 1, "status": 403}, "403"),
        ("train-00000-of-00010.parquet", {"down_from": 3, "status": 401}, "401"),
    ],
)
def test_what_waiting_cannot_mend_is_told_at_once(server, cache, files, faults, told):
    server.faults(**faults)
    with pytest.raises(UserError) as caught:
        open_readers(data(server.url, files, retry_seconds=3600))[0].read(0)
    message = str(caught.value)
    assert told in message and server.url in message and "\n" not in message
    assert len(server.requests()) < 10


@pytest.fixture(scope="module")
def busy_run(server, tmp_path_factory):
    """(a whole run over a server with faults, what it asked)."""
    folder = tmp_path_factory.mktemp("busy")
    server.faults(**FAULTS)
    codes = pretrain(folder / "run", RECIPE, settings(server.url), env={"PROTOCLIP_CACHE": str(folder)})
    assert codes == [0], output(folder / "run")
    return folder / "run", server.requests()


def test_a_run_over_a_busy_server_equals_one_over_files(busy_run, local_run):
    run, requests = busy_run
    answers = [request["answer"] for request in requests]
    assert answers.count(503) >= 5 and answers.count("half") >= 3, answers
    check_equal(run, local_run)
    assert "Got disconnected" not in output(run) and "HTTP Error" not in output(run)  # the libraries' own words


def requests_of(num_episodes: int, folder: Path) -> int:
    """How many requests a run makes for its first episodes when nothing goes wrong."""
    with Server("http_server", "--root", CORPUS) as fresh:
        readers = open_readers(data(fresh.url))
        plan, spool = Plan(index_of(readers), data(fresh.url).plan), Spool(folder, "count")
        for number in range(num_episodes):
            spool.fill(plan.episode(number), number, range(4), readers)
        return len(fresh.requests())


def test_a_server_that_goes_down_for_good_ends_the_run_which_goes_on_when_it_is_back(server, cache, tmp_path, local_run):
    """It goes down in the fetch of the last episode, first with 503, then with refused connections. A stop meanwhile does not wait for it."""
    run, short = tmp_path / "run", settings(server.url, retry_seconds=1)
    server.faults(down_from=requests_of(2, tmp_path / "count") + 3)
    patient = settings(server.url, retry_seconds=3600)  # a run that waited would be killed by the test's own limit
    assert pretrain(run, RECIPE, patient, env=cache | {"PROTOCLIP_STOP_AT": "train.step:6"}) == [75]
    assert pretrain(run, RECIPE, short, env=cache) == [1]
    check_told(run, server.url, ".parquet", "503", "data.retry_seconds")
    assert [folder.name for folder in checkpoint.list_checkpoints(run)] == ["step-00000004", "step-00000007"]
    server.kill()
    assert pretrain(run, RECIPE, short, env=cache) == [1]
    check_told(run, server.url, "Connect")
    server.start()
    assert pretrain(run, RECIPE, short, env=cache) == [0], output(run)
    assert [line["step"] for line in metrics(run, "train") if line["attempt"] > 1] == [8, 9, 10, 11, 12]
    check_equal(run, local_run)
