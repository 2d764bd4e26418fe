"""launch/slurm without a Slurm: what submit.py writes and refuses, what the scripts make of the PROTOCLIP_ variables, and that images follow constraints.txt."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SCRIPTS = sorted(path for path in (ROOT / "launch/slurm").iterdir() if path.suffix in (".sh", ".sbatch", ".example"))
SMALL = ("--nodes", "1", "--gpus-per-node", "2")


@pytest.fixture
def submit(monkeypatch, capsys):
    """submit.py's main in the checkout's folder: arguments -> (exit code, output, error stream)."""
    for name in [name for name in os.environ if name.startswith("PROTOCLIP_") and name != "PROTOCLIP_CACHE"]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(ROOT)
    main = runpy.run_path(str(ROOT / "launch/slurm/submit.py"))["main"]

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def header(script: str) -> dict[str, str]:
    return {key: value for key, _, value in (line.removeprefix("#SBATCH --").partition("=") for line in script.splitlines() if line.startswith("#SBATCH"))}


def arguments_of(script: str, task: int | None = None) -> list[str]:
    """What a shell makes of the lines that choose the job script's arguments."""
    chosen = script[script.index("export PROTOCLIP_LOGS") : script.index("set -euo pipefail")]
    environment = os.environ | ({"SLURM_ARRAY_TASK_ID": str(task)} if task is not None else {})
    done = subprocess.run(["bash", "-euc", chosen + 'printf "%s\\0" "$@"'], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_syntax(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "--external-sources", "--shell=bash", str(path)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["pretrain.sbatch", "evaluate.sbatch"])
def test_the_header_is_all_comments_and_node_numbers_are_left_to_the_nodes(name):
    """sbatch reads options up to the first command; in the batch script SLURM_NODEID is 0, whatever node the word is meant for."""
    lines = (ROOT / "launch/slurm" / name).read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    assert not any("SLURM_NODEID" in line or "SLURM_PROCID" in line for line in lines)
    assert header("\n".join(lines))["ntasks-per-node"] == "1"


def test_options_replace_those_of_the_template(submit):
    code, script, error = submit(
        "recipes/yfcc15m.yaml", "--nodes", "4", "--gpus-per-node", "4", "--time", "1-00:00:00", "--partition", "gpu", "--account", "vision", "--qos", "long",
        "--sbatch=--constraint=a100&nvlink", "--sbatch=--signal=B:USR1@900", "--sbatch=--no-kill",
    )  # fmt: skip
    assert code == 0
    assert header(script) | {"output": ""} == {
        "job-name": "yfcc15m", "nodes": "4", "gpus-per-node": "4", "time": "1-00:00:00", "ntasks-per-node": "1", "exclusive": "", "mem": "0",
        "signal": "B:USR1@900", "requeue": "", "open-mode": "append", "output": "", "partition": "gpu", "account": "vision", "qos": "long",
        "constraint": "a100&nvlink", "no-kill": "",
    }  # fmt: skip
    template = (ROOT / "launch/slurm/pretrain.sbatch").read_text()
    assert script.split("set -euo pipefail")[1].startswith(template.split("set -euo pipefail")[1])
    assert script.splitlines()[-1] == "# sbatch logs/yfcc15m.sbatch" and "printed only" in error
    assert not (ROOT / "logs/yfcc15m.sbatch").exists()


def test_arguments_reach_the_script_as_they_were_typed(submit):
    values = ("data.root=/a folder/with 'quotes' and $HOME", 'notes="two\nlines; `id` \\ *"')
    code, script, _ = submit("recipes/yfcc15m.yaml", *SMALL, *(word for value in values for word in ("--set", value)), "--run-dir", "runs/my run", "--", "--extend")
    assert code == 0
    assert arguments_of(script) == ["recipes/yfcc15m.yaml", "--set", values[0], "--set", values[1], "--run-dir", str(ROOT / "runs/my run"), "--extend"]


def test_recipes_and_seeds_are_an_array_with_directories_of_their_own(submit):
    code, script, _ = submit("recipes/demo_clip.yaml", "recipes/demo.yaml", "--seeds", "0", "7", *SMALL, "--at-once", "2")
    assert code == 0
    assert header(script)["array"] == "0-3%2" and header(script)["output"] == "logs/%x-%A_%a.out"
    tasks = [arguments_of(script, task) for task in range(4)]
    assert [task[0] for task in tasks] == ["recipes/demo_clip.yaml"] * 2 + ["recipes/demo.yaml"] * 2
    assert [task[-1] for task in tasks] == [str(ROOT / "runs" / name) for name in ("demo_clip-seed0", "demo_clip-seed7", "demo-seed0", "demo-seed7")]
    assert tasks[3][1:5] == ["--set", "run.seed=7", "--set", "data.plan.seed=7"]


@pytest.mark.parametrize(
    ("option", "ranks"),
    [("--gpus-per-node=a100:2", 2), ("--gres=gpu:4", 4), ("--gres=gpu:a100:2", 2), ("--gres=gpu:h100_80gb:4(S:0-1)", 4), ("--gres=gpu:2,nvme:1", 2), ("--gres=gpu=4", 4)],
)
def test_gpus_are_counted_however_they_are_asked_for(submit, option, ranks):
    """As many lanes as GPUs of the node are taken, half as many refused."""
    arguments = ("recipes/demo_clip.yaml", "--nodes", "1", f"--sbatch={option}")
    code, script, error = submit(*arguments, "--set", f"data.plan.lanes={ranks}")
    assert code == 0, error
    assert [key for key in header(script) if key in ("gres", "gpus-per-node")] == [option[2:].split("=")[0]]
    code, _, error = submit(*arguments, "--set", f"data.plan.lanes={ranks // 2}")
    assert code == 1 and f"world size {ranks} does not divide" in error


def test_the_clusters_settings_count_and_secrets_are_neither_shown_nor_readable(submit, monkeypatch, tmp_path):
    settings = tmp_path / "cluster.env"
    settings.write_text(': "${PROTOCLIP_RANKS_PER_NODE:=3}"\n[ -e /nowhere ] && export NOT_SET=1\n')
    monkeypatch.setenv("PROTOCLIP_CLUSTER_ENV", str(settings))
    code, _, error = submit("recipes/demo.yaml", "--nodes", "1", "--gpus-per-node", "4")
    assert code == 1 and "world size 3 does not divide" in error
    settings.write_text("exit 3\n")
    code, _, error = submit("recipes/demo.yaml", *SMALL)
    assert code == 1 and error.startswith("error: launch/slurm/cluster.env") and len(error.splitlines()) == 1
    monkeypatch.delenv("PROTOCLIP_CLUSTER_ENV")
    programs = program(tmp_path / "bin", "sbatch", 'stat -c %a "$1"; grep -c "sig=abcdefgh" "$1"')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    script = ROOT / "logs/a-secret.sbatch"
    try:
        ran = subprocess.run(
            [sys.executable, "launch/slurm/submit.py", "recipes/demo.yaml", *SMALL, "--job-name", "a-secret", "--set", "data.root=https://store/demo?sig=abcdefgh", "--submit"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert "abcdefgh" not in ran.stdout + ran.stderr and "sig=***" in ran.stdout
        assert ran.stdout.split()[-2:] == ["600", "1"], "sbatch gets the value, others cannot read it"
    finally:
        script.unlink(missing_ok=True)


LINES = [line.strip() for file in ("README.md", "docs/slurm.md", "docs/launching.md") for line in (ROOT / file).read_text().splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if re.match(r"sbatch .*pretrain\.sbatch recipes/|python launch/slurm/submit\.py recipes/", line)])
def test_the_lines_of_the_documents_ask_for_as_many_ranks_as_their_recipes_take(submit, line):
    words = shlex.split(line, comments=True)
    if words[0] == "sbatch":  # its options stand before the file, and the template's count where it says none
        script = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
        words = ["python", "submit.py", words[script + 1], *(f"--sbatch={word}" for word in words[1:script])]
    code, _, error = submit(*(word for word in words[2:] if word != "--submit"))
    assert code == 0, error


def test_evaluation_and_clusters_of_processors(submit, tmp_path):
    code, script, _ = submit(tmp_path, "--evaluate", "--gpus-per-node", "0", "--accelerate", "launch/accelerate/cpu.yaml", "--environment", "conda:a b", "--", "--checkpoint", "all")
    assert code == 0
    assert "launch/evaluate.py" in script and "gpus-per-node" not in header(script) and "requeue" not in header(script)
    assert arguments_of(script) == [str(tmp_path), "--checkpoint", "all"]
    exports = re.findall(r"^export (PROTOCLIP_\w+)=(.*)$", script, re.MULTILINE)
    assert exports == [("PROTOCLIP_LOGS", "logs"), ("PROTOCLIP_ACCELERATE", "launch/accelerate/cpu.yaml"), ("PROTOCLIP_ENVIRONMENT", "'conda:a b'")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipes/demo.yaml", "--nodes", "3", "--gpus-per-node", "1"), "recipes/demo.yaml: world size 3 does not divide data.plan.lanes"),
        (("recipes/demo.yaml", *SMALL, "--set", "optim.l=1"), "optim.l is not a key"),
        (("recipes/dem.yaml", *SMALL), "there is no such recipe"),
        (("recipes/demo.yaml", "recipes/demo.yaml", *SMALL), "would write to the same run directory"),
        (("recipes/demo.yaml", "recipes/demo_clip.yaml", *SMALL, "--run-dir", "runs/x"), "would hold several runs"),
        (("recipes/demo.yaml", *SMALL, "--partition", "a\n#SBATCH --uid=0"), "cannot stand in a job script"),
        (("recipes/demo.yaml", *SMALL, "--sbatch=-p gpu"), "write a long option"),
        (("recipes/demo.yaml", *SMALL, "--at-once", "2"), "--at-once 2 has no effect"),
        (("recipes/demo.yaml", *SMALL, "--accelerate", "launch/accelerate/zero9.yaml"), "zero2.yaml"),
        (("recipes/demo.yaml", *SMALL, "--accelerate", "launch/accelerate/cpu_zero2.yaml"), "add --gpus-per-node 0"),
        (("recipes/demo.yaml", "--gpus-per-node", "0"), "choose one of launch/accelerate/cpu*.yaml"),
        (("recipes/demo.yaml", *SMALL, "--environment", "/opt/venv"), "write venv:FOLDER"),
        (("recipes/demo.yaml", "--nodes", "1", "--sbatch=--gpus-per-node=a100"), "--gpus-per-node=a100: a number of GPUs is needed"),
        (("recipes/demo.yaml", *SMALL, "--sbatch=--nodes=1-2"), "--nodes 1-2: a plain number is needed"),
        (("recipes/demo.yaml", "--nodes", "1", "--sbatch=--gres=gpu:a100:3"), "recipes/demo.yaml: world size 3 does not divide data.plan.lanes"),
        (("recipes/demo.yaml", "--gpus-per-node", "0", "--sbatch=--gres=gpu:4", "--accelerate", "launch/accelerate/cpu.yaml"), "the job asks for GPUs (--gres=gpu:4)"),
        (("runs/nowhere", "--evaluate"), "there is no such directory"),
        (("recipes", "--evaluate", "--seeds", "1"), "--seeds has no effect with --evaluate"),
    ],
)
def test_refusals_are_one_line(submit, arguments, message):
    code, script, error = submit(*arguments)
    assert code == 1 and not script
    assert message in error and len(error.splitlines()) == 1, error


def test_it_is_run_where_the_job_will_start(submit, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, error = submit(ROOT / "recipes/demo.yaml", *SMALL)
    assert code == 1 and f"run it in {ROOT}" in error


def shell(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """A script of launch/slurm in the checkout, with no cluster settings but ``variables``."""
    others = ("PROTOCLIP_", "SLURM_", "HF_HOME", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)} | {"PROTOCLIP_CLUSTER_ENV": "/dev/null"}
    return subprocess.run(["bash", f"launch/slurm/{script}", *arguments], cwd=ROOT, env=environment | variables, capture_output=True, text=True)


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("name", ["pretrain.sbatch", "evaluate.sbatch"])
def test_a_job_from_another_folder_is_one_line(name, tmp_path):
    done = subprocess.run(["bash", ROOT / "launch/slurm" / name, "recipes/demo.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path} is no checkout of protoclip-scale: submit from its top folder, or with --chdir\n"


def test_environments(tmp_path):
    """Programs of these names stand for conda and apptainer, which are not here: what is tested is how they are called."""
    what = ("bash", "-c", 'echo "$0 $1 ${VIRTUAL_ENV:-} ${ACTIVE:-}"', "a b", "$c")
    assert shell("in_environment.sh", *what).stdout.split() == ["a", "b", "$c"]

    venv = program(tmp_path / "my venv/bin", "python", "echo python of the venv").parent
    assert shell("in_environment.sh", "python", PROTOCLIP_ENVIRONMENT=f"venv:{venv}").stdout == "python of the venv\n"

    hook = """echo 'conda() { echo "$@" > /dev/null; [ "$2" = protoclip ] && ACTIVE=$2 && export ACTIVE && echo "$UNSET_VARIABLE" >/dev/null; }'"""
    conda = program(tmp_path / "conda", "conda", f'[ "$*" = "shell.bash hook" ] && {hook}') / "conda"
    done = shell("in_environment.sh", *what, PROTOCLIP_ENVIRONMENT="conda:protoclip", CONDA_EXE=str(conda))
    assert done.stdout.split() == ["a", "b", "$c", "protoclip"], done.stderr

    image = tmp_path / "image.sif"
    image.touch()
    programs = program(tmp_path / "apptainer", "apptainer", 'printf "%s\\n" "$@"')
    path = f"{programs}:{os.environ['PATH']}"
    inside = shell("in_environment.sh", "python", "a b", PATH=path, PROTOCLIP_ENVIRONMENT=f"apptainer:{image}")
    assert inside.stdout.splitlines() == ["exec", "--bind", str(ROOT), "--pwd", str(ROOT), str(image), "python", "a b"]
    more = {"SLURM_GPUS_ON_NODE": "8", "PROTOCLIP_SCRATCH": str(tmp_path / "local disk"), "HF_HOME": str(tmp_path)}
    with_gpus = shell("in_environment.sh", "python", PATH=path, PROTOCLIP_ENVIRONMENT=f"apptainer:{image}", **more).stdout.splitlines()
    assert with_gpus[:8] == ["exec", "--nv", "--bind", str(ROOT), "--bind", more["PROTOCLIP_SCRATCH"], "--bind", more["HF_HOME"]]
    assert Path(more["PROTOCLIP_SCRATCH"]).is_dir()
    for environment, set_to in (("", ""), (f"venv:{venv}", "1")):
        assert shell("in_environment.sh", "bash", "-c", "echo $PYTHONNOUSERSITE", PROTOCLIP_ENVIRONMENT=environment).stdout.strip() == set_to


@pytest.mark.parametrize("environment", ["venv:/nowhere", "conda:other", "apptainer:/nowhere.sif", "module:x", "/opt/venv"])
def test_environments_that_are_not_there(environment):
    done = shell("in_environment.sh", "python", PROTOCLIP_ENVIRONMENT=environment, CONDA_EXE="/nowhere/conda")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"error: PROTOCLIP_ENVIRONMENT {environment}"), done.stderr


def test_settings_of_the_cluster(tmp_path):
    settings = tmp_path / "cluster.env"
    settings.write_text(': "${NCCL_SOCKET_IFNAME:=ib}"\n: "${GLOO_SOCKET_IFNAME:=$NOT_SET$NCCL_SOCKET_IFNAME}"\n')
    show = ("bash", "-c", "echo $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME")
    assert shell("in_environment.sh", *show, PROTOCLIP_CLUSTER_ENV=str(settings)).stdout.split() == ["ib", "ib"]
    assert shell("in_environment.sh", *show, PROTOCLIP_CLUSTER_ENV=str(settings), NCCL_SOCKET_IFNAME="eth0").stdout.split() == ["eth0", "eth0"]
    missing = shell("in_environment.sh", *show, PROTOCLIP_CLUSTER_ENV="/nowhere")
    assert missing.returncode == 1 and "PROTOCLIP_CLUSTER_ENV /nowhere: there is no such file" in missing.stderr
    example = ROOT / "launch/slurm/cluster.env.example"
    assert "=" in example.read_text() and not shell("in_environment.sh", "env", PROTOCLIP_CLUSTER_ENV=str(example)).stderr


def test_the_run_directory_is_the_one_that_training_takes(monkeypatch, capsys):
    def run_dir(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["run_dir.py", *arguments])
        runpy.run_path("launch/slurm/run_dir.py", run_name="__main__")

    monkeypatch.chdir(ROOT)
    run_dir("--recipe", "recipes/demo.yaml", "--set", "name=other", "--resume", "auto")
    assert capsys.readouterr().out == f"{ROOT / 'runs/other'}\n"
    with pytest.raises(SystemExit, match="error: --set: optim.l is not a key") as ended:
        run_dir("--recipe", "recipes/demo.yaml", "--set", "optim.l=1")
    assert "\n" not in ended.value.code


FAILED = "the run failed, see {run}/status.json; it is not started again"
PASSING = "the run failed for a reason that may pass"


@pytest.mark.parametrize(
    ("facts", "saves", "code", "said"),
    [
        ({}, True, 1, FAILED),
        ({"may_pass": True}, True, 75, f"{PASSING}, after a new checkpoint; the job is started again (1 of at most 100)"),
        ({"may_pass": True}, False, 1, f"{PASSING} before a new checkpoint was saved"),
        ({"lost_rank": True}, True, 75, "ranks were lost, after a new checkpoint; the job is started again"),
    ],
    ids=["its-own-fault", "may-pass", "may-pass-and-stuck", "lost-rank"],
)
def test_which_failed_runs_are_started_again(tmp_path, facts, saves, code, said):
    """Programs of these names stand for Slurm's, and for the Python that names the run directory."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    ended = json.dumps({"state": "failed", "code": 1, "message": "m", **facts}, indent=1)
    programs = program(tmp_path / "bin", "python", f"echo {run}")
    program(programs, "srun", f"echo '{ended}' > {run}/status.json; {f'echo step-1 > {run}/checkpoints/latest;' if saves else ''} exit 1")
    program(programs, "scontrol", '[ "$1" = requeue ] || echo "JobId=7 JobState=RUNNING Reason=None"')
    program(programs, "sleep", "")
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "1"}
    done = shell("pretrain.sbatch", "recipes/demo.yaml", PATH=f"{programs}:{os.environ['PATH']}", **job)
    assert done.returncode == code and said.format(run=run) in done.stdout + done.stderr, done.stdout + done.stderr


def test_images_take_the_versions_of_constraints_and_nothing_else():
    """Both images: the Python of constraints.txt, the package with the same extras, no version of their own."""
    constraints = (ROOT / "constraints.txt").read_text()
    python = re.search(r"Python (\d+\.\d+)", constraints)[1]
    installs = []
    for name, base in (("Dockerfile", "FROM python:"), ("apptainer.def", "From: python:")):
        text = (ROOT / name).read_text()
        assert f"{base}{python}-slim" in text
        assert "==" not in text and ">=" not in text
        (install,) = re.findall(r"pip install (.*)", text)
        assert re.fullmatch(r"--no-cache-dir --constraint constraints.txt '\.\[[\w,]+\]'", install)
        installs.append(install)
        for file in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "protoclip_scale"):
            assert re.search(rf"^(COPY .*|\s+){re.escape(file)}\b", text, re.MULTILINE), f"{name} does not copy {file}"
    assert installs[0] == installs[1]
    extras = set(re.search(r"\.\[([\w,]+)\]", installs[0])[1].split(","))
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras)
