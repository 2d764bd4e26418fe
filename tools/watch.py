"""Follow a run and evaluate each of its checkpoints once, as training publishes them.

    python tools/watch.py runs/demo --until-done

It may be started before training, on another machine that sees the run directory, or under `accelerate launch` with several processes. Figures go to RUN_DIR/evaluation.csv
(columns step, samples, attempt, key, value), all figures of a checkpoint at once. When it is stopped or killed, start it again: it goes on with what is missing. A checkpoint that
retention deletes first is told of, a damaged one is skipped with a warning, one of a step that was trained again is evaluated again (its attempt is another).
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.errors import UserError  # noqa: E402
from protoclip_scale.redact import redact_errors  # noqa: E402

RECIPE = "recipe"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/watch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's directory; it need not be there yet")
    parser.add_argument("--suite", default=RECIPE, metavar="NAME|FILE", help="a suite of the package or a YAML file (default: recipe, the run's own sets, as the recipe says at that time)")
    parser.add_argument("--data", default=".", metavar="DIR", help="where the files of a suite of the package are (default: here)")
    parser.add_argument("--weights", choices=("live", "ema"), help="those that train, or their average (default: the average, if optim.ema kept one)")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|N", help="auto: the GPU, if there is one; cpu; or the number of a GPU (default: auto)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="arithmetic of the towers (default: fp32)")
    parser.add_argument("--poll", type=float, default=10.0, metavar="SECONDS", help="how often to look for a new checkpoint (default: %(default)s)")
    parser.add_argument("--until-done", action="store_true", help="end when the run is done, or has failed for good, and all its checkpoints are evaluated (default: wait for ever)")
    arguments = parser.parse_args(argv)
    if arguments.poll <= 0:
        raise UserError(f"--poll {arguments.poll:g}: must be more than 0 seconds")
    return arguments


def choose_device(device: str) -> None:
    """Before CUDA is asked for anything. UserError for what is no device, or one for all of several processes."""
    if device == "auto":
        return
    if device != "cpu" and not device.isdigit():
        raise UserError(f"--device {device}: is neither auto, cpu nor the number of a GPU")
    if device != "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--device {device}: several processes run, and each takes a GPU of its own; leave it away")
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device


def watch(arguments: argparse.Namespace) -> None:
    choose_device(arguments.device)
    from protoclip_scale.engine import strategy
    from protoclip_scale.evaluation.follow import Follower, Options
    from protoclip_scale.evaluation.suites import suite_of, suite_of_recipe

    accelerator = strategy.start(timeout_minutes=30)
    if arguments.device.isdigit() and accelerator.device.type == "cpu":
        raise UserError(f"--device {arguments.device}: this machine shows no such GPU")
    named = None if arguments.suite == RECIPE else suite_of(arguments.suite, arguments.data)
    label = RECIPE if named is None else Path(arguments.suite).stem
    options = Options(lambda recipe: named or suite_of_recipe(recipe), label, arguments.weights, arguments.precision, arguments.poll, arguments.until_done)
    folder = Path(arguments.run_dir).expanduser()
    count = Follower(folder, options, accelerator.device, lambda line: print(line, flush=True)).follow()
    if accelerator.is_main_process:
        print(f"{folder} is over; evaluated {count} checkpoints, see {folder / 'evaluation.csv'}", flush=True)
    accelerator.end_training()


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 the run is over, 1 the user's error, in one line, 130 interrupted."""
    redact_errors()
    try:
        watch(parse_arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped; start it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
