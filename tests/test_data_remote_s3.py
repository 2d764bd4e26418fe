"""Data on object storage: a real S3 API on loopback that is busy, drops connections, goes down and comes back."""

import pytest
import s3fs

from protoclip_scale.data.index import open_readers
from protoclip_scale.engine import checkpoint
from protoclip_scale.errors import UserError
from tests.remote_cases import RECIPE, check_equal, check_told, data, settings
from tests.servers import Server
from tests.support import CORPUS, output, pretrain

ROOT = "s3://corpus"


@pytest.fixture(scope="module")
def server():
    with Server("s3_server", "--root", CORPUS, "--bucket", "corpus", "--only", "train-0000[01]-*") as server:
        yield server


@pytest.fixture
def env(server, tmp_path, monkeypatch) -> dict[str, str]:
    """The environment that a user sets, here and in real runs; no file is known from another test."""
    env = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    env |= {"PROTOCLIP_CACHE": str(tmp_path / "cache"), "AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    server.faults()
    s3fs.S3FileSystem.clear_instance_cache()  # it keeps the keys that it was made with
    return env


def test_a_run_over_a_busy_store_that_goes_down_and_comes_back_equals_one_over_files(server, env, tmp_path, local_run):
    """503 and half answers all the time; then nothing but refused connections; then as before."""
    run, values = tmp_path / "run", settings(ROOT, retry_seconds=4)
    server.faults(unavailable_every=7, half_every=5)
    assert pretrain(run, RECIPE, values, env=env | {"PROTOCLIP_STOP_AT": "train.step:6"}) == [75], output(run)
    answers = [request["answer"] for request in server.requests()]
    assert answers.count(503) >= 2 and answers.count("half") >= 2, answers
    server.kill()
    assert pretrain(run, RECIPE, values, env=env) == [1]
    check_told(run, ROOT, "Connect")
    assert checkpoint.list_checkpoints(run)
    server.start()
    server.faults(unavailable_every=7, half_every=5)
    assert pretrain(run, RECIPE, values, env=env) == [0], output(run)
    check_equal(run, local_run)
    assert "Traceback" not in output(run) and "secret" not in output(run)


@pytest.mark.parametrize(
    ("root", "files", "faults", "told"),
    [
        (ROOT, "nothing-here.parquet", {}, "nothing-here.parquet"),
        ("s3://no-such-bucket", "*.parquet", {}, "no-such-bucket"),
        (ROOT, "train-00000-of-00010.parquet", {"down_from": 1, "status": 403}, "403"),
    ],
)
def test_what_waiting_cannot_mend_is_told_at_once(server, env, root, files, faults, told):
    server.faults(**faults)
    with pytest.raises(UserError) as caught:
        open_readers(data(root, files, retry_seconds=3600))[0].read(0)
    message = str(caught.value)
    assert told in message and "\n" not in message
    assert len(server.requests()) < 10


def test_missing_keys_are_told_at_once(server, env, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match=r"s3://corpus.*redentials"):
        open_readers(data(ROOT, "train-0000[01]-*.parquet", retry_seconds=3600))
