"""Where the features of an episode's clustering come from: ``prototypes.refresh``.

    episode    an extraction pass over the episode's rows with the present weights: the paper's method
    recorded   what training recorded at each row's previous visit; while less than half of the rows have one, as online
    online     what training recorded in the episode before, whose rows stand for the coming ones
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protoclip_scale import collectives
from protoclip_scale.data.plan import EpisodePlan, Plan
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.extraction import extract, features_folder
from protoclip_scale.engine.strategy import Strategy
from protoclip_scale.prototypes import recording
from protoclip_scale.prototypes.fixed_point import reduce_array
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.recipe.schema import Recipe

ENOUGH_RECORDED = 0.5  # of an episode's rows: fewer would leave most clusters without their usual ten


@dataclass(frozen=True)
class ClusterRows:
    """The rows that a clustering is made of, those of the own lanes; arrays are memory-mapped.

    ``features``: [n_l, d] by modality, image and text; ``row_ids``, ``positions`` int64 [n_l]: which rows they
    are, and where they stand in ``episode``, the one whose rows they are. ``folder``: of this clustering alone, to be removed after it, or None.
    """

    episode: int
    features: dict[str, list[np.ndarray]]
    row_ids: list[np.ndarray]
    positions: list[np.ndarray]
    folder: Path | None


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


def _of_the_episode_before(source: Source) -> ClusterRows:
    before = source.plan.number - 1
    return _rows_of(source.run, recording.open_recorded(source.run.folder, before), before, None)


def _of_previous_visits(source: Source) -> ClusterRows:
    run, episode = source.run, source.plan.number
    stores = (recording.open_recorded(run.folder, number) for number in reversed(range(max(0, episode - looks_back(run.recipe, run.plan)), episode)))
    wanted = source.plan.row_ids[run.lanes.start : run.lanes.stop].reshape(-1)
    visits = recording.latest_visits(stores, wanted)
    found = np.sort(np.concatenate([indices for _, _, indices, _ in visits])) if visits else np.empty(0, dtype=np.int64)
    if reduce_array(np.array([len(found)]))[0] < ENOUGH_RECORDED * run.plan.episode_size:
        return _of_the_episode_before(source)
    # One array per own lane in a file of this rank's own: the visits lie scattered over an epoch's stores, k-means passes over them many times.
    lane_of_found = found // run.plan.lane_rows
    rows_of_lane = [found[lane_of_found == number] for number in range(len(run.lanes))]
    store = FeatureStore.create(
        features_folder(run.scratch, episode) / f"rank-{collectives.rank():05d}",
        dict.fromkeys(recording.COLUMNS, run.recipe.model.prototype_heads.dim),
        len(run.lanes),
        [len(rows) for rows in rows_of_lane],
        dtype=recording.DTYPE,
        info={"run_id": run.run_id, "episode": episode, "plan": run.plan.fingerprint},
    )
    place = np.full(len(wanted), -1, dtype=np.int64)
    place[found] = np.concatenate([np.arange(len(rows)) for rows in rows_of_lane])
    writers = [store.writer(part) for part in range(store.num_parts)]
    for recorded, part, indices, rows in visits:
        values = {column: recorded.rows(column, part, rows) for column in recording.COLUMNS}
        for number, writer in enumerate(writers):
            mine = indices // run.plan.lane_rows == number
            if mine.any():
                writer.write(place[indices[mine]], {column: array[mine] for column, array in values.items()})
    for writer in writers:
        writer.close()
    sealed = store.seal()
    first = run.lanes.start * run.plan.lane_rows
    return ClusterRows(
        episode,
        {column: [sealed.read(column, part) for part in range(sealed.num_parts)] for column in sealed.columns},
        [wanted[rows] for rows in rows_of_lane],
        [first + rows for rows in rows_of_lane],
        features_folder(run.scratch, episode),
    )


def _rows_of(run: RunContext, store: FeatureStore, episode: int, folder: Path | None) -> ClusterRows:
    """The own lanes of a store with one part per lane. Rows that were never written, since their step was skipped, are left out."""
    features: dict[str, list[np.ndarray]] = {column: [] for column in store.columns}
    row_ids, positions = [], []
    for lane in run.lanes:
        written = np.flatnonzero(store.written(lane))
        whole = len(written) == store.part_rows[lane]
        for column, parts in features.items():
            stored = store.read(column, lane)
            parts.append(stored if whole else stored[written])
        row_ids.append(np.asarray(store.row_ids(lane))[written])
        positions.append(lane * run.plan.lane_rows + written)
    return ClusterRows(episode, features, row_ids, positions, folder)


POLICIES: dict[str, Callable[[Source], ClusterRows]] = {"episode": _extracted, "recorded": _of_previous_visits, "online": _of_the_episode_before}


def rows_to_cluster(source: Source) -> ClusterRows:
    """The rows and features of the next clustering, by the recipe's policy; a collective."""
    return POLICIES[source.run.recipe.prototypes.refresh](source)


def looks_back(recipe: Recipe, plan: Plan) -> int:
    """How many recorded episodes a clustering may look into: none, the one before, or as many as hold an epoch."""
    if recipe.prototypes is None:
        return 0
    return {"episode": 0, "online": 1, "recorded": -(-plan.num_rows // plan.episode_size) + 1}[recipe.prototypes.refresh]


def remove(rows: ClusterRows) -> None:
    """The folder of a clustering that is published."""
    if rows.folder:
        collectives.on_each_machine(lambda: shutil.rmtree(rows.folder, ignore_errors=True))
