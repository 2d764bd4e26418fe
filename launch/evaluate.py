"""Evaluate a model: ``accelerate launch launch/evaluate.py --model runs/demo --suite protoclip10``. See docs/evaluation.md."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.errors import UserError
from protoclip_scale.redact import redact_errors

RECIPE = "recipe"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Zero-shot, retrieval, probe and modality figures of a trained model.")
    parser.add_argument("--model", required=True, help="run directory, export, open_clip:NAME[:PRETRAINED], folder of transformers with a CLIP, or hf:ORG/NAME")
    parser.add_argument("--checkpoint", default="latest", metavar="STEP|latest|all", help="which checkpoints of a run (default: latest)")
    parser.add_argument("--weights", choices=("live", "ema"), help="of a run: those that train, or their average (default: the average, if optim.ema kept one)")
    parser.add_argument("--suite", default=RECIPE, metavar="NAME|FILE", help="a suite of the package (docs/evaluation.md), or a YAML file with the content of a recipe's `evaluation:` section, files relative to it (default: recipe, the run's own sets)")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="only these sets of the suite; there is no average then")
    parser.add_argument("--data", default="data/evaluation", metavar="DIR|URL", help="where tools/prepare_evaluation.py put the sets of the package's suites (default: data/evaluation)")
    parser.add_argument("--prompts", choices=("names", "single", "ensemble"), help="for all sets: bare class names, one template, or each set's ensemble (default: as the suite says, ensemble if it does not)")
    parser.add_argument("--classifiers", metavar="DIR", help="keep text classifiers here, and use those that are there: texts are encoded once for each text tower")
    parser.add_argument("--allow-subset", action="store_true", help="evaluate sets that hold another number of rows or captions than they must; the result says so")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="arithmetic of the towers (default: fp32)")
    parser.add_argument("--expect-ranks", type=int, metavar="N", help="fail unless exactly N ranks run")
    parser.add_argument("--out", metavar="FILE.json", help="also write figures and how they came about as JSON")
    parser.add_argument("--csv", metavar="FILE.csv", help="also write the figures as CSV: model, step, weights, key, value")
    return parser.parse_args(arguments)


def show(name: str, figures: dict[str, float], untrained: dict[str, float], average: str) -> None:
    """One table per held-out set, the suite's average, and a line for images that could not be decoded."""
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
    if average in figures:
        console.print(f"{average} ({name}): {figures[average]:.1%}", markup=False)
    for key, value in figures.items():
        if key.endswith("/undecodable") and value:
            console.print(f"warning: {key.removesuffix('/undecodable')}: {value} images could not be decoded and are left out", markup=False)


def asked_suite(options: argparse.Namespace) -> Any:
    """The suite of the command line; None for the run's own."""
    from protoclip_scale.evaluation.suites import suite_of

    return None if options.suite == RECIPE else adapted(suite_of(options.suite, options.data), options)


def adapted(suite: Any, options: argparse.Namespace) -> Any:
    """A suite with what the command line changes in it."""
    from dataclasses import replace

    from protoclip_scale.evaluation.suites import chosen, with_prompts

    suite = chosen(suite, options.sets) if options.sets else suite
    suite = with_prompts(suite, options.prompts) if options.prompts else suite
    return replace(suite, allow_subset=options.allow_subset)


def suite_for(candidate: Any, asked: Any, options: argparse.Namespace) -> Any:
    """The asked suite or the candidate's own."""
    if asked is not None:
        return asked
    if candidate.own_suite is None:
        raise UserError(f"--suite: {options.model} is an export and has no sets of its own; name a suite of the package, or a YAML file with what stands under `evaluation:` in a recipe")
    if not candidate.own_suite.evaluation.sets:
        raise UserError(f"--suite: the recipe of {options.model} has no evaluation.sets; name a suite of the package, or a YAML file with some")
    return adapted(candidate.own_suite, options)


def run(options: argparse.Namespace) -> None:
    from protoclip_scale import collectives
    from protoclip_scale.engine import strategy
    from protoclip_scale.evaluation.classifiers import ClassifierFiles, model_hash
    from protoclip_scale.evaluation.models import load_any
    from protoclip_scale.evaluation.provenance import provenance
    from protoclip_scale.evaluation.results import check_places, write_csv, write_json
    from protoclip_scale.evaluation.run import evaluate_suite

    asked = asked_suite(options)
    accelerator = strategy.start(timeout_minutes=30)
    if options.expect_ranks and options.expect_ranks != collectives.world_size():
        raise UserError(f"--expect-ranks {options.expect_ranks}, but {collectives.world_size()} ranks run; check the launch line")
    collectives.from_rank_zero(lambda: check_places(options.out, options.csv))
    results = []
    for candidate in load_any(options.model, options.checkpoint, options.weights):
        suite = suite_for(candidate, asked, options)
        files = ClassifierFiles(options.classifiers, model_hash(candidate.model, candidate.tokenizer, options.precision)) if options.classifiers else None
        model = candidate.model.to(accelerator.device)
        about = suite, candidate.preprocessing, candidate.tokenizer, accelerator.device, options.precision
        figures = evaluate_suite(model, *about, classifiers=files, compared=candidate.compared)
        sets = provenance(suite, figures, candidate.preprocessing, options.precision)
        results.append({"model": candidate.name, "step": candidate.step, "weights": candidate.weights, "figures": figures, "sets": sets})
        if collectives.rank() == 0:
            untrained = Path(options.model).expanduser() / "baseline.json"
            show(candidate.name, figures, json.loads(untrained.read_text()) if asked is None and untrained.is_file() else {}, f"{suite.name}/average")
    if collectives.rank() == 0:
        if options.out:
            write_json(options.out, {"folder": options.model, "suite": options.suite, "precision": options.precision, "results": results})
        if options.csv:
            write_csv(options.csv, results)
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
