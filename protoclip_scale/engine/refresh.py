"""Where the features of an episode's clustering come from: ``prototypes.refresh``.

    episode    an extraction pass over the episode's rows with the present weights: the paper's method
    recorded   what training recorded at each row's previous visit; while less than half of the rows have one, as online. Rows without one are not clustered
    online     what training recorded in the episode before, whose rows stand for the coming ones
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from protoclip_scale import collectives
from protoclip_scale.data.plan import EpisodePlan, Plan
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.extraction import extract, features_folder
from protoclip_scale.engine.strategy import Strategy
from protoclip_scale.prototypes import recording
from protoclip_scale.prototypes.fixed_point import reduce_array
from protoclip_scale.prototypes.store import BLOCK_ROWS, FeatureStore
from protoclip_scale.recipe.schema import Recipe

ENOUGH_RECORDED = 0.5  # of an episode's rows: fewer would leave most clusters without their usual ten


@dataclass(frozen=True)
class ClusterRows:
    """The rows that a clustering is made of, those of the own lanes; arrays are memory-mapped.

    ``features``: [n_l, d] by modality, image and text; ``row_ids``, ``positions`` int64 [n_l]: which rows they
    are, and where they stand in ``episode``, the one whose rows they are. ``folder``: of this clustering alone, to be removed after it, or None.
    ``found``: the share of the coming episode's rows that have a previous visit, if one was looked for.
    """

    episode: int
    features: dict[str, list[np.ndarray]]
    row_ids: list[np.ndarray]
    positions: list[np.ndarray]
    folder: Path | None
    found: float | None = None


@dataclass(frozen=True)
class Source:
    """What a policy may use."""

    run: RunContext
    strategy: Strategy
    plan: EpisodePlan
    step: int


def _extracted(source: Source) -> ClusterRows:
    run, episode = source.run, source.plan.number
    with run.phase("extract", episode, total=run.plan.episode_size, unit="rows"):
        store = extract(run, source.strategy, source.plan, episode, source.step)
    run.bad_rows.check()
    return _rows_of(run, store, episode, store.folder)


def _of_previous_visits(source: Source) -> ClusterRows:
    run, episode = source.run, source.plan.number
    stores = (recording.open_recorded(run.folder, number) for number in reversed(range(max(0, episode - looks_back(run.recipe, run.plan)), episode)))
    wanted = source.plan.row_ids[run.lanes.start : run.lanes.stop].reshape(-1)
    visits = recording.latest_visits(stores, wanted)
    found = np.sort(np.concatenate([indices for _, _, indices, _ in visits])) if visits else np.empty(0, dtype=np.int64)
    share = int(reduce_array(np.array([len(found)]))[0]) / run.plan.episode_size
    if share < ENOUGH_RECORDED:
        return replace(_of_the_episode_before(source), found=share)
    lane_of_found = found // run.plan.lane_rows
    rows_of_lane = [found[lane_of_found == number] for number in range(len(run.lanes))]
    place = np.full(len(wanted), -1, dtype=np.int64)
    place[found] = np.concatenate([np.arange(len(rows)) for rows in rows_of_lane])
    # A file of this rank's own for each lane: the visits lie scattered over the stores of two epochs, and k-means passes over them many times.
    store = _own_store(run, episode, [len(rows) for rows in rows_of_lane])
    writers = [store.writer(part) for part in range(store.num_parts)]
    for recorded, part, indices, rows in visits:
        values = {column: recorded.rows(column, part, rows) for column in recording.COLUMNS}
        for number, writer in enumerate(writers):
            mine = indices // run.plan.lane_rows == number
            if mine.any():
                writer.write(place[indices[mine]], {column: array[mine] for column, array in values.items()})
    for writer in writers:
        writer.close()
    first = run.lanes.start * run.plan.lane_rows
    return ClusterRows(
        episode,
        _columns(store.seal()),
        [wanted[rows] for rows in rows_of_lane],
        [first + rows for rows in rows_of_lane],
        features_folder(run.scratch, episode),
        found=share,
    )


def _of_the_episode_before(source: Source) -> ClusterRows:
    run, before = source.run, source.plan.number - 1
    store = recording.open_recorded(run.folder, before)
    rows = _rows_of(run, store, before, None)
    if all(len(positions) == run.plan.lane_rows for positions in rows.positions):
        return rows
    copied = _own_store(run, source.plan.number, [len(positions) for positions in rows.positions])  # without the rows of skipped steps
    for part, (lane, positions) in enumerate(zip(run.lanes, rows.positions, strict=True)):
        with copied.writer(part) as writer:
            for some in np.array_split(positions - lane * run.plan.lane_rows, max(1, len(positions) // BLOCK_ROWS)):
                first = int(np.searchsorted(positions, some[0] + lane * run.plan.lane_rows)) if len(some) else 0
                writer.write(np.arange(first, first + len(some)), {column: store.rows(column, lane, some) for column in store.columns})
    return replace(rows, features=_columns(copied.seal()), folder=features_folder(run.scratch, source.plan.number))


def _own_store(run: RunContext, episode: int, rows: list[int]) -> FeatureStore:
    """An empty one in scratch for the recorded features of this rank's lanes; what a killed attempt left there, perhaps of other lanes, goes."""
    folder = features_folder(run.scratch, episode) / f"rank-{collectives.rank():05d}"
    shutil.rmtree(folder, ignore_errors=True)
    dim, info = run.recipe.model.prototype_heads.dim, {"run_id": run.run_id, "episode": episode, "plan": run.plan.fingerprint}
    return FeatureStore.create(folder, dict.fromkeys(recording.COLUMNS, dim), len(rows), rows, dtype=recording.DTYPE, info=info)


def _columns(store: FeatureStore) -> dict[str, list[np.ndarray]]:
    return {column: [store.read(column, part) for part in range(store.num_parts)] for column in store.columns}


def _rows_of(run: RunContext, store: FeatureStore, episode: int, folder: Path | None) -> ClusterRows:
    """The own lanes of a store with one part per lane. Row ids and positions leave out rows that were never written, since their step was skipped;
    features do not."""
    written = [np.flatnonzero(store.written(lane)) for lane in run.lanes]
    return ClusterRows(
        episode,
        {column: [store.read(column, lane) for lane in run.lanes] for column in store.columns},
        [np.asarray(store.row_ids(lane))[rows] for lane, rows in zip(run.lanes, written, strict=True)],
        [lane * run.plan.lane_rows + rows for lane, rows in zip(run.lanes, written, strict=True)],
        folder,
    )


POLICIES: dict[str, Callable[[Source], ClusterRows]] = {"episode": _extracted, "recorded": _of_previous_visits, "online": _of_the_episode_before}


def rows_to_cluster(source: Source) -> ClusterRows:
    """The rows and features of the next clustering, by the recipe's policy; a collective."""
    return POLICIES[source.run.recipe.prototypes.refresh](source)


def looks_back(recipe: Recipe, plan: Plan) -> int:
    """How many recorded episodes a clustering may look into: none, the one before, or as many as hold two epochs, since a row that was early in one epoch may be
    late in the next. Sources with weights come round at their own pace: rows that were visited longer ago count as without a visit."""
    if recipe.prototypes is None:
        return 0
    return {"episode": 0, "online": 1, "recorded": -(-2 * plan.num_rows // plan.episode_size)}[recipe.prototypes.refresh]


def remove(rows: ClusterRows) -> None:
    """The folder of a clustering that is published."""
    if rows.folder:
        collectives.on_each_machine(lambda: shutil.rmtree(rows.folder, ignore_errors=True))
