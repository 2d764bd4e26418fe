"""Evaluate a run or an export: ``accelerate launch launch/evaluate.py --model runs/demo``."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.errors import UserError
from protoclip_scale.redact import redact_errors

RECIPE = "recipe"


class Candidate(NamedTuple):
    """A model to evaluate, its settings (``schema.Model``), and if it is a run's: its step, its own suite, and whether its weights are live or ema."""

    name: str
    step: int | None
    model: Any
    settings: Any
    own_suite: Any
    weights: str | None


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Zero-shot, retrieval, linear-probe and modality figures of a trained model.")
    parser.add_argument("--model", required=True, metavar="DIR", help="run directory, or an open_clip export")
    parser.add_argument("--checkpoint", default="latest", metavar="STEP|latest|all", help="which checkpoints of a run (default: latest)")
    parser.add_argument("--weights", choices=("live", "ema"), help="of a run: those that train, or their average (default: the average, if optim.ema kept one)")
    parser.add_argument("--suite", default=RECIPE, metavar="FILE", help="YAML file with the content of a recipe's `evaluation:` section, files relative to it (default: recipe, the run's own sets)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="arithmetic of the towers (default: fp32)")
    parser.add_argument("--expect-ranks", type=int, metavar="N", help="fail unless exactly N ranks run")
    parser.add_argument("--out", metavar="FILE.json", help="also write the figures as JSON")
    return parser.parse_args(arguments)


def candidates(folder: Path, checkpoint: str, weights: str | None) -> Iterator[Candidate]:
    """The chosen checkpoints of a run, oldest first, or the one model of an export; each is loaded when its turn comes. ``weights``: live, ema or None."""
    from protoclip_scale import collectives
    from protoclip_scale.engine.checkpoint import find, list_checkpoints
    from protoclip_scale.engine.saved_model import load_model
    from protoclip_scale.evaluation.suites import suite_of_recipe
    from protoclip_scale.models.build import load_open_clip_export

    if (folder / "open_clip_config.json").is_file():
        if checkpoint != "latest":
            raise UserError(f"--checkpoint {checkpoint}: {folder} is an export, which holds one model; leave --checkpoint away")
        if weights:
            raise UserError(f"--weights {weights}: {folder} is an export, which holds one model; leave --weights away")
        settings, model = load_open_clip_export(folder)
        yield Candidate(folder.name, None, model, settings, None, None)
        return
    if not (folder / "checkpoints").is_dir():
        what = "is neither a run directory (no checkpoints/) nor an open_clip export (no open_clip_config.json)" if folder.is_dir() else "does not exist"
        raise UserError(f"--model {folder} {what}; name the directory that training or launch/export.py wrote")
    # Rank 0 chooses: a run that is still training may publish between two ranks' looks.
    found = collectives.from_rank_zero(lambda: list_checkpoints(folder) if checkpoint == "all" else [find(folder, checkpoint)[0]])
    if not found:
        raise UserError(f"--model {folder}: it holds no checkpoint yet; train it first")
    for path in found:
        step = int(path.name.removeprefix("step-"))
        recipe, model, kind = load_model(folder, str(step), weights)
        yield Candidate(f"{recipe.name}, step {step}{', averaged weights' if kind == 'ema' else ''}", step, model, recipe.model, suite_of_recipe(recipe), kind)


def show(name: str, figures: dict[str, float], untrained: dict[str, float]) -> None:
    """One table per held-out set, and a line for images that could not be decoded."""
    from rich.console import Console
    from rich.table import Table

    from protoclip_scale.report.evaluation_table import evaluation_rows

    console = Console()
    for title, rows in evaluation_rows(figures, untrained).items():
        table = Table(title=f"{title} ({name})", title_justify="left")
        for column in ("figure", "model", "untrained", "best constant or chance"):
            table.add_column(column, justify="left" if column == "figure" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False)
    for key, value in figures.items():
        if key.endswith("/undecodable") and value:
            console.print(f"warning: {key.removesuffix('/undecodable')}: {value} images could not be decoded and are left out", markup=False)


def run(options: argparse.Namespace) -> None:
    from protoclip_scale import collectives
    from protoclip_scale.data.tokenizers import tokenizer_for
    from protoclip_scale.engine import strategy
    from protoclip_scale.evaluation.run import evaluate_suite
    from protoclip_scale.evaluation.suites import suite_of_file
    from protoclip_scale.files import publish_json

    folder = Path(options.model).expanduser()
    suite = None if options.suite == RECIPE else suite_of_file(options.suite)
    accelerator = strategy.start(timeout_minutes=30)
    if options.expect_ranks and options.expect_ranks != collectives.world_size():
        raise UserError(f"--expect-ranks {options.expect_ranks}, but {collectives.world_size()} ranks run; check the launch line")
    results = []
    for candidate in candidates(folder, options.checkpoint, options.weights):
        chosen = suite or candidate.own_suite
        if chosen is None:
            raise UserError(f"--suite: {folder} is an export and has no sets of its own; name a YAML file with what stands under `evaluation:` in a recipe")
        if not chosen.evaluation.sets:
            raise UserError(f"--suite: the recipe of {folder} has no evaluation.sets; name a YAML file with some")
        tokenizer = tokenizer_for(candidate.settings.text)
        figures = evaluate_suite(candidate.model.to(accelerator.device), chosen, candidate.settings.image.size, tokenizer, accelerator.device, options.precision)
        results.append({"model": candidate.name, "step": candidate.step, "weights": candidate.weights, "figures": figures})
        if collectives.rank() == 0:
            untrained = folder / "baseline.json"
            show(candidate.name, figures, json.loads(untrained.read_text()) if suite is None and untrained.is_file() else {})
    if options.out and collectives.rank() == 0:
        try:
            publish_json(Path(options.out), {"folder": str(folder), "suite": options.suite, "precision": options.precision, "results": results})
        except OSError as error:
            raise UserError(f"--out {options.out}: cannot be written ({error}); choose another file") from error
    accelerator.end_training()


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 the user's error, in one line."""
    redact_errors()
    try:
        run(parse(arguments))
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
