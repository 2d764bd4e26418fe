"""A warning when nothing is learnt: a CLIP loss that stays at ln N, which is the loss of guessing among the N captions of a batch."""

import math
from collections.abc import Callable

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

    def look(self, step: int, samples: int, clip_loss: float | None) -> None:
        """Judge the mean loss of a logged step; None where no CLIP loss is trained."""
        if self._done or clip_loss is None or step < self._from_step or not clip_loss >= (1 - NEAR) * self._guessing:
            return
        self._done = True
        if self._log.last("warning", warning="nothing_learnt") is not None:
            return
        self._log.metrics("warning", step=step, samples=samples, warning="nothing_learnt", clip_loss=clip_loss, guessing=self._guessing)
        self._tell(
            f"warning: nothing is learnt: at step {step} the CLIP loss is {clip_loss:.3f}, and guessing among {self._batch} captions gives ln {self._batch} = "
            f"{self._guessing:.3f}; usual causes: {CAUSES}"
        )
