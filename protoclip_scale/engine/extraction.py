"""The extract phase: features of every position of an episode, into the memory-mapped store; each rank writes its lanes."""

import shutil
from pathlib import Path

import torch

from protoclip_scale import collectives
from protoclip_scale.data.batches import Batch, EpisodeBatches, make_loader
from protoclip_scale.data.plan import EpisodePlan
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.faults import event
from protoclip_scale.engine.strategy import Strategy
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.prototypes.teacher import TeacherFeatures

FEATURES = {"image": "image_prototype", "text": "text_prototype"}


def features_folder(scratch: Path, episode: int) -> Path:
    return scratch / f"features-{episode:06d}"


def _created(run: RunContext, columns: dict[str, int], episode: int, step: int) -> FeatureStore:
    """The episode's store, on each machine; one begun by the same run from the same weights goes on, any other is replaced."""
    folder = features_folder(run.scratch, episode)
    info = {"run_id": run.run_id, "episode": episode, "model_step": step, "plan": run.plan.fingerprint}

    def begin() -> None:
        try:
            FeatureStore.create(folder, columns, run.recipe.data.plan.lanes, run.plan.lane_rows, info=info)
        except UserError:
            shutil.rmtree(folder)
            FeatureStore.create(folder, columns, run.recipe.data.plan.lanes, run.plan.lane_rows, info=info)

    collectives.on_each_machine(begin)
    return FeatureStore.create(folder, columns, run.recipe.data.plan.lanes, run.plan.lane_rows, info=info)


def extract(
    run: RunContext, strategy: Strategy, plan: EpisodePlan, teacher: TeacherFeatures | None, episode: int, step: int
) -> FeatureStore:
    """Features of the episode under the weights of ``step``; goes on where a killed extraction of the same weights stopped.

    Evaluation mode and transform, no gradient (the published code clustered augmented pictures, methods 6.9). The teacher's features are looked up here, by the row that really stands at a position (a replaced row is another row).
    """
    columns = dict.fromkeys(FEATURES, run.recipe.model.prototype_heads.dim) | ({"teacher": teacher.dim} if teacher else {})
    store = _created(run, columns, episode, step)
    writers = [store.writer(lane) for lane in run.lanes]
    per_lane = run.plan.per_lane
    pending = min((int(rows[0]) if len(rows := writer.pending()) else run.plan.lane_rows) for writer in writers)
    # Ranks may stand at different places after a kill, and stops are agreed block by block: all begin with the furthest behind.
    first_step = min(collectives.all_gather_objects(pending)) // per_lane
    batches = EpisodeBatches(
        run.recipe.data, run.recipe.model.image.size, run.tokenizer, plan, run.spool, run.lanes, purpose="extract", seed=run.recipe.data.plan.seed
    )
    strategy.bare_model.eval()
    try:
        for batch in make_loader(batches, first_step, run.recipe.data.workers, pin_memory=run.device.type == "cuda"):
            run.bad_rows.add(batch)
            arrays = _features(strategy, batch)
            if teacher:
                arrays["teacher"] = teacher.rows(batch.row_ids)
            for i, writer in enumerate(writers):
                mine = slice(i * per_lane, (i + 1) * per_lane)
                writer.write(slice(batch.step * per_lane, (batch.step + 1) * per_lane), {c: array[mine] for c, array in arrays.items()})
            event("extract.block")
            run.stop.agree()
            run.console.advance((batch.step + 1) * run.recipe.data.plan.global_batch)
    finally:
        for writer in writers:
            writer.close()
    collectives.barrier()
    collectives.on_each_machine(lambda: store.seal(run.lanes_of_node))
    return FeatureStore.open(store.folder)


@torch.inference_mode()
def _features(strategy: Strategy, batch: Batch) -> dict[str, object]:
    with strategy.precision.autocast():
        features = strategy.bare_model(
            batch.images.to(strategy.device, non_blocking=True),
            batch.token_ids.to(strategy.device, non_blocking=True),
            batch.token_lengths.to(strategy.device, non_blocking=True),
            wants=frozenset(FEATURES.values()),
        )
    return {column: features[name].float().cpu().numpy() for column, name in FEATURES.items()}
