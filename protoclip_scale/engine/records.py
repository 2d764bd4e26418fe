"""The features that training records for later clusterings: which episode's, for whom, and which ones a checkpoint counts on."""

from protoclip_scale import collectives
from protoclip_scale.engine import checkpoint, refresh
from protoclip_scale.engine.checkpoint import Cursor
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.faults import event
from protoclip_scale.objectives import Objective
from protoclip_scale.prototypes import recording
from protoclip_scale.prototypes.recording import Recorder


class Records:
    """Does nothing where ``prototypes.refresh`` is episode."""

    def __init__(self, run: RunContext, objectives: dict[str, Objective]):
        self._run = run
        self._objectives = objectives
        self._looks_back = refresh.looks_back(run.recipe, run.plan)
        self._recorder: Recorder | None = None

    def begin(self, episode: int, step_in_episode: int) -> Recorder | None:
        """The recorder of an episode that a later clustering will look into; that clustering may lie beyond the schedule, which can be extended."""
        run = self._run
        self._recorder = None
        if self._wanted(episode):
            dim, info = run.recipe.model.prototype_heads.dim, {"run_id": run.run_id, "plan": run.plan.fingerprint}
            about = run.folder, episode, dim, run.recipe.data.plan.lanes, run.plan.lane_rows, info
            collectives.from_rank_zero(lambda: recording.create(*about) and None)
            recording.wait_until_created(run.folder, episode)
            self._recorder = Recorder(recording.create(*about), run.lanes, step_in_episode * run.plan.per_lane)
        return self._recorder

    def _wanted(self, episode: int) -> bool:
        for later in range(episode + 1, episode + 1 + self._looks_back):
            if any(objective.clusters and objective.active(later) for objective in self._objectives.values()):
                return True
        return False

    def flush(self) -> None:
        """Before a checkpoint is published: what it counts on is on disk."""
        if self._recorder:
            self._recorder.flush()

    def seal(self) -> None:
        """The episode is over; a collective. Rows of skipped steps are missing for good."""
        if not self._recorder:
            return
        self._recorder.close()
        collectives.barrier()
        collectives.from_rank_zero(lambda: self._recorder.store.seal(allow_missing=True) and None)
        self._recorder = None
        event("records.sealed")

    def counted_on(self, cursor: Cursor) -> list[int]:
        """Episodes whose records a run that goes on from ``cursor`` must find, the one in training included; for a checkpoint's manifest. A collective."""
        if not self._looks_back:
            return []
        clustering = cursor.episode + (cursor.phase in ("train", "evaluate"))
        looked_into = range(clustering - self._looks_back, clustering)
        found = collectives.from_rank_zero(lambda: recording.recorded_episodes(self._run.folder))
        return [number for number in found if number in looked_into]

    def check(self, manifest: dict) -> None:
        """Raises UserError if records that a checkpoint counts on are gone; a collective."""

        def check_all() -> None:
            for number in manifest.get("recorded", ()):
                recording.check(self._run.folder, number)

        collectives.from_rank_zero(check_all)

    def take_back(self, cursor: Cursor) -> None:
        """Remove records of later episodes than the run goes on from: those did not happen."""
        folder = self._run.folder
        if collectives.rank() == 0:
            recording.forget(folder, [number for number in recording.recorded_episodes(folder) if number > cursor.episode])

    def forget(self, cursor: Cursor) -> None:
        """Remove records that no checkpoint counts on any more; for rank 0, after checkpoints were pruned."""
        folder = self._run.folder
        if self._looks_back and self._run.recipe.run.keep_checkpoints:
            counted_on = {number for each in checkpoint.list_checkpoints(folder) for number in checkpoint.facts(each).get("recorded", ())}
            recording.forget(folder, set(recording.recorded_episodes(folder)) - counted_on - {cursor.episode})
