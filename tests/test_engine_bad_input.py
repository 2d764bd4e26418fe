"""Bad input: one clear line, exit code 1, nothing lost. Each case runs the real command."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from protoclip_scale.engine import command
from tests.support import CORPUS, RECIPES, TINY, TINY_PROTOTYPES, overrides


def run(capsys, recipe: str | Path, run_dir: Path, values: tuple[str, ...] = TINY, *more: str) -> str:
    """The command in this process: its exit code must be 1, and what it says one line."""
    path = recipe if isinstance(recipe, Path) else RECIPES / recipe
    capsys.readouterr()
    code = command.main(["--recipe", str(path), "--run-dir", str(run_dir), *overrides(values), *more])
    said = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in said if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1, said
    assert "Traceback" not in "\n".join(said)
    return lines[0]


def test_a_recipe_that_is_not_there(capsys, tmp_path):
    assert "demo_clp.yaml" in (line := run(capsys, "demo_clp.yaml", tmp_path / "run")) and "demo_clip.yaml" in line
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_names_its_neighbour(capsys, tmp_path):
    line = run(capsys, "demo_clip.yaml", tmp_path / "run", (*TINY, "optim.learning_rate=1"))
    assert "optim.learning_rate" in line
    line = run(capsys, "demo_clip.yaml", tmp_path / "run", (*TINY, "optim.weight_decy=1"))
    assert "weight_decay" in line


def test_more_clusters_than_rows(capsys, tmp_path):
    line = run(capsys, "demo_protoclip.yaml", tmp_path / "run", (*TINY_PROTOTYPES, "prototypes.clusters=257"))
    assert "prototypes.clusters" in line and "257" in line and "256" in line


def test_an_episode_smaller_than_a_batch(capsys, tmp_path):
    line = run(capsys, "demo_clip.yaml", tmp_path / "run", (*TINY, "data.plan.episode_size=32"))
    assert "data.plan.episode_size" in line and "32" in line and "64" in line


def test_a_world_that_does_not_divide_the_lanes(capsys, tmp_path, monkeypatch):
    from protoclip_scale import collectives

    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    line = run(capsys, "demo_clip.yaml", tmp_path / "run")
    assert "world size 3" in line and "lanes 4" in line and "1, 2, 4" in line


def test_another_number_of_ranks_than_promised(capsys, tmp_path):
    assert "--expect-ranks 2" in run(capsys, "demo_clip.yaml", tmp_path / "run", TINY, "--expect-ranks", "2")


def test_no_files(capsys, tmp_path):
    line = run(capsys, "demo_clip.yaml", tmp_path / "run", (*TINY, f"data.root={tmp_path}"))
    assert "train-*.parquet" in line and "data.root" in line


def test_a_parquet_file_without_the_named_column(capsys, tmp_path):
    line = run(capsys, "demo_clip.yaml", tmp_path / "run", (*TINY, "data.sources=[{files: train-*.parquet, columns: {caption: title}}]"))
    assert "'title'" in line and "caption" in line and "concept" in line


def test_a_file_that_is_no_parquet(capsys, tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 not really")
    line = run(capsys, "demo_clip.yaml", tmp_path / "run", (*TINY, f"data.root={tmp_path}"))
    assert "train-0.parquet" in line


def test_teacher_features_of_another_source(capsys, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for shard in sorted(CORPUS.glob("train-*.parquet"))[:6]:
        shutil.copy(shard, data)
    line = run(capsys, "demo.yaml", tmp_path / "run", (*TINY_PROTOTYPES, f"data.root={data}"))
    assert "teacher features" in line and "other data" in line and "extract_teacher" in line


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of one episode."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert command.main(["--recipe", str(RECIPES / "demo_clip.yaml"), "--run-dir", str(folder), *overrides(ONE_EPISODE)]) == 0
    return folder


ONE_EPISODE = (*TINY, "schedule.total=1 episodes", "run.checkpoint_steps=2")


def test_the_run_directory_is_as_promised(finished):
    status = json.loads((finished / "status.json").read_text())
    assert (status["state"], status["code"]) == ("done", 0)
    resolved = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert resolved["data"]["max_bad_fraction"] == 0.02 and resolved["optim"]["eps"]  # defaults are written out
    assert json.loads((finished / "environment.json").read_text())["versions"]["torch"]
    assert (finished / "checkpoints/latest").read_text().strip() == "step-00000004"
    manifest = json.loads((finished / "checkpoints/step-00000004/manifest.json").read_text())
    for name, facts in manifest["files"].items():
        assert (finished / "checkpoints/step-00000004" / name).stat().st_size == facts["bytes"] and len(facts["sha256"]) == 64
    kinds = {json.loads(line)["kind"] for line in (finished / "metrics.jsonl").read_text().splitlines()}
    assert kinds == {"train", "checkpoint", "phases"}
    table = pa.ipc.open_stream(next((finished / "trace").iterdir())).read_all()
    assert table.column_names == ["step", "source", "block", "row", "row_id"] and table.num_rows == 4 * 64
    assert "episode 1/1 train" in (finished / "log.txt").read_text()
    assert not (finished / "scratch").exists()


def test_a_run_directory_in_use(capsys, finished):
    before = sorted((str(p), p.stat().st_mtime) for p in finished.rglob("*"))
    line = run(capsys, "demo_clip.yaml", finished, ONE_EPISODE, "--resume", "never")
    assert "--resume" in line and "--run-dir" in line
    after = sorted((str(p), p.stat().st_mtime) for p in finished.rglob("*"))
    assert after == before


def test_another_recipe_on_resume(capsys, finished):
    line = run(capsys, "demo_clip.yaml", finished, (*ONE_EPISODE, "optim.lr=0.5"))
    assert "optim.lr" in line and "0.5" in line


def test_changed_data_on_resume(capsys, finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    data = tmp_path / "data"
    data.mkdir()
    for shard in sorted(CORPUS.glob("train-*.parquet")):
        shutil.copy(shard, data)
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text())
    resolved["data"]["root"] = str(data)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved))
    values = (*ONE_EPISODE, f"data.root={data}")
    shard = data / "train-00000-of-00010.parquet"
    table = pq.read_table(shard)
    pq.write_table(table.slice(1), shard, row_group_size=64)
    line = run(capsys, "demo_clip.yaml", folder, values)
    assert "the data changed since this run began: demo_corpus: 1 file with another number of rows: train-00000-of-00010.parquet (512 -> 511)" in line
    turned = table.set_column(table.column_names.index("caption"), "caption", table.column("caption").take(list(range(511, -1, -1))))
    pq.write_table(turned, shard, row_group_size=64)
    assert "1 file with other content: train-00000-of-00010.parquet" in run(capsys, "demo_clip.yaml", folder, values)
    shard.unlink()
    assert "1 file missing: train-00000-of-00010.parquet" in run(capsys, "demo_clip.yaml", folder, values)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest"])
def test_a_corrupt_checkpoint(capsys, finished, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    for step in ("step-00000002", "step-00000004"):
        shard = next((folder / "checkpoints" / step).glob("*.safetensors"))
        content = bytearray(shard.read_bytes())
        if damage == "truncated":
            shard.write_bytes(content[:-100])
        elif damage == "flipped":
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        elif damage == "missing":
            shard.unlink()
        else:
            (shard.parent / "manifest.json").write_text("{")
    line = run(capsys, "demo_clip.yaml", folder, ONE_EPISODE, "--resume", "4")
    assert "step-00000004" in line and ("shard-00001" in line or "manifest" in line)
    line = run(capsys, "demo_clip.yaml", folder, ONE_EPISODE)  # auto: none is sound
    assert "step-0000000" in line
    assert (folder / "checkpoints/step-00000004").is_dir()


def test_one_sound_checkpoint_is_enough(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    next((folder / "checkpoints/step-00000004").glob("*.safetensors")).write_bytes(b"")
    assert command.main(["--recipe", str(RECIPES / "demo_clip.yaml"), "--run-dir", str(folder), *overrides(ONE_EPISODE)]) == 0
    said = (folder / "log.txt").read_text()
    assert "warning: checkpoint" in said and "shard-00001" in said
    assert (folder / "checkpoints/latest").read_text().strip() == "step-00000004"


def test_too_many_undecodable_rows_stop_the_run(capsys, tmp_path):
    table = pq.read_table(CORPUS / "train-00000-of-00010.parquet").slice(0, 320)
    images = [image if row % 8 else {"bytes": image["bytes"][:40], "path": image["path"]} for row, image in enumerate(table["image"].to_pylist())]
    table = table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, table.schema.field("image").type))
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=32)
    line = run(capsys, "demo_clip.yaml", tmp_path / "run", (*TINY, f"data.root={tmp_path}"))
    assert "data.max_bad_fraction" in line and "could not be decoded" in line
    listed = [json.loads(entry) for entry in (tmp_path / "run/quarantine/rank-00000.jsonl").read_text().splitlines()]
    assert len(listed) == len({entry["row_id"] for entry in listed}) > 10 and all(entry["row"] % 8 == 0 for entry in listed)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 1) and "could not be decoded" in status["message"]
