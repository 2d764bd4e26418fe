"""The episode machine: fetch, extract, cluster, train, evaluate, again and again.

This is the one place where signals, kills, progress and resumption meet. What a phase has finished is published before the
next one starts: weights and cursor after training, prototypes and labels after clustering, features and spool as they are
written. So a run killed anywhere repeats at most the unfinished phase.
"""

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from protoclip_scale import collectives, standing
from protoclip_scale.data.plan import EpisodePlan
from protoclip_scale.engine import checkpoint, refresh
from protoclip_scale.engine.checkpoint import Cursor
from protoclip_scale.engine.checkpoint.copying import Copier
from protoclip_scale.engine.clustering import LABELINGS, Begun, cluster, labelings, num_iterations, on_iteration, seed_of
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.ema import change_on_resume
from protoclip_scale.engine.faults import event
from protoclip_scale.engine.fetch import Fetch
from protoclip_scale.engine.head_start import HeadStart, train_batches
from protoclip_scale.engine.pictures import draw_prototypes
from protoclip_scale.engine.profile import StepProfiler
from protoclip_scale.engine.records import Records
from protoclip_scale.engine.run_folder import guard_attempt
from protoclip_scale.engine.teacher_ahead import TeacherAhead
from protoclip_scale.engine.throughput import Throughput
from protoclip_scale.engine.trainer import Trainer
from protoclip_scale.engine.training import train_episode
from protoclip_scale.errors import Stopped, UserError
from protoclip_scale.evaluation import provenance
from protoclip_scale.evaluation.run import evaluate
from protoclip_scale.files import publish_text
from protoclip_scale.prototypes.diagnostics import collapse_warnings
from protoclip_scale.prototypes.episode import EpisodePrototypes, RowLabels
from protoclip_scale.prototypes.teacher import TeacherFeatures
from protoclip_scale.prototypes.teacher_clusters import cluster_teacher, open_teacher_clusters
from protoclip_scale.report.clustering_line import clustering_line

WARM = "clustering/centroids/"  # their names in a checkpoint
ONCE = "teacher once"  # the labeling's name in metrics.jsonl


class EpisodeMachine:
    """Runs episodes from a cursor to the end of the schedule."""

    def __init__(self, run: RunContext, trainer: Trainer, teacher: TeacherFeatures | None, head_start: HeadStart | None = None):
        self.run = run
        self.trainer = trainer
        self.teacher = teacher
        self.head_start = head_start
        self.cursor = Cursor(episode=0, phase="fetch", step_in_episode=0, step=0)
        self.prototypes: EpisodePrototypes | None = None
        self.warm_centroids: dict[str, np.ndarray] = {}  # of the last clustering, where the next one starts from them
        self.row_labels: dict[str, RowLabels] = {}  # shared with the prototypes of a resumed episode: filled before it trains
        self.records = Records(run, trainer.objectives)
        self.throughput = Throughput(run.recipe, trainer.objectives, run.device)
        self.profiler = StepProfiler(run.recipe.run.profile, run.folder, run.device, run.console.event)
        self.group: dist.ProcessGroup | None = None  # of the thread that clusters a teacher
        self.ahead: Fetch | None = None
        self.copier: Copier | None = None  # on rank 0, if run.copy_to is set
        self.plan: EpisodePlan | None = None

    def train(self) -> None:
        """To the end of the schedule; raises Stopped, after saving, when a signal came."""
        standing.at(self.cursor.episode, self.cursor.step)
        try:
            self._cluster_teacher_once()
            while self.cursor.phase != "done":
                episode = self.cursor.episode
                if self.cursor.phase == "fetch":
                    self.trainer.rebuild(episode, self._just_saved)
                    self._fetch(episode)
                    if self._clusters(episode):
                        self._cluster(episode)
                    self._move(phase="train")
                elif self.cursor.phase == "train":
                    self._train_episode(episode)
                    self._move(phase="evaluate")
                    self._save()
                elif self.cursor.phase == "evaluate":
                    if self._evaluates(episode) or self._every_steps():
                        self._evaluate(episode)
                    self.prototypes = None
                    finished = self.cursor.step >= self.run.schedule.total_steps
                    self._move(phase="done" if finished else "fetch", episode=episode if finished else episode + 1, step_in_episode=0)
        except Stopped:
            self._save()
            raise
        finally:
            if self.ahead:
                self.ahead.cancel()

    def resume(self, folder: Path, manifest: dict) -> None:
        """Stand where a checkpoint was saved; what clustering published after it counts too."""
        reader = checkpoint.Reader(folder, manifest)
        prototypes = reader  # those that were trained with, or what clustering has published since
        self.cursor = checkpoint.cursor_of(manifest)
        try:
            if added := collectives.from_rank_zero(lambda: checkpoint.prototypes_manifest(folder)):
                prototypes = checkpoint.Reader(checkpoint.prototypes_folder(folder), added)
                self.cursor = checkpoint.cursor_of(added)
        except UserError as error:
            self.run.console.event(f"warning: {error}; clustering again")
        unfinished = 0 < self.cursor.step_in_episode < self.run.plan.steps_per_episode
        if self.cursor.phase == "evaluate" and unfinished and self.cursor.step < self.run.schedule.total_steps:
            self._move(phase="train")  # the schedule ended inside this episode and has been extended
        self.trainer.strategy.precision.load(manifest["scaler"])
        self.run.nonfinite.total = manifest.get("skipped_steps", 0)  # none in checkpoints of before
        self.trainer.build(self.cursor.episode, reader)
        if news := change_on_resume(self.run.recipe.optim.ema, reader):
            self.run.console.event(news)
        found = {name: prototypes.tensor(name) for name in prototypes.names("prototypes/")}
        if found and self.cursor.phase in ("train", "evaluate"):
            self.prototypes = EpisodePrototypes.from_tensors(self.cursor.episode, found, self.run.device, self.row_labels)
        self.warm_centroids = {name.removeprefix(WARM): prototypes.tensor(name).numpy() for name in prototypes.names(WARM)}
        self.records.check(manifest)
        self.run.log.discard_after(self.cursor.step)
        if collectives.rank() == 0:
            checkpoint.set_aside(self.run.folder, self.cursor.step, self.run.attempt)
        self.records.take_back(self.cursor)  # after the checkpoints that count on them
        self._point_to(folder)

    def _clusters(self, episode: int) -> bool:
        return any(objective.clusters for objective in self.trainer.active(episode).values())

    def _move(self, **changes: object) -> None:
        self.cursor = Cursor(**{**vars(self.cursor), **changes})
        standing.at(self.cursor.episode, self.cursor.step)

    def _fetch(self, episode: int) -> None:
        """The episode's rows onto this machine's disk; most of it may have been done while the one before trained."""
        fetch, self.ahead = self.ahead, None
        if fetch is None or fetch.plan.number != episode or collectives.any_rank(fetch.error is not None):
            fetch = Fetch(self.run, episode)
        with self.run.phase("fetch", episode, total=None, unit="blocks"):
            try:
                fetch.wait()
            finally:
                fetch.cancel()
        self.plan = fetch.plan

    def _cluster_teacher_once(self) -> None:
        """Labels of a teacher whose features are clustered over all rows, before the first episode; found again by a run that goes on."""
        settings = self.run.recipe.objectives.get("teacher")
        if self.teacher is None or settings.refresh != "once":
            return
        run, folder = self.run, self.run.folder / "teacher_clusters"
        about = folder, self.teacher, run.index, run.recipe.prototypes, (run.recipe.data.plan.seed, LABELINGS.index("teacher"))
        clusters = open_teacher_clusters(*about)
        if clusters is None:
            with run.phase("cluster", self.cursor.episode, total=num_iterations(run, 1), unit="iterations"):
                clusters = cluster_teacher(*about, run.lanes, run.recipe.data.plan.lanes, on_iteration(run, "teacher", 0), event)
        run.log.table("kmeans", clusters.history, step=0, samples=0, labeling=ONCE)
        self.row_labels["teacher"] = clusters.labels

    def _cluster(self, episode: int) -> None:
        """Prototypes of an episode, published beside the weights they belong to."""
        self._save()
        run, active = self.run, self.trainer.active(episode)
        searched = [name for name in labelings(active) if name not in self.row_labels]
        with self._teacher_ahead(episode, searched) as begun:
            with run.clock.measure("records"):  # an extraction counts as one
                rows = refresh.rows_to_cluster(refresh.Source(run, self.trainer.strategy, self.plan, self.cursor.step))
            with run.phase("cluster", episode, total=num_iterations(run, len(searched)), unit="iterations"):
                found = cluster(run, rows, active, episode, self.row_labels, begun, self.warm_centroids)
        self.prototypes = found.prototypes
        self.warm_centroids = found.centroids if run.recipe.prototypes.starts_warm else {}
        run.log.once("episode", step=self.cursor.step, samples=self._samples, episode=episode, **found.figures)
        run.log.table("kmeans", found.table, step=self.cursor.step, samples=self._samples, episode=episode)
        for line in (clustering_line(found.figures), *(f"warning: {each}" for each in collapse_warnings(found.figures, run.recipe.prototypes.clusters))):
            if line:
                run.console.event(line)
        if self._evaluates(episode) or not self._clusters(episode + 1):
            with run.clock.measure("pictures"):
                draw_prototypes(run, rows, found.labels, self.prototypes)
        beside = checkpoint.prototypes_folder(checkpoint.folder_of(run.folder, self.cursor.step))
        pieces = checkpoint.replicated_pieces(self.prototypes.tensors() | self._warm_tensors())
        self._publish(beside, pieces, Cursor(episode, "train", 0, self.cursor.step))
        refresh.remove(rows)

    @contextlib.contextmanager
    def _teacher_ahead(self, episode: int, searched: list[str]) -> Iterator[dict[str, Begun]]:
        """The clusters of a teacher that are found while the students' features are extracted."""
        if "teacher" not in searched:
            yield {}
            return
        folder = self.run.scratch / f"teacher-{episode:06d}-rank-{collectives.rank():05d}"
        if self.group is None:
            self.group = collectives.separate_group(self.run.recipe.run.timeout_minutes)
        seed, start = seed_of(self.run, episode, "teacher"), self.warm_centroids.get("teacher")
        with TeacherAhead(self.run, self.teacher, self.plan, folder, seed, start, self.group, event) as ahead:
            yield {"teacher": ahead.result}

    def _warm_tensors(self) -> dict[str, torch.Tensor]:
        return {f"{WARM}{name}": torch.from_numpy(centroids) for name, centroids in self.warm_centroids.items()}

    def _train_episode(self, episode: int) -> None:
        """One pass over the episode, or what a resumed run has left of it."""
        if not self.plan or self.plan.number != episode:
            self._fetch(episode)
        done = self.cursor.step_in_episode
        first = self.cursor.step - done
        every = self.run.recipe.run.checkpoint_steps
        num_steps = min(self.run.plan.steps_per_episode, self.run.schedule.total_steps - first)
        recorder = self.records.begin(episode, done)
        with self.run.phase("train", episode, total=num_steps, unit="steps", done=done), self.profiler.episode():
            batches = (self.head_start and self.head_start.take(episode, done)) or train_batches(self.run, self.plan, done)
            left = batches if done < num_steps else iter(())  # none, if the run was stopped after its last step
            self._evaluate_within(episode, num_steps)  # what a kill or a stop came between
            for step in train_episode(self.run, self.trainer, left, episode, self.cursor.step, self.prototypes, recorder, self.throughput, self.profiler):
                self._move(step=step, step_in_episode=step - first)
                if not self.ahead and episode + 1 < self.run.schedule.num_episodes:
                    self.ahead = Fetch(self.run, episode + 1)
                if every and step % every == 0 and step - first < num_steps:  # the last one saves after the loop
                    self._save()
                self._evaluate_within(episode, num_steps)
                self.tell_of_copies()
                self.run.stop.heed()
        with self.run.clock.measure("records"):
            self.records.seal()
        self.run.bad_rows.check()

    def _evaluates(self, episode: int) -> bool:
        every, last = self.run.recipe.evaluation.every_episodes, episode + 1 == self.run.schedule.num_episodes
        return last or bool(every and (episode + 1) % every == 0)

    def _every_steps(self) -> bool:
        """Whether ``evaluation.every_steps`` is due at the cursor's step."""
        every = self.run.recipe.evaluation.every_steps
        return bool(every and self.cursor.step and self.cursor.step % every == 0)

    def _evaluate_within(self, episode: int, num_steps: int) -> None:
        """Between two steps of an episode of ``num_steps``, if one is due; its time is no part of training's speed."""
        done, began = self.cursor.step_in_episode, time.perf_counter()
        if 0 < done < num_steps and self._every_steps() and self._evaluate(episode):
            self.throughput.paused += time.perf_counter() - began
            self.run.console.phase("train", episode + 1, self.run.schedule.num_episodes, num_steps, "steps", done)

    def _evaluate(self, episode: int) -> bool:
        """Whether there was anything to do: a step is evaluated once."""
        if not self.run.recipe.evaluation.sets:
            return False
        if collectives.from_rank_zero(lambda: self.run.log.last("eval", self.cursor.step)):
            return False
        with self.run.phase("evaluate", episode, total=None, unit="sets"):
            event("evaluate.start")
            with self.trainer.averaged(), self.trainer.strategy.evaluating() as model:
                figures = evaluate(model, self.run.recipe, self.run.tokenizer, self.run.device, prototypes=self.prototypes, meanwhile=self.run.stop.agree)
        if collectives.rank() == 0:
            provenance.publish_of_recipe(self.run.folder, self.run.recipe, figures)
        mark = {"weights": "ema"} if self.trainer.average else {}
        self.run.log.once("eval", step=self.cursor.step, samples=self._samples, episode=episode, **mark, **figures)
        self.run.console.evaluation(figures)
        self.run.report.ask()
        return True

    @property
    def _samples(self) -> int:
        return self.cursor.step * self.run.recipe.data.plan.global_batch

    def _save(self) -> None:
        """Publish the weights, the optimiser and the prototypes they were trained with; once for a step."""
        folder = checkpoint.folder_of(self.run.folder, self.cursor.step)
        if not collectives.from_rank_zero(folder.is_dir):  # others would remember that it was not there
            self.records.flush()
            shared = self._warm_tensors() | (self.prototypes.tensors() if self.prototypes else {})
            pieces = itertools.chain(self.trainer.pieces(), checkpoint.replicated_pieces(shared))
            self._publish(folder, pieces, self.cursor, weights=self.run.recipe.run.weights)
        self._point_to(folder)

    def _just_saved(self) -> checkpoint.Reader:
        """The checkpoint of the weights as they are now: training saves at the end of every episode."""
        folder = checkpoint.folder_of(self.run.folder, self.cursor.step)
        return checkpoint.Reader(folder, collectives.from_rank_zero(lambda: checkpoint.facts(folder)))

    def _point_to(self, folder: Path) -> None:
        """Name the newest checkpoint, and drop those that are not kept; also what a kill after publishing has left undone. A collective."""
        collectives.from_rank_zero(lambda: guard_attempt(self.run.folder, self.run.attempt))
        if collectives.rank() == 0 and folder.parent == self.run.folder / "checkpoints":
            publish_text(folder.parent / "latest", folder.name + "\n")
            settings = self.run.recipe.run
            checkpoint.prune(self.run.folder, settings.keep_checkpoints, settings.keep_every_steps, self.copier.in_use if self.copier else ())
            self.records.forget(self.cursor)
            self.run.log.once("checkpoint", step=self.cursor.step, samples=self._samples, path=f"checkpoints/{folder.name}")
            self.run.log_phases(self.cursor.step)
            self.run.report.ask()

    def _publish(self, folder: Path, pieces: Iterable[checkpoint.Piece], cursor: Cursor, weights: bool = False) -> None:
        about = checkpoint.describe(
            cursor, self._samples, self.run.attempt, run_id=self.run.run_id, plan=self.run.plan.fingerprint, scaler=self.trainer.strategy.precision.state(),
            recorded=self.records.counted_on(cursor), skipped_steps=self.run.nonfinite.total,
        )
        with self.run.clock.measure("checkpoint"):
            checkpoint.save(folder, pieces, about, lambda: guard_attempt(self.run.folder, self.run.attempt), weights=weights)
        self.run.console.event(f"saved checkpoints/{folder.name}")
        if self.copier:
            self.copier.add(folder)

    def tell_of_copies(self) -> None:
        """What the thread that copies has to say."""
        for line in self.copier.news() if self.copier else ():
            self.run.console.event(line)
