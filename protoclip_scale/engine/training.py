"""The train phase: one pass over an episode, labels looked up by position."""

import time
from collections.abc import Iterator

import psutil
import torch

from protoclip_scale import collectives
from protoclip_scale.data.batches import Batch, EpisodeBatches, make_loader
from protoclip_scale.data.plan import EpisodePlan
from protoclip_scale.data.rows import unpack_row_ids
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.faults import event
from protoclip_scale.engine.trace import RowTrace
from protoclip_scale.engine.trainer import Loss, Trainer, seed_step
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.episode import EpisodePrototypes


class NonFiniteLoss:
    """Steps whose loss or gradient is not finite are skipped on all ranks; too many in a row end the run."""

    def __init__(self, allowed: int):
        self.allowed = allowed
        self.in_a_row = 0
        self.total = 0

    def met(self, batch: Batch, step: int) -> None:
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row > self.allowed:
            ids = sum(collectives.all_gather_objects(batch.row_ids.tolist()), [])
            sources, blocks, rows = unpack_row_ids(ids)
            named = ", ".join(f"{s}/{b}/{r}" for s, b, r in list(zip(sources, blocks, rows, strict=True))[:8])
            raise UserError(
                f"the loss was not finite in {self.in_a_row} steps in a row, the last of them step {step} (optim.nonfinite_skips {self.allowed}); "
                f"lower optim.lr, use another optim.precision, or look at its rows (source/block/row): {named}, ..."
            )

    def passed(self) -> None:
        self.in_a_row = 0


def _timed(batches: Iterator[Batch], waits: list[float]) -> Iterator[Batch]:
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        waits.append(time.perf_counter() - start)
        if batch is None:
            return
        yield batch


def _averaged(loss: Loss) -> dict[str, float]:
    """Loss terms over all ranks; a collective."""
    values = torch.stack([loss.total.detach(), *loss.terms.values()]).double()
    mean = (collectives.all_reduce(values) / collectives.world_size()).tolist()
    return {"loss": mean[0], **{f"loss/{name}": value for name, value in zip(loss.terms, mean[1:], strict=True)}}


def train_episode(
    run: RunContext, trainer: Trainer, plan: EpisodePlan, episode: int, start_in_episode: int, step: int, prototypes: EpisodePrototypes | None
) -> Iterator[int]:
    """Train on the episode from a step on; yields the number of steps of the run taken so far, after each one."""
    recipe, total = run.recipe, run.schedule.total_steps
    batches = EpisodeBatches(
        recipe.data, recipe.model.image.size, run.tokenizer, plan, run.spool, run.lanes, purpose="train", seed=recipe.data.plan.seed
    )
    nonfinite = NonFiniteLoss(recipe.optim.nonfinite_skips)
    waits: list[float] = []
    window_start, window_steps = time.perf_counter(), 0
    trainer.strategy.model.train()
    with RowTrace(run.folder, run.attempt, enabled=recipe.run.trace_rows) as trace:
        for batch in _timed(make_loader(batches, start_in_episode, recipe.data.workers), waits):
            run.bad_rows.add(batch)
            seed_step(recipe.run.seed, step)
            loss = trainer.loss(batch, episode, prototypes)
            event("train.forward")
            if collectives.any_rank(not bool(torch.isfinite(loss.total))):
                nonfinite.met(batch, step)
                norm, taken = float("nan"), False
            else:
                norm, taken = trainer.step(loss, step, episode)
                if taken or trainer.strategy.precision.scaler:
                    nonfinite.passed()
                else:
                    nonfinite.met(batch, step)
            trace.write(step, batch.row_ids)
            step, window_steps = step + 1, window_steps + 1
            if step % recipe.run.log_steps == 0 or step == total:
                elapsed = time.perf_counter() - window_start
                rate = window_steps * recipe.data.plan.global_batch / elapsed
                figures = _averaged(loss) | {
                    "lr": trainer.schedule.learning_rates(step - 1)["other"],
                    "gradient_norm": norm,
                    "samples_per_second": rate,
                    "data_wait_share": sum(waits) / elapsed,
                    "memory_gb": psutil.Process().memory_info().rss / 2**30,
                }
                if nonfinite.total:
                    figures["skipped_steps"] = nonfinite.total
                for name, label in (("logit_scale", "scale/logit"), ("prototype_scale", "scale/prototype")):
                    if name in loss.features:
                        figures[label] = loss.features[name].item()
                run.log.metrics("train", step=step, samples=step * recipe.data.plan.global_batch, episode=episode, **figures)
                run.console.step(figures | {"step": step, "total_steps": total, "eta_seconds": (total - step) * elapsed / window_steps})
                window_start, window_steps = time.perf_counter(), 0
                waits.clear()
            run.samples_trained += recipe.data.plan.global_batch
            run.console.advance(batch.step + 1)
            event("train.step")
            yield step
            if step == total:
                return
