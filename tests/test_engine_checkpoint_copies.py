"""Copies of checkpoints in another place: complete or not there, in order, this run's alone; and what a start does with them."""

import json
import shutil
import time
from pathlib import Path

import pytest
import s3fs
import torch

from protoclip_scale import standing
from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.checkpoint.copies import Copies
from protoclip_scale.engine.checkpoint.copying import Copier
from protoclip_scale.engine.restore import ask, bring
from protoclip_scale.engine.run_folder import open_run
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import Recipe, load_recipe
from tests.servers import Server
from tests.support import RECIPES, TINY
from tests.test_engine_checkpoint_damage import flip
from tests.test_engine_checkpoint_files import TENSORS, equal, saved

RUN_ID = "0123456789ab"


def copier(run: Path, place: str | Path, attempt: int = 1, run_id: str = RUN_ID, keep: int = 0, keep_every: int = 0) -> Copier:
    return Copier(run, Copies(str(place), retry_seconds=0), attempt, run_id, keep, keep_every)


def copy_all(run: Path, place: str | Path, **options) -> list[str]:
    """What was said while everything in a run directory was copied."""
    copying = copier(run, place, **options)
    copying.finish(240)
    return list(copying.news())


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {name: tensor + step if tensor.dtype == torch.float32 else tensor for name, tensor in TENSORS.items()}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with checkpoints of steps 1 to 3, the second with prototypes beside it."""
    folder = tmp_path / "run"
    for step in (1, 2, 3):
        saved(folder, tensors(step), step, weights=True)
    shutil.copytree(checkpoint.folder_of(folder, 2), checkpoint.prototypes_folder(checkpoint.folder_of(folder, 2)))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def test_what_an_earlier_attempt_left_is_copied_in_order_and_only_once(run, tmp_path):
    place = tmp_path / "copy"
    names = ["step-00000001", "step-00000002", "step-00000002.prototypes", "step-00000003"]
    assert copy_all(run, place) == [f"copied checkpoints/{name} to {place}" for name in names]
    assert Copies(str(place), 0).names() == names
    for path in (run / "checkpoints").rglob("*.*"):
        assert path.is_dir() or path.read_bytes() == (place / path.relative_to(run)).read_bytes()
    assert (place / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert copy_all(run, place) == []
    shutil.rmtree(checkpoint.folder_of(run, 3))  # saved again, with other bytes
    saved(run, tensors(4), 3)
    assert copy_all(run, place) == [f"copied checkpoints/step-00000003 to {place}"]
    folder, manifest, _ = checkpoint.find(place, "latest")
    assert equal(checkpoint.read_tensors(folder, manifest), tensors(4))


def test_copying_in_the_background_is_no_progress_of_the_rank(run, tmp_path):
    """It would hide that the main thread hangs."""
    before = standing.HERE.marks
    Copies(str(tmp_path / "copy"), 0).put(checkpoint.folder_of(run, 1))
    assert list((tmp_path / "copy/checkpoints/step-00000001").iterdir()) and standing.HERE.marks == before


def test_retention_is_the_run_s(run, tmp_path):
    place = tmp_path / "copy"
    copy_all(run, place, keep=1, keep_every=2)
    assert Copies(str(place), 0).names() == ["step-00000002", "step-00000002.prototypes", "step-00000003"]
    assert not (place / "checkpoints/step-00000001").exists()


def test_what_retention_has_deleted_meanwhile_or_is_damaged_is_not_waited_for(run, tmp_path):
    shutil.rmtree(checkpoint.folder_of(run, 1))
    (checkpoint.folder_of(run, 2) / "shard-00001-of-00001-part-0001.safetensors").unlink()
    said = copy_all(run, tmp_path / "copy")
    assert said[0].startswith("warning: checkpoints/step-00000002 is not copied: shard-00001-of-00001-part-0001.safetensors is missing")
    assert [line.split()[1] for line in said[1:]] == ["checkpoints/step-00000002.prototypes", "checkpoints/step-00000003"]


def test_an_older_attempt_copies_nothing_more(run, tmp_path):
    place = Copies(str(tmp_path / "copy"), 0)
    place.announce(2, RUN_ID)
    assert copy_all(run, tmp_path / "copy", attempt=1) == [f"warning: run.copy_to {tmp_path / 'copy'}: attempt 2 has taken this run over; nothing more is copied from here"]
    assert place.names() == []
    assert len(copy_all(run, tmp_path / "copy", attempt=3)) == 4


def test_another_run_s_copies_are_left_alone(run, tmp_path):
    Copies(str(tmp_path / "copy"), 0).announce(1, "another")
    [said] = copy_all(run, tmp_path / "copy")
    assert "holds copies of another run (another)" in said
    assert not (tmp_path / "copy/checkpoints").exists()


def test_a_place_that_cannot_be_written_is_a_warning_and_does_not_hold_the_end_up(run, tmp_path):
    (tmp_path / "copy").write_text("a file, not a folder")
    copying = copier(run, tmp_path / "copy")
    first = _next_news(copying, "warning")
    copying.finish(0.1)
    (last,) = copying.news()
    assert first.startswith(f"warning: there is no access to run.copy_to {tmp_path / 'copy'} yet: ") and "trying again" in first
    assert last.startswith("warning: 4 checkpoints are not copied to ")


def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(RECIPES / "demo_clip.yaml", (*TINY, f"run.copy_to={tmp_path / 'copy'}", "data.retry_seconds=0.2"))


@pytest.fixture
def begun(tmp_path, run) -> Path:
    """The directory of a run that was begun, with the three checkpoints, all copied."""
    folder = tmp_path / "begun"
    start = open_run(folder, recipe(tmp_path), "auto", extend=False)
    shutil.copytree(run / "checkpoints", folder / "checkpoints")
    copy_all(folder, tmp_path / "copy", run_id=start.run_id)
    return folder


def test_an_empty_directory_goes_on_from_the_newest_sound_copy(begun, tmp_path):
    flip(tmp_path / "copy/checkpoints/step-00000003")
    start = open_run(tmp_path / "elsewhere", recipe(tmp_path), "auto", extend=False)
    assert start.checkpoint == tmp_path / "elsewhere/checkpoints/step-00000002" and start.attempt == 2
    assert start.run_id == json.loads((begun / "attempts/0001").read_text())["run_id"]
    assert equal(checkpoint.read_tensors(start.checkpoint, start.manifest), tensors(2))
    assert checkpoint.prototypes_manifest(start.checkpoint)
    assert start.notes == (f"went on from the copy of checkpoints/step-00000002 in {tmp_path / 'copy'}",)
    assert len(start.warnings) == 1 and "step-00000003: shard-00001-of-00001-part-0001.safetensors was changed or damaged" in start.warnings[0]
    assert str(tmp_path / "copy/checkpoints") in start.warnings[0] and ".writing" not in start.warnings[0]
    assert sorted(path.name for path in (tmp_path / "elsewhere/checkpoints").iterdir()) == ["step-00000002", "step-00000002.prototypes"]


def test_a_directory_that_lacks_the_newest_checkpoint_takes_it_from_the_copies(begun, tmp_path):
    flip(begun / "checkpoints/step-00000003")
    start = open_run(begun, recipe(tmp_path), "auto", extend=False)
    assert start.checkpoint.name == "step-00000003" and start.attempt == 2 and "step-00000003" in start.warnings[0]
    assert equal(checkpoint.read_tensors(start.checkpoint, start.manifest), tensors(3))


def test_going_back_to_an_older_step_leaves_the_later_copies_behind(begun, tmp_path):
    start = open_run(begun, recipe(tmp_path), "2", extend=False)
    assert start.checkpoint.name == "step-00000002"
    assert Copies(str(tmp_path / "copy"), 0).steps() == [1, 2]
    assert (tmp_path / "copy/checkpoints/step-00000003/discarded-0002-manifest.json").is_file()
    shutil.rmtree(begun)
    assert open_run(begun, recipe(tmp_path), "auto", extend=False).checkpoint.name == "step-00000002"


def test_a_step_that_only_the_copies_have(begun, tmp_path):
    shutil.rmtree(begun / "checkpoints/step-00000001")
    assert equal(checkpoint.read_tensors(*_found(open_run(begun, recipe(tmp_path), "1", extend=False))), tensors(1))
    with pytest.raises(UserError, match="checkpoint 7: there is none"):
        open_run(begun, recipe(tmp_path), "7", extend=False)


def _found(start) -> tuple:
    return start.checkpoint, start.manifest


def test_what_a_start_refuses(begun, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(UserError, match="--resume is never"):
        open_run(elsewhere, recipe(tmp_path), "never", extend=False)
    other = recipe(tmp_path)
    with pytest.raises(UserError, match="copy was trained with another recipe: optim.lr"):
        open_run(elsewhere, other.model_copy(update={"optim": other.optim.model_copy(update={"lr": 0.5})}), "auto", extend=False)
    assert not elsewhere.exists()
    shutil.rmtree(tmp_path / "copy/attempts")
    Copies(str(tmp_path / "copy"), 0).announce(1, "another")
    with pytest.raises(UserError, match="holds copies of another run .another.; name a place of this run's own"):
        open_run(begun, recipe(tmp_path), "auto", extend=False)


def test_an_empty_directory_does_not_start_anew_while_the_copies_are_all_damaged(begun, tmp_path):
    for step in (1, 2, 3):
        flip(tmp_path / f"copy/checkpoints/step-{step:08d}")
    with pytest.raises(UserError, match="step-00000003: shard"):
        open_run(tmp_path / "elsewhere", recipe(tmp_path), "auto", extend=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server("s3_server", "--root", tmp_path_factory.mktemp("empty"), "--bucket", "copies") as server:
        yield server


@pytest.fixture
def store(server, tmp_path, monkeypatch) -> str:
    env = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (env | {"AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}).items():
        monkeypatch.setenv(name, value)
    server.faults()
    s3fs.S3FileSystem.clear_instance_cache()
    return f"s3://copies/{tmp_path.name}"


def test_a_store_that_goes_down_holds_no_half_checkpoint_and_gets_the_rest_when_it_is_back(server, store, tmp_path):
    """It answers 503 from the middle of a checkpoint's files on; an older checkpoint of that step had been copied."""
    run, place = tmp_path / "run", Copies(store, 0)
    place.announce(1, RUN_ID)
    for shift in (1, 2):
        folder = saved(run, tensors(shift), 1, file_bytes=100_000)
        if shift == 1:
            place.put(folder)
            assert place.names() == []
            place.complete(folder)
            assert ask(place).steps == (1,)
    server.faults(down_from=3, counted="^PUT .*shard")
    copying = copier(run, store)
    assert "checkpoints/step-00000001 cannot be copied" in _next_news(copying, "503")
    begun = _written(server)
    assert begun[0] == ("DELETE", "manifest.json") and len(begun) == 3 and all("shard" in name for _, name in begun[1:])
    server.faults(unavailable_every=6)
    copying.finish(240)
    put = [name for method, name in _written(server) if method == "PUT"]
    assert put[-1] == "manifest.json" and put.count("manifest.json") == 1 and len({name for name in put if "shard" in name}) == 5
    assert any(line.startswith("copied checkpoints/step-00000001 to s3://copies/") for line in copying.news())
    server.faults()
    assert bring(place, [1], tmp_path / "elsewhere")[0] == 1
    folder, manifest, _ = checkpoint.find(tmp_path / "elsewhere", "latest")
    assert equal(checkpoint.read_tensors(folder, manifest), tensors(2))
    place.set_aside(after=0, attempt=2)
    assert place.steps() == []


def _next_news(copying: Copier, part: str) -> str:
    """The next line said that holds ``part``."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for line in copying.news():
            if part in line:
                return line
        time.sleep(0.02)
    raise AssertionError(f"nothing was said of {part}")


def _written(server: Server) -> list[tuple[str, str]]:
    """(method, file) of what has changed a checkpoint's copy, in order."""
    done = [request for request in server.requests() if request["answer"] in (200, 204) and "/checkpoints/" in request["path"]]
    return [(request["method"], request["path"].partition("?")[0].rpartition("/")[2]) for request in done if request["method"] in ("PUT", "DELETE")]


def test_an_empty_directory_does_not_start_anew_while_the_copies_do_not_answer(server, store, tmp_path):
    server.faults(down_from=1)
    values = (*TINY, f"run.copy_to={store}", "data.retry_seconds=0.2")
    with pytest.raises(UserError, match="run.copy_to s3://copies/.*: asking for copies failed for .*503"):
        open_run(tmp_path / "run", load_recipe(RECIPES / "demo_clip.yaml", values), "auto", extend=False)
    assert not (tmp_path / "run").exists()
