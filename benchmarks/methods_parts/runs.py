"""One training process and one evaluation process for each method and seed; what is done is not done again, what was killed goes on."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from methods_parts.corpus import CLASSES, JUDGED, SETS
from methods_parts.recipes import ROOT, same, seeded, write_recipe
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import load_recipe

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
MEASURED = ROOT / "benchmarks" / "overhead_parts" / "measured.py"  # launch/pretrain.py's command, with processor seconds of its phases
NOT_TRAINING = ("evaluate",)
ABOVE_IMPORTS = re.compile(r"(\d+\.\d+) GB of the peak memory are above what imports take")
ZERO_SHOT, PROBE, RECALL = f"{JUDGED}/zero_shot{{tokens}}/{CLASSES}/top1", f"{JUDGED}/probe{{tokens}}/{CLASSES}/top1", "{name}/retrieval{tokens}/mean_recall"


@dataclass(frozen=True)
class Result:
    """Of one run. Accuracies and recalls in per cent, None before its evaluation; ``seconds``: processor time of all phases but evaluation, None for a run that was interrupted;
    ``tokens``: whether its figures are those of late interaction, because the run has no others."""

    samples: int
    seconds: float | None
    peak_gb: float | None
    zero_shot: float | None = None
    mean_recall: float | None = None
    probe: float | None = None
    tokens: bool = False
    recalls: dict[str, float] | None = None


@dataclass(frozen=True)
class Bench:
    """The work folder: METHOD-SEED are run directories, ``results`` holds what was measured about them, ``logs`` what they printed."""

    folder: Path
    corpus: Path
    episodes: int
    extra: dict

    def run_dir(self, method: str, seed: int) -> Path:
        return self.folder / f"{method}-{seed}"

    def _result(self, method: str, seed: int, kind: str) -> Path:
        return self.folder / "results" / f"{method}-{seed}-{kind}.json"

    def recipe(self, method: str) -> Path:
        """Written anew: another code version's recipe is refused by ``trained`` and on resume."""
        return write_recipe(method, self.corpus, self.episodes, self.extra, self.folder / "recipes")

    def trained(self, method: str, seed: int) -> bool:
        """UserError if the finished run is of other settings."""
        status = self.run_dir(method, seed) / "status.json"
        if not status.exists() or json.loads(status.read_text())["state"] != "done":
            return False
        if not same(load_recipe(status.with_name("recipe.yaml")), load_recipe(self.recipe(method), seeded(seed))):
            raise UserError(f"{status.parent} is a finished run with other settings; remove it, or use another --out")
        return True

    def train(self, method: str, seed: int) -> None:
        """Unless it is done."""
        if self.trained(method, seed):
            return
        recipe = self.recipe(method)
        if "teacher" in load_recipe(recipe).objectives:
            self._make_teacher(recipe)
        cost = self._result(method, seed, "cost")
        cost.unlink(missing_ok=True)
        settings = [argument for value in seeded(seed) for argument in ("--set", value)]
        self._process(f"{method}-{seed}", MEASURED, cost, "--recipe", recipe, "--run-dir", self.run_dir(method, seed), "--resume", "auto", "--expect-ranks", 1, *settings)

    def evaluate(self, method: str, seed: int) -> None:
        """Unless it is not trained, or evaluated."""
        out = self._result(method, seed, "evaluation")
        if not out.exists() and self.trained(method, seed):
            model, suite = self.run_dir(method, seed), self.corpus / "suite.yaml"
            self._process(f"{method}-{seed}-evaluation", ROOT / "launch" / "evaluate.py", "--model", model, "--suite", suite, "--expect-ranks", 1, "--out", out)

    def result(self, method: str, seed: int) -> Result | None:
        """None before the run is done."""
        if not self.trained(method, seed):
            return None
        run = self.run_dir(method, seed)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        cost, memory = self._result(method, seed, "cost"), ABOVE_IMPORTS.findall((run / "log.txt").read_text())
        whole = cost.exists() and json.loads((run / "status.json").read_text())["attempt"] == 1
        phases = json.loads(cost.read_text())["phases"] if whole else {}
        seconds = sum(value for phase, value in phases.items() if phase not in NOT_TRAINING) if whole else None
        evaluation = self._result(method, seed, "evaluation")
        figures = _chosen(json.loads(evaluation.read_text())["results"][-1]["figures"]) if evaluation.exists() else {}
        return Result(max(line["samples"] for line in lines), seconds, float(memory[-1]) if memory else None, **figures)

    def _make_teacher(self, recipe: Path) -> None:
        out = self.corpus / "teacher"
        if not (out / "manifest.json").exists():
            self._process("teacher", ROOT / "tools" / "extract_teacher.py", "--recipe", recipe, "--model", "minilm", "--caption", "first", "--dim", 64, "--out", out)

    def _process(self, name: str, script: Path, *arguments) -> None:
        """UserError with its last line if it fails."""
        log = self.folder / "logs" / f"{name}.txt"
        for folder in (log.parent, self.folder / "results"):
            folder.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            code = subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=ROOT, env=os.environ | ONE_THREAD, stdout=output, stderr=subprocess.STDOUT).returncode
        if code:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{name} ended with code {code} ({''.join(last)[:300]}); see {log}")


def _chosen(figures: dict[str, float]) -> dict:
    """A ``Result``'s figures out of an evaluation's: those of whole embeddings, or of tokens where a model has no others."""
    tokens = "" if ZERO_SHOT.format(tokens="") in figures else "_tokens"
    recalls = {name: 100 * figures[RECALL.format(name=name, tokens=tokens)] for name in SETS}
    chosen = {"zero_shot": ZERO_SHOT, "probe": PROBE}
    return {
        **{key: 100 * figures[pattern.format(tokens=tokens)] for key, pattern in chosen.items()},
        "mean_recall": sum(recalls.values()) / len(recalls),
        "recalls": recalls,
        "tokens": bool(tokens),
    }
