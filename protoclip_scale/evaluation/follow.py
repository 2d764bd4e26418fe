"""Evaluate every checkpoint of a run that may still be training, each once: beside training, on another machine or after a restart."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from protoclip_scale import collectives
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.engine.checkpoint import folder_of, list_checkpoints
from protoclip_scale.engine.checkpoint import manifest as manifests
from protoclip_scale.engine.checkpoint.finding import step_of
from protoclip_scale.engine.faults import event
from protoclip_scale.engine.saved_model import load_model, recipe_of
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation import figures_csv, provenance
from protoclip_scale.evaluation.pixels import own_preprocessing
from protoclip_scale.evaluation.run import evaluate_suite
from protoclip_scale.evaluation.suites import Suite
from protoclip_scale.objectives.compared import compared_by
from protoclip_scale.recipe.schema import Recipe
from protoclip_scale.report.evaluation_table import evaluation_lines

SCHEDULE = {"every_episodes", "every_steps"}  # of training; they change no figure


class Found(NamedTuple):
    """A published checkpoint. ``digest``: of its manifest, which names all its files with theirs; hexadecimal, cut as in evaluation.csv."""

    step: int
    samples: int
    attempt: int
    digest: str


class Options(NamedTuple):
    """``suite``: of a recipe, as it is now. ``suite_name``: in evaluation.csv. ``weights``: live, ema, or None for the averaged ones if there are any."""

    suite: Callable[[Recipe], Suite]
    suite_name: str
    weights: str | None
    precision: str
    poll: float
    until_done: bool


def published(run_dir: Path) -> list[Found]:
    """Checkpoints, oldest first. One without a manifest is not there yet, or not any more; one whose manifest cannot be read is damaged, and is told of by who loads it."""
    found = []
    for folder in list_checkpoints(run_dir):
        try:
            content = (folder / manifests.NAME).read_bytes()
        except OSError:
            continue
        try:
            manifest = json.loads(content)
            samples, attempt = int(manifest["samples"]), int(manifest["attempt"])
        except (ValueError, KeyError, TypeError):
            samples = attempt = 0
        found.append(Found(step_of(folder.name), samples, attempt, hashlib.sha256(content).hexdigest()[: figures_csv.DIGITS]))
    return found


class Follower:
    """Looks and evaluates; ``tell`` is given lines to show. Rank 0 looks for all."""

    def __init__(self, run_dir: Path, options: Options, device: torch.device, tell: Callable[[str], None]):
        self.run_dir, self.options, self.device, self._tell = run_dir, options, device, tell
        self._waiting: set[Found] = set()  # seen, not evaluated yet
        self._skipped: set[Found] = set()
        self._missed: set[int] = set()
        self._log = _Published(run_dir / "metrics.jsonl")
        self._told_to_wait = False

    def follow(self) -> int:
        """Until the run is done, with ``until_done``, or for ever; how many checkpoints were evaluated. A collective."""
        evaluated = 0
        while True:
            found, is_over = collectives.from_rank_zero(self._look)
            if found:
                evaluated += self._evaluate(found)
            elif is_over and self.options.until_done:
                return evaluated
            else:
                time.sleep(self.options.poll)

    def _look(self) -> tuple[Found | None, bool]:
        """The oldest checkpoint that is still to be evaluated, the first that retention takes; and whether the run had ended before this look."""
        if not (self.run_dir / "recipe.yaml").is_file():
            if not self._told_to_wait:
                self._told_to_wait = True
                self._tell(f"waiting for a run in {self.run_dir}")
            return None, False
        is_over = _is_over(self.run_dir)
        logged = self._log.steps()
        there = published(self.run_dir)
        marks = figures_csv.read(self.run_dir)[1]
        name = self._suite_name(self._suite())
        done = {(mark.step, mark.attempt, mark.digest) for mark in marks if mark.suite == name}
        self._tell_of_deleted({each.step for each in there}, {step for step, *_ in done}, logged, set(there))
        self._waiting = {each for each in there if (each.step, each.attempt, each.digest) not in done} - self._skipped
        return min(self._waiting, default=None), is_over

    def _tell_of_deleted(self, steps_there: set[int], steps_done: set[int], logged: set[int], there: set[Found]) -> None:
        """Checkpoints that were faster gone than evaluated: seen here before, or only ever named in the run's log. What a resumed run has set aside is none."""
        aside = {step_of(path.name.partition("-step-")[2]) for path in (self.run_dir / "checkpoints").glob("discarded-*-step-*[0-9]")}
        missed = ({each.step for each in self._waiting - there} - aside) | (logged - steps_there - steps_done - {each.step for each in self._skipped})
        if new := sorted(missed - self._missed):
            self._missed |= missed
            self._tell(
                f"warning: deleted before they were evaluated: step {', '.join(map(str, new))}; this watch began late, or retention is faster: "
                "raise run.keep_checkpoints, set run.keep_every_steps, or choose a smaller suite"
            )

    def _suite(self) -> Suite:
        suite = self.options.suite(recipe_of(self.run_dir))
        if not suite.evaluation.sets:
            raise UserError(f"{self.run_dir}: its recipe has no evaluation.sets; name a suite with --suite")
        return suite

    def _suite_name(self, suite: Suite) -> str:
        """Another content of the suite makes other figures: all checkpoints that are there are evaluated by it."""
        about = suite.evaluation.model_dump_json(exclude=SCHEDULE) + suite.root + str(self.options.weights) + self.options.precision
        return f"{self.options.suite_name}@{hashlib.sha256(about.encode()).hexdigest()[:8]}"

    def _evaluate(self, found: Found) -> bool:
        """Whether its figures are in evaluation.csv now; a collective."""
        began, problem, saved = time.monotonic(), None, None
        try:
            saved = load_model(self.run_dir, str(found.step), self.options.weights)
        except (UserError, OSError) as error:
            problem = str(error)
        problems = [each for each in collectives.all_gather_objects(problem) if each]
        if not collectives.from_rank_zero(lambda: self._was_read(found, problems)):
            return False
        suite = self._suite()
        model = saved.model.to(self.device)
        tokenizer, preprocessing = tokenizer_for(saved.recipe.model.text), own_preprocessing(saved.recipe.model.image)
        figures = evaluate_suite(model, suite, preprocessing, tokenizer, self.device, self.options.precision, compared=compared_by(saved.recipe))
        event("watch.figures")
        if collectives.rank() == 0:
            provenance.publish(self.run_dir, self._suite_name(suite), provenance.provenance(suite, figures, preprocessing, self.options.precision))
            figures_csv.append(self.run_dir, found.step, found.samples, found.attempt, figures, found.digest, self._suite_name(suite))
            self._tell(f"step {found.step} (attempt {found.attempt}): {len(figures)} figures in {time.monotonic() - began:.1f} s")
            for line in evaluation_lines(figures):
                self._tell(f"  {line}")
        event("watch.appended")
        return True

    def _was_read(self, found: Found, problems: list[str]) -> bool:
        """Whether what was loaded is the checkpoint that was found; tells why not, and does not come back to a damaged one."""
        folder = folder_of(self.run_dir, found.step)
        if not folder.is_dir():
            self._waiting.discard(found)
            self._missed.add(found.step)
            self._tell(f"step {found.step}: deleted while it was read; skipped (raise run.keep_checkpoints to keep them longer)")
            return False
        if found not in published(self.run_dir):
            self._waiting.discard(found)
            self._tell(f"step {found.step}: replaced while it was read; the new one is evaluated instead")
            return False
        if problems:
            self._skipped.add(found)
            self._tell(f"warning: step {found.step} is skipped: {problems[0]}")
        return not problems


class _Published:
    """Steps of the checkpoints that metrics.jsonl names; only what was added since the last look is read."""

    def __init__(self, path: Path):
        self._path, self._file, self._offset, self._steps = path, 0, 0, set()

    def steps(self) -> set[int]:
        if not self._path.exists():
            return set()
        with self._path.open("rb") as file:
            inode = self._path.stat().st_ino
            if inode != self._file or file.seek(0, 2) < self._offset:  # a resumed run has moved lines out, into a new file
                self._file, self._offset, self._steps = inode, 0, set()
            file.seek(self._offset)
            whole, _, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + bool(whole)
        for line in whole.splitlines():
            if b'"kind": "checkpoint"' in line:
                with contextlib.suppress(ValueError):  # a kill tore it
                    self._steps.add(json.loads(line)["step"])
        return set(self._steps)


def _is_over(run_dir: Path) -> bool:
    """Whether the run is done, or has failed for good; one that was stopped or can be resumed may go on."""
    try:
        status = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return status.get("state") == "done" or (status.get("state") == "failed" and not status.get("resumable", True))
