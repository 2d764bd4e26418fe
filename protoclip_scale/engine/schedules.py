"""Learning rates as pure functions of the step: nothing to save, nothing to restore, the same on any number of ranks."""

import math
from dataclasses import dataclass

from protoclip_scale.errors import UserError
from protoclip_scale.recipe.schema import Recipe


def warmup_cosine(step: int, peak: float, warmup_steps: int, total_steps: int, final: float = 0.0) -> float:
    """ProtoCLIP's form: peak (step+1)/warmup, then a cosine from peak at ``warmup_steps`` to ``final`` at ``total_steps`` (methods 6.4)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= total_steps:
        return final
    return final + 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) * (peak - final)


def warmup_cosine_declip(step: int, start: float, peak: float, warmup_steps: int, total_steps: int, final: float = 0.0) -> float:
    """DeCLIP's form, whose iteration ``step + 1`` counts from 1: from ``start`` to ``peak`` over warmup-1 iterations (methods C9)."""
    iteration = step + 1
    if iteration < warmup_steps:
        return start + (peak - start) / (warmup_steps - 1) * (iteration - 1)
    return final + (peak - final) * (1 + math.cos(math.pi * (iteration - warmup_steps) / (total_steps - warmup_steps))) / 2


def warmup_cosine_slip(step: int, start: float, peak: float, warmup_steps: int, total_steps: int, final: float = 0.0) -> float:
    """SLIP's form: evenly from ``start`` at step 0 to ``peak`` at the last step of the warm-up, and at the one after it; then a cosine to ``final`` (methods S6)."""
    if step < warmup_steps:
        return start + (peak - start) * step / max(1, warmup_steps - 1)
    return warmup_cosine(step, peak, warmup_steps, total_steps, final)


WARMED = {"declip": warmup_cosine_declip, "slip": warmup_cosine_slip}  # forms that start at ``schedule.warmup_lr``


@dataclass(frozen=True)
class Schedule:
    """The run's length and the learning rate of each parameter group ("visual", "other") at each step."""

    recipe: Recipe
    steps_per_episode: int
    num_rows: int

    @property
    def total_steps(self) -> int:
        number, unit = self.recipe.schedule.length()
        plan = self.recipe.data.plan
        steps = {
            "episodes": number * self.steps_per_episode,
            "epochs": number * self.num_rows // plan.global_batch,
            "steps": number,
        }[unit]
        if steps < 1:
            raise UserError(f"schedule.total: {self.recipe.schedule.total} is less than one step; make it longer")
        if steps <= self.recipe.schedule.warmup_steps:
            raise UserError(
                f"schedule.warmup_steps {self.recipe.schedule.warmup_steps} is not less than the {int(steps)} steps of schedule.total "
                f"'{self.recipe.schedule.total}'; shorten the warm-up or lengthen the run"
            )
        return int(steps)

    @property
    def num_episodes(self) -> int:
        return -(-self.total_steps // self.steps_per_episode)

    @property
    def locked_step(self) -> int | None:
        """First step of the locked-image ending, or None."""
        lit = self.recipe.episodes.lit
        return (lit.start - 1) * self.steps_per_episode if lit else None

    def learning_rates(self, step: int) -> dict[str, float]:
        """The learning rate of each group at a step (counted from 0)."""
        return {"visual": self._visual(step), "other": self._other(step)}

    def _curve(self, step: int, total_steps: int) -> float:
        optim, schedule = self.recipe.optim, self.recipe.schedule
        if schedule.form in WARMED:
            return WARMED[schedule.form](step, schedule.warmup_lr, optim.lr, schedule.warmup_steps, total_steps, schedule.final_lr)
        return warmup_cosine(step, optim.lr, schedule.warmup_steps, total_steps, schedule.final_lr)

    def _visual(self, step: int) -> float:
        if self.locked_step is None:
            return self._curve(step, self.total_steps)
        return 0.0 if step >= self.locked_step else self._curve(step, self.locked_step)

    def _other(self, step: int) -> float:
        lit = self.recipe.episodes.lit
        if lit and lit.lr is not None and step >= self.locked_step:
            return warmup_cosine(step - self.locked_step, lit.lr, 0, self.total_steps - self.locked_step, self.recipe.schedule.final_lr)
        return self._curve(step, self.total_steps)
