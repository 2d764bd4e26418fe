"""The lines that users type, through accelerate, on real rows; what they leave, and what reads it afterwards."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from protoclip_scale.engine import checkpoint
from tests.support import CORPUS, ROOT, TINY_PROTOTYPES, launch, metrics, overrides

SMALL_YFCC = (
    "model.image={name: test_vit, size: 160}",
    "model.embed_dim=32",
    "model.text={name: clip, width: 32, heads: 2, layers: 1, context_length: 16}",
    "model.prototype_heads={dim: 16, hidden_dim: 32}",
    "data.plan={episode_size: 128, lanes: 4, global_batch: 16}",
    "data.workers=0",
    "prototypes.clusters=12",
    "prototypes.iterations=2",
    "prototypes.restarts=1",
    "prototypes.pictures=0",
    "optim.precision=fp32",
    "schedule.total=20 steps",
    "schedule.warmup_steps=5",
    "run.log_steps=1",
)


@pytest.fixture(scope="module")
def yfcc_shards(tmp_path_factory):
    """Shards in the layout the YFCC15M recipes read, with the teacher's features in their place, made by the command their notes name."""
    folder = tmp_path_factory.mktemp("yfcc15m")
    table = pq.read_table(CORPUS / "train-00000-of-00010.parquet").select(["image", "caption"])
    for number in range(4):
        pq.write_table(table.slice(number * 100, 100), folder / f"{number:05d}.parquet", row_group_size=25)
    command = [sys.executable, "tools/extract_teacher.py", "--recipe", "recipes/yfcc15m.yaml", "--set", f"data.root={folder}"]
    done = subprocess.run(
        [*command, "--model", "minilm", "--caption", "first", "--dim", "16", "--out", folder / "teacher"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


FIRST_LINE = "accelerate launch --config_file launch/accelerate/{config}.yaml launch/pretrain.py --recipe recipes/yfcc15m.yaml"
TWO = {"cpu": "DDP", "cpu_zero2": "ZeRO-2", "cpu_zero3": "ZeRO-3"}


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("config", "ranks", "strategy"),
    [("single", 1, "single process"), *((config, 2, title) for config, title in TWO.items())],
)
def test_the_first_line_users_type(yfcc_shards, tmp_path, config, ranks, strategy):
    """Word for word; what is added are smaller shards, towers and batches."""
    run_dir, programs = tmp_path / "run", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    values = (f"data.root={yfcc_shards}", *SMALL_YFCC, "run.export=open_clip")
    command = [*FIRST_LINE.format(config=config).split(), *overrides(values), "--run-dir", str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": programs}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = metrics(run_dir, "train")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert {"loss/clip", "loss/prototype", "loss/teacher"} <= lines[-1].keys() and "loss/prototype" not in lines[0]
    assert f"{ranks} rank{'s' * (ranks > 1)} on 1 host" in done.stdout and "what came out" in done.stdout
    assert re.search(rf"strategy +{strategy} ", (run_dir / "log.txt").read_text())
    assert json.loads((run_dir / "environment.json").read_text())["ranks"] == ranks
    folder, manifest, warnings = checkpoint.find(run_dir, "latest")
    assert (folder.name, warnings) == ("step-00000020", []) and checkpoint.cursor_of(manifest).phase == "evaluate"
    assert len(list(folder.glob(f"shard-*-of-{ranks:05d}-*"))) == ranks
    weights = load_file(run_dir / "export/open_clip/open_clip_model.safetensors")
    assert len(weights) > 20 and all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["demo_clip.yaml", "demo_protoclip.yaml", "demo.yaml"])
def test_the_demo_recipes_train_in_two_processes(tmp_path, recipe):
    values = tuple(value for value in TINY_PROTOTYPES if recipe != "demo_clip.yaml" or not value.startswith("prototypes"))
    done = launch("--recipe", f"recipes/{recipe}", *overrides(values), "--run-dir", tmp_path / "run", "--expect-ranks", "2", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on 1 host" in done.stdout
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
    assert metrics(tmp_path / "run", "train")[-1]["step"] == 12


@pytest.mark.slow
def test_two_processes_that_became_one_are_refused(tmp_path):
    """``accelerate launch --cpu --num_processes 2`` silently starts one; --expect-ranks tells."""
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "launch/pretrain.py"]
        + ["--recipe", "recipes/demo_clip.yaml", "--run-dir", str(tmp_path / "run"), "--expect-ranks", "2"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "--expect-ranks 2, but 1 ranks run" in done.stderr


def test_help_comes_from_the_schema():
    done = subprocess.run([sys.executable, "launch/pretrain.py", "--help", "data.plan"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "episode_size" in done.stdout and "lanes" in done.stdout
