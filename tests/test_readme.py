"""Every command in README.md is run as it stands there, made small by ``--set``; or it is in the list below with the reason why not."""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from PIL import Image

from protoclip_scale.engine import command as pretrain_command
from protoclip_scale.recipe import load_recipe
from tests.support import CORPUS, ROOT, TINY, TINY_PROTOTYPES, launch, output, overrides, pretrain

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
RUN_ELSEWHERE = {
    "make demo": "the demo itself: minutes; run before every release",
    "make test": "this very run",
    "cp launch/slurm/cluster.env.example launch/slurm/cluster.env": "tests/test_slurm_scripts.py",
    "bash launch/slurm/in_environment.sh python launch/pretrain.py --recipe recipes/yfcc15m.yaml --check --fetch": "fetches over the network; tests/test_engine_prefetch.py has a hub",
    "sbatch launch/slurm/pretrain.sbatch recipes/yfcc15m.yaml": "tests/test_slurm_cluster.py",
    "python launch/slurm/submit.py recipes/yfcc15m.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00": "tests/test_slurm_scripts.py",
    "python tools/gather_images.py --list conceptual_captions --out data/cc3m Train_GCC-training.tsv": "3 million downloads; tests/test_preparation_gather.py has a server",
    "python tools/extract_teacher.py --recipe recipes/yfcc15m.yaml --set data.root=DATA --model minilm --caption first --dim 64 --out DATA/teacher": "tests/test_launch_commands.py",
    "python tools/prepare_evaluation.py protoclip10 --out data/evaluation": "fetches over the network; tests/test_preparation_held_out.py has a server",
    "accelerate launch --num_processes 1 launch/evaluate.py --model open_clip:ViT-B-32:laion2b_s34b_b79k --suite protoclip10 --out result.json --csv result.csv": "needs what the line before fetches; tests/test_evaluation_launch.py has a small set",
    "python tools/watch.py runs/demo --until-done": "tests/test_tools_watch.py, before training and after",
    "python tools/compare.py runs/demo --baseline runs/demo --out runs/demo/comparison": "tests/test_tools_compare.py, which has runs to compare",
}


def is_data_tool(command: str) -> bool:
    return command.startswith(("python tools/", "python benchmarks/")) and "runs/demo" not in command


def settings(command: str) -> tuple[str, ...]:
    recipe = re.search(r"recipes/[\w/]+\.yaml", command)[0]
    return TINY_PROTOTYPES if load_recipe(ROOT / recipe).prototypes else TINY


@pytest.fixture(scope="module")
def after_training(tmp_path_factory):
    """A working copy in which the README's reader has trained runs/demo."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("launch", "recipes", "tools"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs").mkdir()
    assert pretrain(folder / "runs/demo", "demo.yaml", (*TINY_PROTOTYPES, "schedule.total=2 episodes")) == [0], output(folder / "runs/demo")
    (row,) = pq.read_table(CORPUS / "val-00000-of-00001.parquet").slice(0, 1).to_pylist()
    Image.open(io.BytesIO(row["image"]["bytes"])).save(folder / "photo.jpg")
    return folder


def test_the_list_of_exceptions_is_true():
    assert set(RUN_ELSEWHERE) <= set(COMMANDS)
    elsewhere = (ROOT / "tests/test_launch_commands.py").read_text()
    assert "recipes/yfcc15m.yaml" in elsewhere and "tools/extract_teacher.py" in elsewhere
    assert '"launch/slurm/pretrain.sbatch", "recipes/yfcc15m.yaml"' in (ROOT / "tests/test_slurm_cluster.py").read_text()
    scripts = (ROOT / "tests/test_slurm_scripts.py").read_text()
    assert '"recipes/yfcc15m.yaml", "--nodes"' in scripts and "launch/slurm/cluster.env.example" in scripts
    assert '"--fetch"' in (ROOT / "tests/test_engine_prefetch.py").read_text()
    assert "tools/prepare_evaluation.py" in (ROOT / "tests/test_preparation_held_out.py").read_text() and '"protoclip10"' in (ROOT / "tests/test_evaluation_launch.py").read_text()
    assert '"--until-done"' in (ROOT / "tests/test_tools_watch.py").read_text() and '"--baseline"' in (ROOT / "tests/test_tools_compare.py").read_text()
    assert "conceptual_captions" in (ROOT / "tests/test_preparation_gather.py").read_text()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "pretrain.py" in c and c not in RUN_ELSEWHERE])
def test_pretrain_lines(command, tmp_path, capsys):
    words = shlex.split(command)
    arguments = words[words.index("launch/pretrain.py") + 1 :]
    options = None if "--help" in arguments else pretrain_command.parse(arguments)
    ranks = int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1
    if options is None:
        with pytest.raises(SystemExit) as ended:
            pretrain_command.main(arguments)
        assert ended.value.code == 0 and "episode_size" in capsys.readouterr().out
    elif ranks > 2:  # needs that many GPUs: the line is parsed and its recipe read
        recipe = load_recipe(ROOT / options.recipe, options.set)
        assert options.expect_ranks == ranks and recipe.data.plan.lanes % ranks == 0
    elif options.check:
        assert pretrain_command.main(arguments) == 0
        assert "prototypes" in capsys.readouterr().out
    else:
        short = (*settings(command), "schedule.total=2 episodes")
        if ranks > 1:
            done = launch(*arguments, "--run-dir", tmp_path / "run", *overrides(short), ranks=ranks)
            assert done.returncode == 0, done.stdout + done.stderr
        else:  # tests/test_launch_commands.py has one process through accelerate, which takes 20 s to start
            assert pretrain_command.main([*arguments, "--run-dir", str(tmp_path / "run"), *overrides(short)]) == 0


def is_of_demo(command: str) -> bool:
    return "runs/demo" in command and "pretrain.py" not in command and command not in RUN_ELSEWHERE


@pytest.mark.parametrize("command", [c for c in COMMANDS if is_of_demo(c) and c.startswith("accelerate")])
def test_evaluate_lines(command, after_training):
    words = shlex.split(command)
    suite = after_training / "suite.yaml"
    suite.write_text(f"sets: [{{name: val, files: {CORPUS}/val-*.parquet, classify: [coarse]}}]\n")
    program = [sys.executable, "-m", "accelerate.commands.launch", *words[2:], "--suite", str(suite)]
    done = subprocess.run(program, cwd=after_training, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if is_of_demo(c) and c.startswith("python")])
def test_export_and_classify_lines(command, after_training, monkeypatch, capsys):
    """One after the other. In this process: an import takes seconds."""
    words = shlex.split(command)
    monkeypatch.chdir(after_training)
    place = runpy.run_path(str(ROOT / words[1]), run_name="script") if words[1] != "-m" else runpy.run_module(words[2], run_name="script")
    assert place["main"](words[2 + (words[1] == "-m") :]) == 0
    assert capsys.readouterr().out


def test_the_python_lines_load_the_export(after_training, monkeypatch):
    out = after_training / "runs/demo/for_open_clip"
    monkeypatch.chdir(after_training)
    if not out.exists():
        assert runpy.run_path(str(ROOT / "launch/export.py"), run_name="script")["main"](["--run", "runs/demo", "--layout", "open_clip", "--out", str(out)]) == 0
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = "\n".join(f"{block}\nprint(tuple(text.shape))" for block in blocks)
    done = subprocess.run([sys.executable, "-c", code], cwd=after_training, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and len(blocks) == 2 and "(3, 32)" in done.stdout and "(2, 32)" in done.stdout, done.stderr
    assert all(re.search(rf"\d\.\d{{3}} {label}", done.stdout) for label in ("a cat", "a dog", "a red car"))
    shutil.rmtree(out)


@pytest.mark.parametrize("command", [c for c in COMMANDS if is_data_tool(c) and c not in RUN_ELSEWHERE])
def test_data_lines(command, tmp_path, monkeypatch, capsys):
    """In a folder with a table of 24 pictures of the corpus. In this process: an import takes seconds."""
    rows = pq.read_table(CORPUS / "val-00000-of-00001.parquet").slice(0, 24).to_pylist()
    lines = ["filepath\ttitle"]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.webp").write_bytes(row["image"]["bytes"])
        lines.append(f"{number}.webp\t{row['caption'][0]}")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    words = shlex.split(command)
    script = ROOT / words[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(script.parent)
    code = runpy.run_path(str(script), run_name="tool")["main"](words[2:])
    assert not code, capsys.readouterr().err
    out = {"prepare_data.py": "data/mine/report.json", "inspect_data.py": "sheet.png"}.get(script.name)
    said = capsys.readouterr().out
    assert (tmp_path / out).stat().st_size > 1000 if out else said
    if script.parent.name == "benchmarks":
        assert json.loads(said.splitlines()[-1])


def test_every_command_is_accounted_for():
    known = [c for c in COMMANDS if "pretrain.py" in c or "runs/demo" in c or c in RUN_ELSEWHERE or is_data_tool(c)]
    assert [c for c in COMMANDS if c not in known] == []
