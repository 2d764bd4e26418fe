"""Fill in a job script of this folder, print it with its sbatch line, and submit it if asked to. Run it in the top folder of the checkout.

    python launch/slurm/submit.py recipes/yfcc15m.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 --partition gpu
    python launch/slurm/submit.py recipes/yfcc15m_clip.yaml recipes/yfcc15m.yaml --seeds 0 1 2 --at-once 2 --submit
    python launch/slurm/submit.py runs/yfcc15m --evaluate --nodes 1 -- --checkpoint all --out runs/yfcc15m/evaluation.json

Several recipes or seeds are one job array; each has a run directory of its own. What stands behind -- goes to launch/pretrain.py or launch/evaluate.py.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from protoclip_scale.data.plan import check_lanes
from protoclip_scale.engine.command import run_directory
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import load_recipe
from protoclip_scale.redact import redact_text

LOGS = "logs"
Task = list[str]  # the arguments of one job script


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    arguments, passed_on = _split(list(arguments))
    cluster = cluster_settings()
    parser = argparse.ArgumentParser(prog="launch/slurm/submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="RECIPE", help="recipes; with --evaluate run directories or exports")
    parser.add_argument("--evaluate", action="store_true", help="evaluate models instead of training them")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="train each recipe with each seed: of the first weights and of the order of rows")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one key of the recipes; may be repeated")
    parser.add_argument("--run-dir", metavar="DIR", help="where the run is written (default: the recipe's run.dir); -seedN is added to it for each of several seeds")
    parser.add_argument("--at-once", type=int, metavar="N", help="run at most N jobs of the array at the same time")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes of each job")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="0 for a cluster of CPUs")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", default=cluster.get("PROTOCLIP_RANKS_PER_NODE"), help="default: one for each GPU, or one")
    parser.add_argument("--time", metavar="TIME", help="time limit of each start, for instance 24:00:00")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--qos", metavar="NAME")
    parser.add_argument("--job-name", metavar="NAME", help="default: the recipe's name")
    parser.add_argument("--sbatch", metavar="OPTION", action="append", default=[], help="any other option of sbatch, as --sbatch=--constraint=a100; may be repeated")
    parser.add_argument("--accelerate", metavar="FILE", default=cluster.get("PROTOCLIP_ACCELERATE"), help="the strategy (default: launch/accelerate/ddp.yaml)")
    parser.add_argument("--environment", metavar="WHAT", help="venv:FOLDER, conda:NAME or apptainer:IMAGE (default: PROTOCLIP_ENVIRONMENT of cluster.env)")
    parser.add_argument("--submit", action="store_true", help="submit it, too")
    options = parser.parse_args(arguments)
    options.passed_on = passed_on
    return options


def cluster_settings() -> dict[str, str]:
    """The environment that jobs will have: this one, and what launch/slurm/cluster.env adds. UserError if that file ends the shell that reads it."""
    done = subprocess.run(["bash", "-c", "source launch/slurm/environment.sh >&2 && env -0"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"launch/slurm/cluster.env: {' '.join(done.stderr.split()).removeprefix('error: ')}")
    return dict(variable.split("=", 1) for variable in done.stdout.split("\0") if "=" in variable)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before -- and behind it."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


class Header:
    """The #SBATCH lines of a template, some of them replaced."""

    def __init__(self, template: str):
        self.options: dict[str, str | None] = {}
        for line in re.findall(r"^#SBATCH (.*)$", template, re.MULTILINE):
            self.add(line)

    def add(self, option: str) -> None:
        """``--key=value``, ``--key value`` or ``--key``; the last one said of a key counts."""
        found = re.fullmatch(r"--([a-z][a-z0-9-]*)(?:[= ](.+))?", option.strip())
        if not found:
            raise UserError(f"--sbatch {option}: write a long option of sbatch, for instance --sbatch=--constraint=a100")
        self.options[found[1]] = None
        self.set(found[1], found[2])

    def set(self, key: str, value: object) -> None:
        """Nothing changes where the value is None."""
        if value is None:
            return
        if not re.fullmatch(r"[^\s'\"\\#]+", str(value)):
            raise UserError(f"--{key} {str(value)!r} cannot stand in a job script: leave out blanks, quotes, backslashes and #")
        self.options[key] = str(value)

    def lines(self) -> list[str]:
        return [f"#SBATCH --{key}" + (f"={value}" if value is not None else "") for key, value in self.options.items()]

    @property
    def nodes(self) -> int:
        value = self.options.get("nodes") or ""
        if not value.isdigit():
            raise UserError(f"--nodes {value}: a plain number is needed to count the ranks; add --nodes N")
        return int(value)

    @property
    def gpus(self) -> str | None:
        """What asks for each node's GPUs, as ``--gres=gpu:a100:4``; None where nothing does."""
        return next((f"--{key}={value}" for key, value in self.options.items() if key == "gpus-per-node" or (key == "gres" and value.startswith("gpu"))), None)

    @property
    def gpus_per_node(self) -> int:
        """UserError if the number does not stand there."""
        found = re.search(r"(?:=|gpu:)(?:[a-z][^\s:,=]*:)?(\d+)(?:\(.*\))?(?:,|$)", self.gpus, re.IGNORECASE)
        if not found:
            raise UserError(f"{self.gpus}: a number of GPUs is needed to count the ranks; write --gpus-per-node=N, --gpus-per-node=TYPE:N or --gres=gpu:TYPE:N")
        return int(found[1])


def tasks_of(options: argparse.Namespace, ranks: int) -> tuple[list[Task], list[str]]:
    """The arguments of each job, and its name. UserError for a recipe that is not sound, or cannot be shared by so many ranks."""
    if options.evaluate:
        for key in ("seeds", "set", "run_dir"):
            if getattr(options, key):
                raise UserError(f"--{key.replace('_', '-')} has no effect with --evaluate; remove it")
        for folder in options.what:
            if not Path(folder).is_dir():
                raise UserError(f"{folder}: there is no such directory; name the directory that training or launch/export.py wrote")
        return [[folder, *options.passed_on] for folder in options.what], [Path(folder).resolve().name for folder in options.what]
    tasks, names, folders = [], [], {}
    if len(options.what) > 1 and options.run_dir:
        raise UserError(f"--run-dir {options.run_dir} would hold several runs; leave it away, each recipe has its own run.dir")
    for file in options.what:
        for seed in options.seeds or [None]:
            values = [*options.set, *([f"run.seed={seed}", f"data.plan.seed={seed}"] if seed is not None else [])]
            recipe = load_recipe(file, values)
            try:
                check_lanes(recipe.data.plan.lanes, ranks)
            except UserError as error:
                raise UserError(f"{file}: {error}") from None
            ending = f"-seed{seed}" if seed is not None else ""
            folder = f"{run_directory(recipe, options.run_dir)}{ending}"
            if folder in folders:
                raise UserError(f"{folders[folder]} and {file} would write to the same run directory {folder}; give them other names or another run.dir")
            folders[folder] = file
            names.append(recipe.name + ending)
            tasks.append([file, *(word for value in values for word in ("--set", value)), "--run-dir", folder, *options.passed_on])
    return tasks, names


def exports_of(options: argparse.Namespace, header: Header) -> dict[str, str]:
    """The variables that node.sh and pretrain.sbatch read."""
    accelerate = Path(options.accelerate or "launch/accelerate/ddp.yaml")
    if not (ROOT / accelerate).is_file():
        there = ", ".join(sorted(file.name for file in (ROOT / "launch/accelerate").glob("*.yaml")))
        raise UserError(f"--accelerate {accelerate}: there is no such file; launch/accelerate holds {there}")
    trains_on_cpus = accelerate.name.startswith("cpu")
    if accelerate.parent.name == "accelerate" and trains_on_cpus == (header.gpus is not None):
        fix = "add --gpus-per-node 0" if trains_on_cpus else "choose one of launch/accelerate/cpu*.yaml with --accelerate"
        raise UserError(
            f"--accelerate {accelerate} trains on {'CPUs' if trains_on_cpus else 'GPUs'}, but the job asks for {f'GPUs ({header.gpus})' if header.gpus else 'no GPUs'}; {fix}"
        )
    if options.environment and not re.fullmatch(r"(venv|conda|apptainer):.+", options.environment):
        raise UserError(f"--environment {options.environment}: write venv:FOLDER, conda:NAME or apptainer:IMAGE")
    values = {"PROTOCLIP_ACCELERATE": options.accelerate, "PROTOCLIP_ENVIRONMENT": options.environment, "PROTOCLIP_RANKS_PER_NODE": options.ranks_per_node}
    return {"PROTOCLIP_LOGS": LOGS} | {name: str(value) for name, value in values.items() if value is not None}


def script_of(options: argparse.Namespace) -> tuple[str, str]:
    """The name of the job, and the filled-in script."""
    source = f"launch/slurm/{'evaluate' if options.evaluate else 'pretrain'}.sbatch"
    template = (ROOT / source).read_text(encoding="utf-8")
    header = Header(template)
    for key in ("nodes", "time", "partition", "account", "qos"):
        header.set(key, getattr(options, key))
    header.set("gpus-per-node", options.gpus_per_node)
    if options.gpus_per_node == 0:
        del header.options["gpus-per-node"]
    for option in options.sbatch:
        header.add(option)
    if (header.options.get("gres") or "").startswith("gpu") and not options.gpus_per_node:
        header.options.pop("gpus-per-node", None)  # of a cluster that knows GPUs by --gres alone
    exports = exports_of(options, header)
    per_node = options.ranks_per_node or (header.gpus_per_node if header.gpus else 1)
    tasks, names = tasks_of(options, header.nodes * per_node)
    name = options.job_name or (names[0] if len(names) == 1 else f"{names[0]}-and-{len(names) - 1}-more")
    if "/" in name:  # it names files, too
        raise UserError(f"--job-name {name}: leave out slashes")
    header.set("job-name", name)
    is_array = len(tasks) > 1
    if is_array:
        header.set("array", f"0-{len(tasks) - 1}" + (f"%{options.at_once}" if options.at_once else ""))
    elif options.at_once:
        raise UserError(f"--at-once {options.at_once} has no effect: there is one job; name several recipes or --seeds")
    header.set("output", f"{LOGS}/%x-{'%A_%a' if is_array else '%j'}.out")
    chosen = _choice(tasks) if is_array else [f"set -- {shlex.join(tasks[0])}"]
    body = template[template.index("set -euo pipefail") :]
    lines = [
        "#!/usr/bin/env bash",
        f"# {source}, filled in by launch/slurm/submit.py",
        *header.lines(),
        *(f"export {key}={shlex.quote(value)}" for key, value in exports.items()),
        *chosen,
        "",
    ]
    return name, "\n".join(lines) + body


def _choice(tasks: list[Task]) -> list[str]:
    """The arguments of each job of an array."""
    return ["case $SLURM_ARRAY_TASK_ID in", *(f"    {number}) set -- {shlex.join(task)} ;;" for number, task in enumerate(tasks)), "esac"]


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, or 1 for the user's error in one line, or sbatch's own."""
    try:
        options = parse(arguments)
        if Path.cwd() != ROOT:
            raise UserError(f"run it in {ROOT}, where the job will start: paths in it are relative to that folder")
        name, script = script_of(options)
    except UserError as error:
        print(redact_text(f"error: {error}"), file=sys.stderr)
        return 1
    file = Path(LOGS) / f"{name}.sbatch"
    print(redact_text(f"{script}\n# sbatch {file}"), flush=True)
    if not options.submit:
        print(f"printed only: with --submit it is written to {file}, and the last line is run", file=sys.stderr)
        return 0
    if shutil.which("sbatch") is None:
        print("error: there is no sbatch here: submit from a login node of the cluster", file=sys.stderr)
        return 1
    file.parent.mkdir(exist_ok=True)  # Slurm does not make the folder of a job's log
    file.unlink(missing_ok=True)
    with open(file, "x", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:  # what --set gave may be a secret
        stream.write(script)
    return subprocess.run(["sbatch", str(file)]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
