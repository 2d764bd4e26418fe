"""The loader of the episode that a resumed run stands in, started before the model's libraries are even imported.

Where the spool survived, the first batch is there some seconds after the process started, and loader processes go on while the model is built.
"""

import itertools
import time
from collections.abc import Iterator

import psutil

from protoclip_scale.data.batches import Batch, EpisodeBatches, make_loader
from protoclip_scale.data.plan import EpisodePlan
from protoclip_scale.engine.checkpoint import Cursor
from protoclip_scale.engine.context import RunContext


def train_batches(run: RunContext, plan: EpisodePlan, first_step: int) -> Iterator[Batch]:
    """This rank's training batches of an episode from a step on."""
    recipe = run.recipe
    batches = EpisodeBatches(
        recipe.data, recipe.model.image.size, run.tokenizer, plan, run.spool, run.lanes, purpose="train", seed=recipe.data.plan.seed
    )
    return make_loader(batches, first_step, recipe.data.workers, pin_memory=run.device.type == "cuda")


class HeadStart:
    """``take`` gives the loader to whoever trains that episode from that step; it gives it once.

    Nothing is started, and no other rank is waited for, unless this rank's lanes lie complete in the spool.
    """

    def __init__(self, run: RunContext, cursor: Cursor):
        self._place = cursor.episode, cursor.step_in_episode
        self._batches: Iterator[Batch] | None = None
        self.seconds: float | None = None  # from the start of the process to the first batch
        if cursor.phase != "train" or cursor.step_in_episode >= run.plan.steps_per_episode:
            return
        plan = run.plan.episode(cursor.episode)
        if not all(run.spool.is_complete(plan, lane) for lane in run.lanes):
            return
        batches = train_batches(run, plan, cursor.step_in_episode)
        first = next(batches, None)
        self.seconds = time.time() - psutil.Process().create_time()
        self._batches = batches if first is None else itertools.chain([first], batches)

    def take(self, episode: int, first_step: int) -> Iterator[Batch] | None:
        """The loader, if it is that of this place."""
        batches, self._batches = self._batches, None
        return batches if self._place == (episode, first_step) else None
