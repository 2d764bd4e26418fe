"""Datasets of the Hub, from a stand-in that speaks its protocol: revisions are pinned, faults survived, errors told in one line; no code of a dataset is run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.hub_client import about
from tests.remote_cases import RECIPE, settings
from tests.runs import rows_of_final_weights
from tests.servers import Server
from tests.servers.hub_server import commit_id
from tests.support import CORPUS, RECIPES, ROOT, final_tensors, overrides, pretrain

REPO = "org/corpus"
CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: "data/train-*"}, {split: validation, path: "data/val-*"}]
- config_name: small
  data_files: [{split: train, path: "data/train-00001-*"}]
---
"""


@pytest.fixture(scope="module")
def commits(tmp_path_factory) -> list[Path]:
    """Three commits: two shards; one of them with other rows and a third shard; that with a loading script."""
    folders = [tmp_path_factory.mktemp(f"commit-{number}") for number in range(3)]
    for number, folder in enumerate(folders):
        (folder / "data").mkdir()
        for shard in range(2 + (number > 0)):
            shutil.copy(CORPUS / f"train-{shard:05d}-of-00010.parquet", folder / "data")
        shutil.copy(CORPUS / "val-00000-of-00001.parquet", folder / "data")
        (folder / "README.md").write_text(CARD)
    changed = folders[1] / "data/train-00000-of-00010.parquet"
    pq.write_table(pq.read_table(changed).slice(100), changed, row_group_size=64)
    (folders[2] / "corpus.py").write_text("raise SystemExit('code of the dataset was run')")
    return folders


def serve(commits: list[Path], *numbers: int) -> Server:
    """The commits in this order; the last one is main."""
    return Server("hub_server", "--repo", REPO, *(part for number in numbers for part in ("--commit", commits[number])))


@pytest.fixture(scope="module")
def server(commits):
    with serve(commits, 2, 0, 1) as server:
        yield server


def environment(server: Server, cache: Path, **more: str) -> dict[str, str]:
    hub = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache / "hf"), "PROTOCLIP_CACHE": str(cache / "scans")}
    return {**os.environ, **hub, **more}


def opened(server: Server, cache: Path, *sources: dict) -> list[dict]:
    """What ``hub_client`` says of sources, in one fresh process."""
    command = [sys.executable, "-m", "tests.hub_client"]
    done = subprocess.run(command, cwd=ROOT, env=environment(server, cache), input=json.dumps(sources), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stdout + done.stderr  # libraries do not talk past us
    return json.loads(done.stdout)


def local(folder: Path, pattern: str) -> dict:
    return about({"files": pattern}, str(folder))


@pytest.mark.parametrize("faults", [{}, pytest.param({"unavailable_every": 19, "half_every": 23}, marks=pytest.mark.slow)], ids=["calm", "busy"])
def test_revisions_configurations_and_splits(server, commits, tmp_path, faults):
    """Names of commits are resolved once; each is the rows of its own files, through 503 and half answers too."""
    server.faults(**faults)
    main, first, short, small, val = opened(
        server,
        tmp_path,
        {"hub": REPO},
        {"hub": REPO, "revision": commit_id(1)},
        {"hub": REPO, "revision": "main", "config": "default"},
        {"hub": REPO, "config": "small"},
        {"hub": REPO, "split": "validation"},
    )
    assert not [reader["error"] for reader in (main, first, short, small, val) if "error" in reader]
    answers = [request["answer"] for request in server.requests()]
    assert not faults or 503 in answers and "half" in answers, answers
    assert [reader["commit"] for reader in (main, first, short, small, val)] == [commit_id(number) for number in (2, 1, 2, 2, 2)]
    for reader, commit, pattern in ((main, 1, "train-*"), (first, 0, "train-*"), (small, 1, "train-00001-*"), (val, 1, "val-*")):
        expected = local(commits[commit] / "data", f"{pattern}.parquet")
        assert reader["hash"] == expected["hash"] and reader["block_rows"] == expected["block_rows"]
        assert all(file.startswith(f"hf://datasets/{REPO}@{commit_id(commit + 1)}/data/") for file in reader["files"])
    assert main == short and main["fingerprint"] != first["fingerprint"]
    assert not [request for request in server.requests() if "/resolve/main/" in request["path"] and ".parquet" in request["path"]]


def test_what_is_not_there_is_told_in_one_line(server, tmp_path):
    server.faults()
    wrong = opened(
        server,
        tmp_path,
        {"hub": REPO, "revision": "v9"},
        {"hub": "org/nothing"},
        {"hub": REPO, "split": "test"},
        {"hub": REPO, "config": "large"},
        {"hub": REPO, "columns": {"caption": "text"}},
        {"hub": REPO, "revision": commit_id(0)},
    )
    words = (("v9", REPO), ("org/nothing",), ("test", "train", "validation"), ("large", "default"), ("text", "caption"), ("script", "corpus.py"))
    for found, expected in zip(wrong, words, strict=True):
        assert "\n" not in found["error"]
        for word in expected:
            assert word in found["error"], found
    assert "HF_HUB_OFFLINE" in about({"hub": REPO})["error"]  # which is set here, by conftest.py


def train(run_dir: Path, server: Server, cache: Path, *more: str, **env: str) -> int:
    """launch/pretrain.py over the Hub in a fresh process; its exit code. What it writes goes where ``tests.support.output`` looks."""
    values = overrides((*settings("."), f"data.sources=[{{hub: {REPO}}}]", *more))
    command = [sys.executable, "launch/pretrain.py", "--recipe", str(RECIPES / RECIPE), "--run-dir", str(run_dir), *values]
    with open(run_dir.parent / f"{run_dir.name}-rank0.log", "a") as log:
        return subprocess.run(command, cwd=ROOT, env=environment(server, cache, **env), stdout=log, stderr=log, timeout=280).returncode


@pytest.mark.slow
def test_a_run_keeps_to_the_commit_it_began_with(commits, tmp_path):
    """When main has moved meanwhile, the run goes on with the rows of the commit it began with, and equals a run over the files."""
    run = tmp_path / "run"
    with serve(commits, 0) as old:
        assert train(run, old, tmp_path / "cache", PROTOCLIP_STOP_AT="train.step:6") == 75
        with serve(commits, 0, 1) as moved:
            shutil.rmtree(tmp_path / "cache")
            assert train(run, moved, tmp_path / "cache") == 0
    over_files = settings(commits[0]), "data.sources=[{name: org/corpus, files: 'data/train-*.parquet'}]"
    assert pretrain(tmp_path / "files", RECIPE, (*over_files[0], over_files[1])) == [0]
    assert rows_of_final_weights(run) == rows_of_final_weights(tmp_path / "files")
    found, expected = final_tensors(run), final_tensors(tmp_path / "files")
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())
