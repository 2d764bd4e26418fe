"""--push to a stand-in of the Hub: all files arrive, an interrupted push goes on, nothing is sent without a token or in a dry run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from protoclip_scale.export.manifest import write_manifest
from protoclip_scale.tensor_files import Entry, write_shard
from tests.servers import Server
from tests.servers.hub_uploads import PART
from tests.support import ROOT

TOKEN = "hf_" + "t0ken" * 8
REPO = "my-org/my-model"


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """Files as an export has them: two of weights, one in parts, a card, a folder; and what must not go: a cache."""
    folder = tmp_path_factory.mktemp("export")
    for name, rows in (("image/model.safetensors", PART // 2), ("projections.safetensors", 2000)):
        (folder / name).parent.mkdir(exist_ok=True)
        write_shard(folder / name, [Entry("weight", torch.float32, (rows,))], [torch.arange(rows).float()])
    (folder / "README.md").write_text("---\nlicense: unknown\n---\n# a model\n")
    (folder / "config.json").write_text("{}\n")
    write_manifest(folder, {"layout": "transformers"}, {})
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret.txt").write_text("stays here")
    return folder


@pytest.fixture
def hub(tmp_path):
    with Server("hub_uploads", "--root", tmp_path / "hub", "--token", TOKEN) as server:
        server.root = tmp_path / "hub"
        yield server


def environment(server: Server, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": server.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)} | ({"HF_TOKEN": token} if token else {})


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "launch/export.py", "--out", str(folder), "--push", REPO, *more]


def push(server: Server, folder: Path, home: Path, *more: str, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, *more), cwd=ROOT, env=environment(server, home, token), capture_output=True, text=True, timeout=200)


def arrived(server: Server) -> dict[str, bytes]:
    root = server.root / "repos" / REPO
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def visible(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts}


def test_a_killed_push_goes_on_and_ends_complete(hub, export, tmp_path):
    """SIGKILL while the third of the requests that carry contents is unanswered: the large file's parts are there, the other one's are not."""
    hub.faults(hang_every=4, hang_seconds=600, counted="^PUT /objects/")
    process = subprocess.Popen(command(export), cwd=ROOT, env=environment(hub, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while "hang" not in [request["answer"] for request in hub.requests()]:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sent = [request["path"] for request in hub.requests() if request["method"] == "PUT"]
    assert len(sent) == 4 and sum(path.count("/") == 3 for path in sent) == 3  # three parts of the large file, then the small one
    assert arrived(hub) == {}  # nothing is visible before the commit
    hub.faults()
    done = push(hub, export, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    again = [request["path"] for request in hub.requests() if request["method"] == "PUT"]
    assert again == sent[-1:]  # the large file is not sent a second time
    assert arrived(hub) == visible(export)
    created = json.loads((hub.root / "repos.json").read_text())[REPO]
    assert created["visibility"] == "private"
    assert TOKEN not in done.stdout + done.stderr and "done: http://" in done.stdout


def test_a_dry_run_and_missing_tokens_send_nothing(hub, export, tmp_path, capsys, monkeypatch):
    """In this process: the library's import takes seconds."""
    from protoclip_scale.errors import UserError
    from protoclip_scale.export.hub import push

    *lines, last = push(export, REPO, private=True, dry_run=True)
    manifest = json.loads((export / "manifest.json").read_text())["files"]
    shown = {line.split()[2]: (int(line.split()[0].replace(",", "")), line.split()[1]) for line in lines}
    assert {name: (about["bytes"], about["sha256"]) for name, about in manifest.items()}.items() <= shown.items()
    assert set(shown) == set(visible(export)) and f"{len(shown)} files, {sum(size for size, _ in shown.values()):,} bytes would go to {REPO}, private" in last
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="HF_TOKEN or run `hf auth login`") as error:
        list(push(export, REPO, private=True, dry_run=False))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is no ORG/NAME"):
        list(push(export, "no-organisation", private=True, dry_run=True))
    assert hub.requests() == []


def test_an_export_that_was_changed_is_not_sent(export, tmp_path):
    import shutil

    from protoclip_scale.errors import UserError
    from protoclip_scale.export.hub import push

    folder = tmp_path / "changed"
    shutil.copytree(export, folder)
    (folder / "config.json").write_text("[]\n")
    with pytest.raises(UserError, match="config.json was changed or damaged"):
        list(push(folder, REPO, private=True, dry_run=True))


@pytest.mark.slow
def test_a_hub_that_goes_down_or_refuses_is_told_in_one_line(hub, export, tmp_path):
    hub.faults(down_from=2, counted="^PUT /objects/")
    done = push(hub, export, tmp_path, "--public")
    *retries, last = done.stderr.splitlines()
    assert done.returncode == 1 and "503" in last and last.endswith("give the same command again to go on") and "Traceback" not in done.stderr, done.stderr
    assert retries and all("503" in line or "Retry" in line for line in retries) and "secret" not in done.stderr
    hub.faults()
    assert push(hub, export, tmp_path).returncode == 0
    assert arrived(hub) == visible(export)
    assert json.loads((hub.root / "repos.json").read_text())[REPO]["visibility"] == "public"
    hub.faults()
    done = push(hub, export, tmp_path)  # all of it is there
    assert done.returncode == 0 and not [request for request in hub.requests() if request["method"] == "PUT" or "/commit/" in request["path"]]
    done = push(hub, export, tmp_path, token="hf_" + "wr0ng" * 8)
    assert done.returncode == 1 and "answered 401" in done.stderr and "write access" in done.stderr and "wr0ng" not in done.stderr + done.stdout
