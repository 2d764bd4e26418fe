"""The order of rows: frozen, complete, without repeats, and the same for every number of ranks."""

import hashlib
import tracemalloc
from collections import Counter, defaultdict

import numpy as np
import pytest

from protoclip_scale.data.index import Index
from protoclip_scale.data.plan import EpisodePlan, Plan, check_lanes, lanes_of
from protoclip_scale.data.rows import pack_row_ids, unpack_row_ids
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

NUM_SEEDS = 400


def make_index(block_rows_per_source: list[list[int]]) -> Index:
    source = np.concatenate([np.full(len(rows), number) for number, rows in enumerate(block_rows_per_source)]).astype(np.int64)
    block = np.concatenate([np.arange(len(rows)) for rows in block_rows_per_source]).astype(np.int64)
    names = tuple(f"source {number}" for number in range(len(block_rows_per_source)))
    return Index(names, names, source, block, np.concatenate(block_rows_per_source).astype(np.int64))


def random_plan(seed: int) -> Plan:
    """Unequal blocks (empty ones too), one or two sources, sometimes a subset; episodes of any share of the epoch."""
    rng = np.random.default_rng(seed)
    index = make_index([rng.integers(0, rng.choice([3, 12, 60]), rng.integers(1, 12)).tolist() + [9] for _ in range(rng.integers(1, 3))])
    epoch_rows = int(rng.integers(8, index.num_rows + 1)) if index.num_rows > 8 and rng.random() < 0.4 else None
    rows = epoch_rows or index.num_rows
    lanes = int(rng.choice([count for count in (1, 2, 4, 8) if count <= rows // 2]))
    per_lane = int(rng.integers(1, max(1, rows // (2 * lanes)) + 1))
    steps = int(rng.integers(2, rows // (per_lane * lanes) + 1))
    batch = per_lane * lanes
    return Plan(index, schema.Plan(seed=seed, epoch_rows=epoch_rows, episode_size=steps * batch, lanes=lanes, global_batch=batch))


def episodes_of(plan: Plan, num_epochs: int) -> list[EpisodePlan]:
    return [plan.episode(number) for number in range(-(-num_epochs * plan.num_rows // plan.episode_size))]


def batches_hash(plan: Plan, episodes: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    for number in episodes:
        episode = plan.episode(number)
        for array in (episode.row_ids, episode.epochs, episode.slot_to_read):
            assert array.dtype == np.int64
            digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


GOLDEN_INDEX = make_index([[64] * 30 + [21], [1000, 3, 0, 517], [7]])
GOLDEN = [
    ({"seed": 0, "episode_size": 1024, "lanes": 8, "global_batch": 64}, (0, 1, 2, 3, 40), "023428284bcfbd74"),
    ({"seed": 7, "episode_size": 999, "lanes": 3, "global_batch": 99}, (0, 5, 1000), "bb20f7361ec5a382"),
    ({"seed": 0, "epoch_rows": 777, "episode_size": 600, "lanes": 2, "global_batch": 100}, (0, 1, 2), "e413f828cb680f16"),
]


@pytest.mark.parametrize(("settings", "episodes", "expected"), GOLDEN)
def test_the_order_of_rows_is_frozen(settings, episodes, expected):
    """If this fails, runs could not be resumed or compared any more: raise PLAN_VERSION only with a reason."""
    assert batches_hash(Plan(GOLDEN_INDEX, schema.Plan(**settings)), episodes) == expected


@pytest.mark.parametrize("part", range(4))
def test_every_row_once_per_epoch_and_never_twice_in_a_batch(part):
    num_crossing = 0
    for seed in range(part, NUM_SEEDS, 4):
        plan = random_plan(seed)
        rows_of_epoch = defaultdict(Counter)
        for episode in episodes_of(plan, 3):
            for epoch in np.unique(episode.epochs):
                rows_of_epoch[int(epoch)].update(episode.row_ids[episode.epochs == epoch].tolist())
            num_crossing += episode.epochs.min() != episode.epochs.max()
            for step in range(plan.steps_per_episode):
                batch = episode.batch_row_ids(step)
                assert len(batch) == plan.settings.global_batch == len(set(batch.tolist())), (seed, episode.number, step)
        everything = set(rows_of_epoch[0])
        assert len(everything) == plan.num_rows
        for epoch in range(3):
            assert set(rows_of_epoch[epoch]) == everything, (seed, epoch)
            assert set(rows_of_epoch[epoch].values()) == {1}, (seed, epoch)
        source, block, row = unpack_row_ids(np.array(sorted(everything)))
        for number in range(len(source)):
            at = (plan.index.block_source == source[number]) & (plan.index.block_number == block[number])
            assert row[number] < plan.index.block_rows[at].item()
    assert num_crossing > 50  # the seeds must reach the hard case


def test_without_the_swaps_a_batch_would_hold_a_row_twice(monkeypatch):
    """The test above can see the fault it looks for."""
    monkeypatch.setattr("protoclip_scale.data.plan.separate_repeats", lambda *arguments: None)
    repeated = 0
    for seed in range(40):
        plan = random_plan(seed)
        for episode in episodes_of(plan, 2):
            batches = [episode.batch_row_ids(step).tolist() for step in range(plan.steps_per_episode)]
            repeated += any(len(set(batch)) < len(batch) for batch in batches)
    assert repeated > 5


def test_ranks_that_share_the_lanes_make_the_same_batches():
    for seed in range(100):
        plan = random_plan(seed)
        lanes = plan.settings.lanes
        episode = plan.episode(seed % 5)
        for world in (count for count in (1, 2, 4, 8) if lanes % count == 0):
            owned = [lane for rank in range(world) for lane in lanes_of(rank, world, lanes)]
            assert owned == list(range(lanes))
            for step in range(plan.steps_per_episode):
                gathered = np.concatenate([episode.row_ids[lane, episode.slots(step)] for lane in owned])
                assert np.array_equal(gathered, episode.batch_row_ids(step))


def test_a_block_is_read_in_one_piece_by_at_most_two_lanes():
    for seed in range(200):
        plan = random_plan(seed)
        readers = defaultdict(set)
        for episode in episodes_of(plan, 2):
            for lane in range(plan.settings.lanes):
                order = episode.read_order(lane)
                assert np.array_equal(order[episode.spool_rows(lane)], episode.row_ids[lane])
                assert np.array_equal(np.sort(episode.spool_rows(lane)), np.arange(plan.lane_rows))
                epochs = np.empty_like(order)
                epochs[episode.spool_rows(lane)] = episode.epochs[lane]
                source, block, _ = unpack_row_ids(order)
                runs = np.stack([epochs, source, block], axis=1)
                runs = runs[np.append(True, np.any(runs[1:] != runs[:-1], axis=1))]
                assert len(np.unique(runs, axis=0)) == len(runs)  # one piece per block and epoch
                for run in runs.tolist():
                    readers[tuple(run)].add((episode.number, lane))
        sizes = {
            (int(s), int(b)): int(r)
            for s, b, r in zip(plan.index.block_source, plan.index.block_number, plan.index.block_rows, strict=True)
        }
        for (_, source, block), owners in readers.items():
            if sizes[source, block] <= plan.lane_rows:
                assert len(owners) <= 2, (seed, source, block)


def test_epochs_differ_and_batches_mix_distant_blocks():
    plan = Plan(make_index([[50] * 40]), schema.Plan(episode_size=2000, lanes=4, global_batch=40))
    first, second = plan.episode(0), plan.episode(1)
    assert np.array_equal(np.sort(first.row_ids, axis=None), np.sort(second.row_ids, axis=None))
    assert np.mean(first.row_ids == second.row_ids) < 0.01
    blocks = [len(set(unpack_row_ids(first.batch_row_ids(step))[1].tolist())) for step in range(50)]
    assert np.mean(blocks) > 20  # 40 rows thrown on 40 blocks, ten to each lane of ten blocks: 26 expected


def test_a_subset_is_uniform_and_stays_the_same_over_epochs():
    """Each row of 60 is in a subset of 20 with probability 1/3, whatever its block."""
    index = make_index([[30, 1, 9], [20]])
    counts = Counter()
    num_draws = 600
    for seed in range(num_draws):
        plan = Plan(index, schema.Plan(seed=seed, epoch_rows=20, episode_size=20, lanes=1, global_batch=10))
        rows = set(plan.episode(0).row_ids.reshape(-1).tolist())
        assert len(rows) == 20
        assert rows == set(plan.episode(1).row_ids.reshape(-1).tolist())
        counts.update(rows)
    assert len(counts) == 60
    deviations = (np.array(list(counts.values())) - num_draws / 3) / np.sqrt(num_draws * (1 / 3) * (2 / 3))
    assert np.abs(deviations).max() < 4.5
    assert 0.5 < np.mean(deviations**2) < 1.6


def test_millions_of_rows_cost_what_an_episode_costs():
    index = make_index([[9993] * 1540])
    tracemalloc.start()
    episode = Plan(index, schema.Plan(lanes=8, global_batch=4096)).episode(77)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6  # 15 million row ids alone would be 123 MB
    assert episode.row_ids.shape == (8, 24576)
    assert {int(epoch) for epoch in np.unique(episode.epochs)} <= {0, 1}


def test_other_sources_or_settings_have_another_fingerprint():
    settings = {"episode_size": 100, "lanes": 2, "global_batch": 10}
    plans = [
        Plan(make_index([[100]]), schema.Plan(**settings)),
        Plan(make_index([[100]]), schema.Plan(**settings, seed=1)),
        Plan(make_index([[50], [50]]), schema.Plan(**settings)),
    ]
    assert len({plan.fingerprint for plan in plans}) == 3
    assert plans[0].fingerprint == Plan(make_index([[100]]), schema.Plan(**settings)).fingerprint


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"episode_size": 200, "global_batch": 64, "lanes": 1}, ("200", "192", "150", "128")),
        ({"episode_size": 300, "global_batch": 200, "lanes": 1}, ("200", "150")),
        ({"epoch_rows": 151, "episode_size": 100, "global_batch": 10, "lanes": 1}, ("151", "150")),
        ({"episode_size": 100, "global_batch": 100, "lanes": 1}, ("100", "150", "200")),
    ],
)
def test_impossible_sizes_are_refused_with_their_numbers(settings, numbers):
    with pytest.raises(UserError) as caught:
        Plan(make_index([[100, 50]]), schema.Plan(**settings))
    assert "\n" not in str(caught.value)
    for number in numbers:
        assert number in str(caught.value)


def test_a_world_size_that_does_not_divide_the_lanes_is_refused():
    check_lanes(8, 4)
    with pytest.raises(UserError, match="world size 3 does not divide data.plan.lanes 8: start one of 1, 2, 4, 8 ranks"):
        lanes_of(0, 3, 8)


def test_row_ids_hold_their_limits_and_refuse_more():
    largest = ((1 << 10) - 1, (1 << 27) - 1, (1 << 26) - 1)
    packed = pack_row_ids(*largest)
    assert packed == 2**63 - 1
    assert tuple(int(part) for part in unpack_row_ids(packed)) == largest
    assert pack_row_ids(1, 0, np.arange(3)).tolist() == [(1 << 53) + row for row in range(3)]
    for part in range(3):
        with pytest.raises(UserError, match="does not fit"):
            pack_row_ids(*(limit + (number == part) for number, limit in enumerate(largest)))
