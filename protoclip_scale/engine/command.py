"""``launch/pretrain.py``: arguments, exit codes, and what a user reads when something is wrong."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from protoclip_scale.errors import STOPPED_EXIT_CODE, LostRank, Stopped, UserError
from protoclip_scale.recipe import Recipe, load_recipe
from protoclip_scale.recipe.describe import help_text
from protoclip_scale.redact import redact_errors, stars_in


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/pretrain.py", description="Pretrain an image-text model from a recipe.", add_help=False)
    parser.add_argument("--recipe", metavar="FILE", help="recipe YAML")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one key, for instance optim.lr=1e-3; may be repeated")
    parser.add_argument("--run-dir", metavar="DIR", help="where the run is written (default: the recipe's run.dir)")
    parser.add_argument("--resume", default="auto", metavar="auto|never|CHECKPOINT", help="auto goes on with a run found in the run directory")
    parser.add_argument("--extend", action="store_true", help="let schedule.total differ from the run that is resumed")
    parser.add_argument("--expect-ranks", type=int, metavar="N", help="fail unless exactly N ranks run")
    parser.add_argument("--check", action="store_true", help="train nothing; print what would be run and every problem found")
    parser.add_argument("--memory-per-rank", metavar="SIZE", help="with --check: what a rank's device holds, for instance 80GB, where that is another one than this machine's; --expect-ranks says how many ranks")
    parser.add_argument("--fetch", action="store_true", help="with --check: first cache the models and tokenizers that the recipe names, so that jobs need no network")
    parser.add_argument("--help", "-h", nargs="?", const="", metavar="SECTION", help="this text, or the keys of a recipe's section")
    options = parser.parse_args(arguments)
    if options.help is not None:
        if options.help == "":
            parser.print_help()
            print()
        print(help_text(options.help or None))
        raise SystemExit(0)
    if not options.recipe:
        raise UserError("--recipe is missing: name a recipe, for instance --recipe recipes/demo.yaml")
    return options


def run_directory(recipe: Recipe, chosen: str | None) -> Path:
    return Path(chosen or recipe.run.dir.format(name=recipe.name)).absolute()


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 the user's error (one line), 75 stopped by a signal after a checkpoint was saved."""
    redact_errors()
    folder: Path | None = None
    try:
        options = parse(arguments)
        recipe = load_recipe(options.recipe, options.set)
        if options.fetch and not options.check:
            raise UserError("--fetch has no effect without --check; add it, on a machine with a network")
        if options.memory_per_rank and not options.check:
            raise UserError("--memory-per-rank has no effect without --check; add it, or leave it away")
        if options.fetch:
            from protoclip_scale.engine.prefetch import fetch

            fetch(recipe)
        if options.check:
            from protoclip_scale.engine.check import run_check
            from protoclip_scale.engine.memory import parse_size

            if options.run_dir:
                recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": options.run_dir})})
            memory = parse_size(options.memory_per_rank) if options.memory_per_rank else None
            return 1 if run_check(recipe, options.expect_ranks or int(os.environ.get("WORLD_SIZE", "1")), memory, options.recipe) else 0
        if key := stars_in(recipe):
            raise UserError(f"{options.recipe}: {key} holds ***, which stands for a secret that was not written down; give the value again, with --set {key}=...")
        folder = run_directory(recipe, options.run_dir)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost connection is told with pages of C++ frames
        from protoclip_scale.engine.run import pretrain  # torch and its libraries load only now: a typing mistake is told at once

        return pretrain(recipe, folder, options)
    except LostRank as error:
        if error.speaks:
            print(f"error: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # taking the process group down would wait for the rank that is lost
    except UserError as error:
        return _tell(error, folder if error.told else None)
    except Stopped:
        return STOPPED_EXIT_CODE


def _tell(error: UserError, folder: Path | None) -> int:
    """One line on the error stream: rank 0's, or another rank's own if the run has failed for another reason. Before there is a
    run all ranks meet the same error, or those of one machine do: then its first rank tells it."""
    message, rank = str(error), int(os.environ.get("RANK", "0"))
    if rank and not (error.of_this_host and os.environ.get("LOCAL_RANK") == "0"):
        time.sleep(1)
        status = folder / "status.json" if folder else None
        if status is None or (status.exists() and json.loads(status.read_text(encoding="utf-8"))["message"] == message):
            return 1
    print(f"error: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr, flush=True)
    return 1
