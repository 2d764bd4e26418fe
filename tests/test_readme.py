"""Every command in README.md is run as it stands there, made small by ``--set``; or it is in the list below with the reason why not."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest

from protoclip_scale.engine import command as pretrain_command
from protoclip_scale.recipe import load_recipe
from tests.support import CORPUS, ROOT, TINY, TINY_PROTOTYPES, launch, output, overrides, pretrain

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
RUN_ELSEWHERE = {
    "make demo": "the demo itself: minutes; run before every release",
    "make test": "this very run",
    "accelerate launch launch/pretrain.py --recipe recipes/yfcc15m.yaml --set data.root=DATA": "tests/test_launch_commands.py",
    "python tools/extract_teacher.py --recipe recipes/yfcc15m.yaml --set data.root=DATA --model minilm --caption first --dim 64 --out DATA/teacher": "tests/test_launch_commands.py",
}


def settings(command: str) -> tuple[str, ...]:
    return TINY if "demo_clip" in command else TINY_PROTOTYPES


@pytest.fixture(scope="module")
def after_training(tmp_path_factory):
    """A working copy in which the README's reader has trained runs/demo."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("launch", "recipes", "tools"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs").mkdir()
    assert pretrain(folder / "runs/demo", "demo.yaml", (*TINY_PROTOTYPES, "schedule.total=2 episodes")) == [0], output(folder / "runs/demo")
    return folder


def test_the_list_of_exceptions_is_true():
    assert set(RUN_ELSEWHERE) <= set(COMMANDS)
    elsewhere = (ROOT / "tests/test_launch_commands.py").read_text()
    assert "recipes/yfcc15m.yaml" in elsewhere and "tools/extract_teacher.py" in elsewhere


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


@pytest.mark.parametrize("command", [c for c in COMMANDS if "runs/demo" in c and "pretrain.py" not in c])
def test_evaluate_and_export_lines(command, after_training):
    words = shlex.split(command)
    program = [sys.executable, "-m", "accelerate.commands.launch", *words[2:]] if words[0] == "accelerate" else [sys.executable, *words[1:]]
    suite = after_training / "suite.yaml"
    suite.write_text(f"sets: [{{name: val, files: {CORPUS}/val-*.parquet, classify: [coarse]}}]\n")
    if "evaluate.py" in command:
        program += ["--suite", str(suite)]
    done = subprocess.run(program, cwd=after_training, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_python_lines_load_the_export(after_training):
    out = after_training / "runs/demo/for_open_clip"
    if not out.exists():
        subprocess.run([sys.executable, "launch/export.py", "--run", "runs/demo", "--layout", "open_clip", "--out", out], cwd=after_training, check=True)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code + "\nprint(tuple(text.shape))"], cwd=after_training, capture_output=True, text=True)
    assert done.returncode == 0 and "(2, 32)" in done.stdout, done.stderr
    shutil.rmtree(out)


def test_every_command_is_accounted_for():
    known = [c for c in COMMANDS if "pretrain.py" in c or "runs/demo" in c or c in RUN_ELSEWHERE]
    assert [c for c in COMMANDS if c not in known] == []
