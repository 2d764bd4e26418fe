"""docs/extending.md: the files on the page are written where it says, and its test and its recipe are run."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from protoclip_scale.engine import command
from protoclip_scale.recipe import load_recipe
from protoclip_scale.recipe.names import objective_names
from tests.support import RECIPES, ROOT, TINY, metrics, overrides

PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
OBJECTIVE, TEST, RECIPE = "protoclip_scale/objectives/margin.py", "tests/test_objectives_margin.py", "recipes/demo_margin.yaml"
COMMANDS = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()
SHORT = (*TINY, "schedule.total=2 episodes")


def test_the_page_has_one_file_one_test_and_one_recipe():
    assert list(FILES) == [OBJECTIVE, TEST, RECIPE]
    assert not any((ROOT / path).exists() for path in FILES)


@pytest.fixture
def with_the_objective(tmp_path, monkeypatch):
    """The package as if the objective's file lay in it."""
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    package = importlib.import_module("protoclip_scale.objectives")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / OBJECTIVE).rpartition("/")[0]])
    yield tmp_path
    sys.modules.pop("protoclip_scale.objectives.margin", None)
    vars(package).pop("margin", None)


def test_its_test_passes_and_its_recipe_trains(with_the_objective):
    """In this process: an import takes seconds."""
    assert "margin" in objective_names()
    of_the_page: dict = {}
    exec(compile(FILES[TEST], TEST, "exec"), of_the_page)
    own_tests = [value for name, value in of_the_page.items() if name.startswith("test_")]
    assert len(own_tests) == 2
    for own_test in own_tests:
        own_test()
    recipe, run = with_the_objective / RECIPE, with_the_objective / "run"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(FILES[RECIPE]) | {"extends": str(RECIPES / "demo_clip.yaml")}))
    assert load_recipe(recipe).objectives["margin"].weight == 0.5
    assert command.main(["--recipe", str(recipe), "--run-dir", str(run), *overrides(SHORT)]) == 0
    losses = [line["loss/margin"] for line in metrics(run, "train")]
    assert len(losses) == 8 and all(0 < loss < 3 for loss in losses)
    assert metrics(run, "train")[-1]["loss"] == pytest.approx(metrics(run, "train")[-1]["loss/clip"] + 0.5 * losses[-1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pages_commands_in_a_copy_of_the_tree(tmp_path):
    """As a user does it, with processes."""
    for name in ("protoclip_scale", "tests", "recipes", "launch", "docs", "pyproject.toml"):
        take = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        take(ROOT / name, tmp_path / name)
    for path, text in FILES.items():
        (tmp_path / path).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    short = " ".join(f"--set '{value}'" for value in SHORT)
    for line in COMMANDS:
        line = line.replace("python ", f"{sys.executable} ", 1).replace("accelerate launch", f"{sys.executable} -m accelerate.commands.launch", 1)
        done = subprocess.run(line + (f" --run-dir runs/margin {short}" if "pretrain" in line else ""), shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(tmp_path / "runs" / "margin", "train")[-1]["loss/margin"] > 0
    assert "### `objectives.margin`" in (tmp_path / "docs" / "recipes.md").read_text()
