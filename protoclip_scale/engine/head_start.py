"""The loader of the episode that a resumed run stands in, started before the model's libraries are even imported.

Where the spool survived, the first batch is there some seconds after the process started: this process makes it, while the server that loader processes
are forked from imports what they need.
"""

import itertools
import time
from collections.abc import Iterator

import psutil

from protoclip_scale.data import loader_server
from protoclip_scale.data.batches import Batch, EpisodeBatches, make_loader
from protoclip_scale.data.plan import EpisodePlan
from protoclip_scale.engine.checkpoint import Cursor
from protoclip_scale.engine.context import RunContext


def _train_batches(run: RunContext, plan: EpisodePlan) -> EpisodeBatches:
    recipe = run.recipe
    return EpisodeBatches(
        recipe.data, recipe.model.image.size, run.tokenizer, plan, run.spool, run.lanes, purpose="train", seed=recipe.data.plan.seed, views=run.views
    )


def _loaded(run: RunContext, batches: EpisodeBatches, first_step: int) -> Iterator[Batch]:
    return make_loader(batches, first_step, run.recipe.data.workers, pin_memory=run.device.type == "cuda")


def train_batches(run: RunContext, plan: EpisodePlan, first_step: int) -> Iterator[Batch]:
    """This rank's training batches of an episode from a step on."""
    return _loaded(run, _train_batches(run, plan), first_step)


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
        if run.recipe.data.workers:
            loader_server.start(run.tokenizer.modules)
        batches, step = _train_batches(run, plan), cursor.step_in_episode
        first = batches[step]
        self.seconds = time.time() - psutil.Process().create_time()
        self._batches = itertools.chain([first.pin_memory() if run.device.type == "cuda" else first], _loaded(run, batches, step + 1))

    def take(self, episode: int, first_step: int) -> Iterator[Batch] | None:
        """The loader, if it is that of this place."""
        batches, self._batches = self._batches, None
        return batches if self._place == (episode, first_step) else None
