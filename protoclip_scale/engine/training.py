"""The train phase: one pass over an episode, labels looked up by position or row."""

import time
from collections.abc import Iterator

import psutil
import torch
from torch.profiler import record_function

from protoclip_scale import collectives
from protoclip_scale.data.batches import Batch
from protoclip_scale.data.randomness import raw_keys
from protoclip_scale.engine.compilation import num_graphs
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.faults import event
from protoclip_scale.engine.profile import StepProfiler
from protoclip_scale.engine.throughput import Throughput
from protoclip_scale.engine.trainer import Loss, Trainer
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.prototypes.recording import COLUMNS, Recorder


def _timed(batches: Iterator[Batch], waits: list[float]) -> Iterator[Batch]:
    while True:
        start = time.perf_counter()
        with record_function("data wait"):
            batch = next(batches, None)
        waits.append(time.perf_counter() - start)
        if batch is None:
            return
        yield batch


def _averaged(loss: Loss) -> dict[str, float]:
    """Loss terms over all ranks; a collective."""
    values = torch.stack([loss.total.detach(), *loss.terms.values()]).double()
    mean = collectives.host_values(collectives.all_reduce(values) / collectives.world_size())
    return {"loss": mean[0], **{f"loss/{name}": value for name, value in zip(loss.terms, mean[1:], strict=True)}}


def _seed_towers(seed: int, step: int) -> None:
    """For modules of users that draw from torch's own generators (ours do not, see models/row_dropout.py): their state at a step is f(seed, step, rank), whatever was drawn before, in this process or another."""
    torch.manual_seed(int(raw_keys(1, seed, "towers", step, collectives.rank())[0]) >> 1)


def train_episode(
    run: RunContext,
    trainer: Trainer,
    batches: Iterator[Batch],
    episode: int,
    step: int,
    prototypes: EpisodePrototypes | None,
    recorder: Recorder | None,
    throughput: Throughput,
    profiler: StepProfiler,
) -> Iterator[int]:
    """Train on batches of the episode; yields the number of steps of the run taken so far, after each one. ``recorder`` keeps the features of the steps that
    were taken."""
    recipe, total = run.recipe, run.schedule.total_steps
    recorded = frozenset(COLUMNS.values()) if recorder else frozenset()
    waits: list[float] = []
    throughput.begin(trainer.wants(episode), trainer.trained)
    trainer.model.train()
    profiler.at(step)
    window_start, window_steps = time.perf_counter(), 0
    for batch in _timed(batches, waits):
        run.bad_rows.add(batch)
        _seed_towers(recipe.data.plan.seed, step)
        loss = trainer.loss(batch, episode, prototypes, recorded)
        event("train.forward")
        update = trainer.step(loss, step, run.stop.raised)
        run.stop.agreed |= update.stop
        if update.taken:
            run.nonfinite.passed()
        else:
            run.nonfinite.skipped(batch, step, loss.total)
        if update.taken and recorder:
            recorder.write(batch.slots, batch.row_ids, loss.features)
        run.trace.write(step, batch.row_ids)
        throughput.add(batch.token_lengths)
        step, window_steps = step + 1, window_steps + 1
        if step % recipe.run.log_steps == 0 or step == total:
            elapsed = time.perf_counter() - window_start - throughput.paused
            figures = _averaged(loss) | {
                "lr": trainer.schedule.learning_rates(step - 1)["other"],
                "gradient_norm": update.norm,
                **throughput.figures(elapsed),
                "data_wait_share": sum(waits) / elapsed,
                "memory_gb": psutil.Process().memory_info().rss / 2**30,
            }
            if recipe.optim.compile_blocks:
                figures["compiled_graphs"] = num_graphs()
            if run.nonfinite.total:
                figures["skipped_steps"] = run.nonfinite.total
            figures |= {f"scale/{name.removesuffix('_scale')}": value.item() for name, value in loss.features.items() if name.endswith("_scale")}
            samples = step * recipe.data.plan.global_batch
            run.log.metrics("train", step=step, samples=samples, episode=episode, **figures)
            run.learning.look(step, samples, {name: figures[f"loss/{name}"] for name in loss.terms if trainer.objectives[name].finds_partners})
            run.console.step(figures | {"step": step, "total_steps": total, "eta_seconds": (total - step) * elapsed / window_steps})
            window_start, window_steps = time.perf_counter(), 0
            waits.clear()
        run.samples_trained += recipe.data.plan.global_batch
        run.console.advance(batch.step + 1)
        event("train.step")
        profiler.at(step)
        del loss  # or its features would stand beside the next step's
        yield step
        if step == total:
            return
