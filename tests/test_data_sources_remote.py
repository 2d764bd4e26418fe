"""Sources on servers: what is asked of them, what failures do, what the user reads when they last, and what a dataset of the Hub resolves to."""

import collections
import pickle
import shutil
import threading
import time

import pytest
import s3fs

from protoclip_scale.data.sources import FORMATS, BlockReader, filesystems, retry, streaming
from protoclip_scale.data.sources.fingerprint import describe, difference
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from tests.servers import Server
from tests.support import CORPUS


@pytest.fixture(scope="module")
def http():
    with Server("http_server", "--root", CORPUS) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No cache of earlier tests, and little waiting."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(retry, "LONGEST_DELAY", 0.1)
    monkeypatch.setattr(retry, "retry_after", lambda error: 0.0)
    monkeypatch.setattr(streaming, "REQUEST_DELAY", 0.01)


@pytest.fixture
def server(http):
    http.faults()
    return http


def opened(root: str, files="train-*.parquet", retry_seconds: float = 30.0) -> BlockReader:
    return BlockReader(schema.Source(files=files, format="parquet"), root, retry_seconds)


def refused(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


LOCAL = opened(str(CORPUS))
FIRST = "train-00000-of-00010.parquet"


def asked(server) -> list[tuple]:
    return [(request["method"], request["path"], request["range"]) for request in server.requests()]


def test_http_equals_local_and_a_file_costs_its_size_and_one_range(server):
    reader = opened(server.url)
    requests = asked(server)
    assert reader.fingerprint == LOCAL.fingerprint and reader.block_rows.tolist() == LOCAL.block_rows.tolist()
    assert [method for method, _, _ in requests].count("HEAD") == 10 and len(requests) == 1 + 10 + 10
    server.faults()
    opened(server.url)
    assert {span for _, _, span in asked(server)} == {None}  # scanned once, not again
    for block in (0, 17, len(LOCAL.block_rows) - 1):
        assert reader.read(block).equals(LOCAL.read(block))


def test_only_the_used_bytes_are_asked_for(server):
    reader = opened(server.url, FIRST)
    reader.read(0, images=False)
    LOCAL.read(0)  # `datasets` keeps one set of options for all files
    server.faults()
    assert reader.read(1, images=False).equals(LOCAL.read(1, images=False))
    spans = [tuple(map(int, span.removeprefix("bytes=").split("-"))) for _, _, span in asked(server) if span]
    assert len(spans) == 2  # footer, captions
    assert spans[1][1] - spans[1][0] < 0.1 * LOCAL.block_bytes[1]


def test_ranges_queries_and_lists_name_files_over_http(server):
    by_range = opened(server.url, "train-{00000..00009}-of-00010.parquet")
    assert by_range.fingerprint == LOCAL.fingerprint
    signed = opened(server.url, f"{FIRST}?signature=secret")
    assert signed.fingerprint == opened(str(CORPUS), FIRST).fingerprint
    assert "secret" not in str(signed.files) + str(describe(signed)) and signed.read(2).equals(LOCAL.read(2))
    both = opened(".", (f"{server.url}/{FIRST}", f"{server.url}/train-00003*.parquet"))
    assert len(both.files) == 2
    assert "shard-{00000..00012}.parquet" in refused(lambda: opened(server.url, "nothing-*.parquet"))


def test_failures_now_and_then_cost_no_row(server):
    server.faults(unavailable_every=3, half_every=4)
    reader = opened(server.url)
    for block in range(0, len(LOCAL.block_rows), 7):
        assert reader.read(block).equals(LOCAL.read(block))
    assert {503, "half"} <= {request["answer"] for request in server.requests()}


def test_a_server_that_hangs_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(filesystems, "READ_SECONDS", 0.3)
    monkeypatch.setattr(streaming, "_storage_options", {})
    server.faults(hang_every=3, hang_seconds=5.0)
    started = time.monotonic()
    monkeypatch.setattr(FORMATS["parquet"], "_opened", collections.OrderedDict())  # with those options
    assert opened(server.url, FIRST).read(1).equals(LOCAL.read(1))
    assert "hang" in {request["answer"] for request in server.requests()} and time.monotonic() - started < 5


def test_a_server_that_stays_down_ends_with_url_status_and_time(server):
    reader = opened(server.url)
    server.faults(down_from=1)
    reader.retry_seconds = 0.5
    started = time.monotonic()
    line = refused(lambda: reader.read(3))
    assert f"{server.url}/{FIRST}: reading row group 3 failed for" in line and "data.retry_seconds 0.5" in line and "503" in line
    for files in ("train-*.parquet", FIRST, "train-{00000..00009}-of-00010.parquet"):
        line = refused(lambda files=files: opened(server.url, files, 0.5))
        assert server.url in line and "503" in line and "data.retry_seconds 0.5" in line
    assert time.monotonic() - started < 20  # all of the files, not each of them, have half a second


def test_a_cancelled_reader_waits_for_no_server(server):
    reader = opened(server.url, FIRST, 600.0)
    errors = []

    def read() -> None:
        try:
            reader.read(0)
        except retry.Cancelled as error:
            errors.append(error)

    server.faults(down_from=1)
    thread = threading.Thread(target=read)
    thread.start()
    while not server.requests():
        time.sleep(0.01)
    reader.cancel()
    thread.join(60)  # of the 600
    assert len(errors) == 1 and FIRST in str(errors[0])
    server.faults()
    with pytest.raises(retry.Cancelled):
        reader.read(0)
    assert not server.requests()
    again = pickle.loads(pickle.dumps(reader))  # the copy is not cancelled
    reader.resume()
    assert again.read(0).equals(LOCAL.read(0)) and reader.read(0).equals(LOCAL.read(0))


def test_refusals_and_missing_files_are_not_retried(server):
    reader = opened(server.url, FIRST, 600.0)
    for action in (lambda: opened(server.url, "missing.parquet", 600.0), lambda: opened(f"{server.url}/nowhere", "*.parquet", 600.0)):
        assert server.url in refused(action)
    server.faults(down_from=1, status=403)
    assert "403" in refused(lambda: reader.read(0))


def test_an_s3_bucket_equals_local_and_survives_failures(monkeypatch):
    s3fs.S3FileSystem.clear_instance_cache()  # one made without keys by another test would be taken again
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    with Server("s3_server", "--root", CORPUS, "--bucket", "corpus") as bucket:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.url)
        reader = opened("s3://corpus")
        assert reader.fingerprint == LOCAL.fingerprint and reader.files[0] == f"s3://corpus/{FIRST}"
        assert opened("s3://corpus", ".").fingerprint == opened(str(CORPUS), ".").fingerprint  # a folder
        bucket.faults(unavailable_every=3, half_every=5)
        assert reader.read(40).equals(LOCAL.read(40))
        assert {503, "half"} <= {request["answer"] for request in bucket.requests()}
        bucket.faults(down_from=1)
        line = refused(lambda: opened("s3://corpus", FIRST, 0.3))
        assert f"s3://corpus/{FIRST}" in line and "503" in line
        bucket.faults()
        assert "no files match" in refused(lambda: opened("s3://corpus", "nothing-*.parquet"))


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    assert "pip install gcsfs" in refused(lambda: opened("gs://bucket"))
    assert "parquet://" in refused(lambda: opened("parquet://bucket"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset with two commits on a server that stands for the Hub; the server and its commits."""
    datasets = streaming.library()
    import huggingface_hub.constants as constants

    from tests.servers.hub_server import commit_id

    for number in (1, 2):
        (tmp_path / str(number) / "data").mkdir(parents=True)
        (tmp_path / str(number) / "README.md").write_text("# A dataset\n")
        for part in range(number):
            shutil.copy(CORPUS / f"train-{part:05d}-of-00010.parquet", tmp_path / str(number) / "data")
    with Server("hub_server", "--repo", "org/name", "--commit", tmp_path / "1", "--commit", tmp_path / "2") as server:
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url))
        for module, name, value in (
            (constants, "ENDPOINT", server.url),
            (constants, "HF_HUB_OFFLINE", False),
            (constants, "HF_HUB_DISABLE_XET", True),
            (constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache")),
            (datasets.config, "HF_ENDPOINT", server.url),
            (datasets.config, "HF_HUB_OFFLINE", False),
            (datasets.config, "HUB_DATASETS_URL", datasets.config.HUB_DATASETS_URL.replace(datasets.config.HF_ENDPOINT, server.url)),
        ):
            monkeypatch.setattr(module, name, value)
        yield server, [commit_id(number) for number in range(2)]


def test_a_hub_dataset_is_pinned_to_a_commit_and_described(hub):
    server, commits = hub

    def of(**settings) -> BlockReader:
        return BlockReader(schema.Source(hub="org/name", **settings), ".", 30.0)

    now = of()
    assert now.commit == commits[1] and now.files == [f"hf://datasets/org/name@{commits[1]}/data/train-0000{part}-of-00010.parquet" for part in range(2)]
    assert not [path for _, path, span in asked(server) if "/lfs/" in path and span is None]  # no file was fetched
    assert now.read(9).equals(LOCAL.read(9))
    before = of(revision=commits[0])
    assert describe(before)["commit"] == commits[0]
    line = difference(describe(before), describe(now))
    assert f"commit {commits[0]} -> {commits[1]}" in line and "1 file new: data/train-00001-of-00010.parquet" in line
    assert "no split 'test'" in refused(lambda: of(split="test")) and "train" in refused(lambda: of(split="test"))
    assert "no revision 'v9'" in refused(lambda: of(revision="v9"))
    assert "'fancy' not found" in refused(lambda: of(config="fancy"))
    assert "no such dataset" in refused(lambda: BlockReader(schema.Source(hub="org/other"), ".", 30.0))


def test_a_card_of_the_hub_names_no_files_outside_of_its_commit(hub, tmp_path, monkeypatch):
    _, commits = hub

    def told(file: str) -> str:
        (tmp_path / "2" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {file}\n---\n")
        return refused(lambda: BlockReader(schema.Source(hub="org/name"), ".", 1.0))

    assert "belong to org/name" in told(f"{CORPUS}/{FIRST}")  # the library sees to other places
    here, there = (f"hf://datasets/org/name@{commit}" for commit in reversed(commits))
    for file in (f"{CORPUS}/{FIRST}", f"https://example.org/{FIRST}", f"{there}/data/{FIRST}", f"{here}/../other/{FIRST}"):  # or does not
        monkeypatch.setattr(streaming, "hub_files", lambda name, commit, config, file=file: ("parquet", {"train": [file]}))
        assert f"outside of the dataset ({file})" in told(file)


def test_the_hub_offline_is_one_line(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(lambda: BlockReader(schema.Source(hub="org/name"), ".", 600.0))
