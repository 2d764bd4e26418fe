"""Make the sets of an evaluation suite: fetch what can be fetched, convert what you have downloaded, check its size, and say what is missing.

    python tools/prepare_evaluation.py protoclip10 --out data/evaluation
    python tools/prepare_evaluation.py robustness --only objectnet --source objectnet=FOLDER
    python tools/prepare_evaluation.py protoclip10 --only cifar10 --source cifar10=hf:uoft-cs/cifar10

Each set becomes OUT/SET/shard-*.parquet with image bytes, captions or class names. Run the same line again to go on after a kill. docs/evaluation.md lists the suites.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.errors import UserError  # noqa: E402
from protoclip_scale.redact import redact_errors  # noqa: E402


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/prepare_evaluation.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", help="a suite of the package, a YAML file of yours with tasks in it, or one task")
    parser.add_argument("--out", default="data/evaluation", metavar="DIR", help="data folder (default: data/evaluation, where launch/evaluate.py looks)")
    parser.add_argument("--only", nargs="+", metavar="SET", help="only these sets")
    parser.add_argument("--source", action="append", default=[], metavar="SET=FOLDER", help="what you have downloaded, or hf:ORG/NAME for a dataset of the Hub; may be repeated")
    parser.add_argument("--allow-subset", action="store_true", help="write sets that have another number of rows or captions than they must")
    parser.add_argument("--retry-seconds", type=float, default=300.0, metavar="S", help="how long downloads are tried again (default: 300)")
    return parser.parse_args(arguments)


def tasks_of(options: argparse.Namespace) -> list[str]:
    """The tasks to prepare, each once."""
    from protoclip_scale.evaluation.suites import suite_of
    from protoclip_scale.evaluation.tasks import suite_names, task_names
    from protoclip_scale.recipe.names import nearest

    if options.suite in task_names() and options.suite not in suite_names():
        tasks = [options.suite]
    else:
        tasks = list(dict.fromkeys(held_out.task for held_out in suite_of(options.suite, options.out).evaluation.sets if held_out.task))
    for name in (*(options.only or ()), *(source.partition("=")[0] for source in options.source)):
        if name not in tasks:
            raise UserError(f"{name!r} is no set of {options.suite}{nearest(name, tasks)}")
    return [task for task in tasks if not options.only or task in options.only]


def run(options: argparse.Namespace) -> int:
    from protoclip_scale.preparation.held_out.prepare import Options, prepare

    wrong = next((source for source in options.source if not all(source.partition("="))), None)
    if wrong:
        raise UserError(f"--source {wrong}: write SET=FOLDER")
    settings = Options(Path(options.out).expanduser(), dict(source.split("=", 1) for source in options.source), options.allow_subset, retry_seconds=options.retry_seconds)
    tasks, missing = tasks_of(options), []
    for task in tasks:
        try:
            print(f"{task}: ready, {prepare(task, settings, print):,} rows in {settings.out / task}", flush=True)
        except UserError as error:
            missing.append(task)
            print(error, flush=True)
    if missing:
        raise UserError(f"{len(missing)} of {len(tasks)} sets are not ready: {', '.join(missing)}; see the lines above")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 all sets are ready, 1 some are not, in one line each."""
    redact_errors()
    try:
        return run(parse(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
