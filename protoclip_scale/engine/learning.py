"""A warning when nothing is learnt: contrastive losses that stay at ln N, which is the loss of guessing among the N captions of a batch."""

import math
from collections.abc import Callable, Mapping

from protoclip_scale.engine.run_log import RunLog

NEAR = 0.01
CAUSES = (
    "pictures and captions that do not belong together or captions that are all alike (tools/inspect_data.py shows them), "
    "optim.lr too high or schedule.warmup_steps too short, or a logit scale at its limits (scale/logit in metrics.jsonl)"
)


class LearningWatch:
    """Looks at logged losses; says once in the life of a run that it has not learnt."""

    def __init__(self, log: RunLog, tell: Callable[[str], None], from_step: int, global_batch: int):
        self._log, self._tell = log, tell
        self._from_step, self._guessing, self._batch = from_step, math.log(global_batch), global_batch
        self._done = from_step == 0 or global_batch == 1

    def look(self, step: int, samples: int, losses: Mapping[str, float]) -> None:
        """Judge the mean losses of a logged step, of the objectives that find partners (``Objective.finds_partners``), by name."""
        if self._done or not losses or step < self._from_step or not all(loss >= (1 - NEAR) * self._guessing for loss in losses.values()):
            return
        self._done = True
        if self._log.last("warning", warning="nothing_learnt") is not None:
            return
        self._log.metrics("warning", step=step, samples=samples, warning="nothing_learnt", losses=dict(losses), guessing=self._guessing)
        self._tell(
            f"warning: nothing is learnt: at step {step} the loss is {', '.join(f'{loss:.3f} ({name})' for name, loss in losses.items())}, and guessing among {self._batch} captions gives ln {self._batch} = "
            f"{self._guessing:.3f}; usual causes: {CAUSES}"
        )
