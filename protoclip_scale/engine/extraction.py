"""The extract phase: features of every position of an episode, into the memory-mapped store; each rank writes its lanes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from protoclip_scale import collectives
from protoclip_scale.data.batches import Batch, EpisodeBatches, make_loader
from protoclip_scale.data.plan import EpisodePlan
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.encoding import FEATURES, Encoder, batches_together, blocks
from protoclip_scale.engine.faults import event
from protoclip_scale.engine.strategy import Strategy
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore


def features_folder(scratch: Path, episode: int) -> Path:
    return scratch / f"features-{episode:06d}"


def _created(run: RunContext, columns: dict[str, int], episode: int, step: int) -> FeatureStore:
    """The episode's store, on each machine; one begun by the same run from the same weights goes on, any other is replaced."""
    folder = features_folder(run.scratch, episode)
    info = {"run_id": run.run_id, "episode": episode, "model_step": step, "plan": run.plan.fingerprint}

    def begin() -> None:
        try:
            FeatureStore.create(folder, columns, run.recipe.data.plan.lanes, run.plan.lane_rows, info=info, row_ids=True)
        except UserError:
            shutil.rmtree(folder)
            FeatureStore.create(folder, columns, run.recipe.data.plan.lanes, run.plan.lane_rows, info=info, row_ids=True)

    collectives.on_each_machine(begin)
    return FeatureStore.create(folder, columns, run.recipe.data.plan.lanes, run.plan.lane_rows, info=info, row_ids=True)


def extract(run: RunContext, strategy: Strategy, plan: EpisodePlan, episode: int, step: int) -> FeatureStore:
    """Features of the episode under the weights of ``step``; goes on where a killed extraction of the same weights stopped.

    Evaluation mode and transform, no gradient (the published code clustered augmented pictures, methods 6.9). Row ids are those of the rows that really stand at a position: a replaced row is another row.
    """
    columns = dict.fromkeys(FEATURES, run.recipe.model.prototype_heads.dim)
    store = _created(run, columns, episode, step)
    writers = [store.writer(lane) for lane in run.lanes]
    per_lane = run.plan.per_lane
    pending = min((int(rows[0]) if len(rows := writer.pending()) else run.plan.lane_rows) for writer in writers)
    together = batches_together(per_lane * len(run.lanes))
    # Ranks may stand at different places after a kill, and stops are agreed batch by batch: all begin with the furthest behind. Blocks begin where they
    # always do, so that a resumed extraction computes the same products, and the same bits, as one that was never stopped.
    first_step = min(collectives.all_gather_objects(pending)) // per_lane // together * together
    batches = EpisodeBatches(
        run.recipe.data, run.recipe.model.image.size, run.tokenizer, plan, run.spool, run.lanes, purpose="extract", seed=run.recipe.data.plan.seed
    )
    loader = make_loader(batches, first_step, run.recipe.data.workers, pin_memory=run.device.type == "cuda")
    try:
        with strategy.evaluating(strategy.precision.dtype):
            for batch, arrays in _encoded(strategy, loader, together):
                run.bad_rows.add(batch)
                for i, writer in enumerate(writers):
                    mine = slice(i * per_lane, (i + 1) * per_lane)
                    writer.write(slice(batch.step * per_lane, (batch.step + 1) * per_lane), {c: array[mine] for c, array in arrays.items()}, batch.row_ids[mine].numpy())
                event("extract.block")
                run.stop.agree()
                run.console.advance((batch.step + 1) * run.recipe.data.plan.global_batch)
    finally:
        for writer in writers:
            writer.close()
    collectives.barrier()
    collectives.on_each_machine(lambda: store.seal(run.lanes_of_node))
    return FeatureStore.open(store.folder)


def _encoded(strategy: Strategy, batches: Iterator[Batch], together: int) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Each batch with its features by column; ``together`` of them are encoded at once."""
    encoder: Encoder | None = None
    for block in blocks(batches, together):
        encoder = encoder or Encoder(strategy, block[0])
        yield from zip(block, encoder(block), strict=True)
