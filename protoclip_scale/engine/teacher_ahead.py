"""A teacher's clusters of an episode, found in a thread while the students' features are extracted: neither needs the other.

The teacher's features are known by row. Which rows stand in the episode is known from the plan, except that a row which cannot be decoded is
replaced by another one; where extraction met such a row, the work is done again with the rows that really stand there.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from protoclip_scale import collectives, standing
from protoclip_scale.data.plan import EpisodePlan
from protoclip_scale.engine.context import RunContext
from protoclip_scale.errors import Stopped
from protoclip_scale.prototypes import kmeans
from protoclip_scale.prototypes.kmeans import Iteration, KMeansResult
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.prototypes.teacher import COLUMN, TeacherFeatures


def cluster_teacher_rows(
    run: RunContext,
    teacher: TeacherFeatures,
    row_ids: list[np.ndarray],
    folder: Path,
    seed: tuple[int, ...],
    on_iteration: Callable[[Iteration], None],
    start: np.ndarray | None,
) -> KMeansResult:
    """k-means of the teacher's features of ``row_ids``, int64 [lane_rows] of each own lane; a collective. ``folder``: of this rank alone, for the features."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed attempt left, perhaps of other lanes
    store = FeatureStore.create(folder, {COLUMN: teacher.dim}, len(row_ids), [len(ids) for ids in row_ids], info={"run_id": run.run_id})
    for part, ids in enumerate(row_ids):
        with store.writer(part) as writer:
            writer.write(slice(None), {COLUMN: teacher.rows(ids)})
    sealed = store.seal()
    positions = [lane * run.plan.lane_rows + np.arange(len(ids)) for lane, ids in zip(run.lanes, row_ids, strict=True)]
    return kmeans.fit([sealed.read(COLUMN, part) for part in range(sealed.num_parts)], positions, run.recipe.prototypes, seed, on_iteration, start)


class TeacherAhead:
    """Starts with the extraction, on one processor thread and its own process ``group``. Use as a context manager around both, on all ranks alike.

    ``folder``: of this rank alone, removed at the end. With tf32, whose switch is the whole process's, nothing is done ahead.
    """

    def __init__(
        self,
        run: RunContext,
        teacher: TeacherFeatures,
        plan: EpisodePlan,
        folder: Path,
        seed: tuple[int, ...],
        start: np.ndarray | None,
        group: dist.ProcessGroup | None,
        event: Callable[[str], None],
    ):
        self._run, self._teacher, self._folder, self._seed, self._start, self._group = run, teacher, folder, seed, start, group
        self._ahead = run.recipe.prototypes.distances != "tf32"
        self._planned = [plan.row_ids[lane] for lane in run.lanes]
        self._event = event
        self._found: KMeansResult | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "TeacherAhead":
        if self._ahead:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Stopped):  # after another error ranks may be gone that the thread waits for
            self._join()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _join(self) -> None:
        if self._ahead:
            self._thread.join()

    def _work(self) -> None:
        torch.set_num_threads(1)  # of this thread: the others are at the extraction
        try:
            with collectives.within(self._group):
                self._found = cluster_teacher_rows(self._run, self._teacher, self._planned, self._folder / "planned", self._seed, self._on_iteration, self._start)
        except BaseException as error:
            self._error = error

    def _on_iteration(self, _: Iteration) -> None:
        self._event("cluster.iteration")
        standing.got_on()
        self._run.stop.agree()

    def result(self, row_ids: list[np.ndarray], on_iteration: Callable[[Iteration], None]) -> KMeansResult:
        """Clusters of the rows that really stand in the episode; a collective. Raises what the thread raised."""
        self._join()
        if self._error:
            raise self._error
        replaced = not self._ahead or any(not np.array_equal(planned, real) for planned, real in zip(self._planned, row_ids, strict=True))
        if collectives.any_rank(replaced):
            return cluster_teacher_rows(self._run, self._teacher, row_ids, self._folder / "real", self._seed, on_iteration, self._start)
        assert self._found is not None
        return self._found
