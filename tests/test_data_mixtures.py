"""Sources with weights or limits: exact shares, every row once in each pass over its source, nothing twice in a batch."""

import dataclasses
from collections import Counter, defaultdict

import numpy as np
import pytest

from protoclip_scale.data.plan import Plan
from protoclip_scale.data.rows import unpack_row_ids
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from tests.test_data_plan import batches_hash, make_index

GOLDEN_INDEX = dataclasses.replace(make_index([[64] * 30 + [21], [1000, 3, 0, 517], [150]]), weights=(1.0, 2.5, 0.25), row_limits=(None, 900, None))
GOLDEN_SETTINGS = {"seed": 3, "episode_size": 1024, "lanes": 8, "global_batch": 64}


def random_mixture(seed: int) -> Plan:
    """Two to four sources of unequal blocks and weights, some limited; every source fills its share without a repeat."""
    rng = np.random.default_rng(seed)
    index = make_index([[*rng.integers(0, rng.choice([3, 12, 60]), rng.integers(1, 12)).tolist(), 40] for _ in range(rng.integers(2, 5))])
    sizes = [index.source_rows(source) for source in range(len(index.source_names))]
    limits = tuple(int(rng.integers(35, size + 1)) if rng.random() < 0.3 else None for size in sizes)
    rows = [limit or size for limit, size in zip(limits, sizes, strict=True)]
    weights = tuple(float(weight) for weight in rng.uniform(0.8, 2, len(sizes)))
    lanes, per_lane = int(rng.choice([1, 2, 4])), int(rng.integers(1, 4))
    largest = min(int((row - 3) * sum(weights) / weight) for row, weight in zip(rows, weights, strict=True)) // (lanes * per_lane)
    smallest = max(2, -(-int(3 * sum(weights) / min(weights)) // (lanes * per_lane)))
    steps = min(int(rng.integers(smallest, smallest + 40)), largest)
    index = dataclasses.replace(index, weights=weights, row_limits=limits)
    return Plan(index, schema.Plan(seed=seed, episode_size=steps * lanes * per_lane, lanes=lanes, global_batch=lanes * per_lane))


def test_the_order_of_a_mixture_is_frozen():
    assert batches_hash(Plan(GOLDEN_INDEX, schema.Plan(**GOLDEN_SETTINGS)), (0, 1, 2, 40)) == "6077bb3a7e443d3d"


def test_every_row_of_a_source_once_in_each_pass_and_never_twice_in_a_batch():
    crossings = 0
    for seed in range(120):
        plan = random_mixture(seed)
        passes: dict[tuple[int, int], Counter] = defaultdict(Counter)
        for number in range(12):
            episode = plan.episode(number)
            source, _, _ = unpack_row_ids(episode.row_ids)
            for key in {*zip(source.ravel().tolist(), episode.epochs.ravel().tolist(), strict=True)}:
                passes[key].update(episode.row_ids[(source == key[0]) & (episode.epochs == key[1])].tolist())
            for step in range(plan.steps_per_episode):
                batch = episode.batch_row_ids(step)
                assert len(set(batch.tolist())) == plan.settings.global_batch, (seed, number, step)
        for (source, epoch), rows in passes.items():
            expected = plan.index.row_limits[source] or plan.index.source_rows(source)
            assert set(rows.values()) == {1}, (seed, source, epoch)
            if (source, epoch + 1) in passes:  # a pass that is over
                assert len(rows) == expected, (seed, source, epoch)
                crossings += 1
            if (source, epoch + 1) in passes and (source, epoch + 2) in passes:
                assert set(passes[source, epoch + 1]) == set(rows)  # the same subset in every pass
    assert crossings > 100


def test_shares_are_those_of_the_weights():
    for seed in range(60):
        plan = random_mixture(seed)
        shares = np.array(plan.index.weights) / sum(plan.index.weights)
        total = np.zeros(len(shares), dtype=np.int64)
        for number in range(20):
            source, _, _ = unpack_row_ids(plan.episode(number).row_ids)
            counts = np.bincount(source.ravel(), minlength=len(shares))
            assert np.abs(counts - shares * plan.episode_size).max() < 2
            total += counts
            assert np.abs(total - shares * plan.episode_size * (number + 1)).max() < 2


def test_every_lane_mixes_the_sources():
    index = dataclasses.replace(make_index([[50] * 40, [20] * 50]), weights=(3.0, 1.0))
    episode = Plan(index, schema.Plan(episode_size=1600, lanes=8, global_batch=80)).episode(2)
    source, _, _ = unpack_row_ids(episode.row_ids)
    assert np.abs(source.mean(axis=1) - 0.25).max() < 0.15  # a block of 50 is a quarter of a lane


def test_limits_without_weights_are_a_subset_of_each_source():
    index = dataclasses.replace(make_index([[30, 1, 9], [20, 20]]), row_limits=(17, None))
    plan = Plan(index, schema.Plan(episode_size=56, lanes=2, global_batch=8))
    assert plan.num_rows == 57
    rows = np.concatenate([plan.episode(number).row_ids.ravel() for number in range(3)])
    source, _, _ = unpack_row_ids(np.unique(rows))
    assert Counter(source.tolist()) == {0: 17, 1: 40}


def test_another_weight_or_limit_is_another_plan():
    settings = schema.Plan(**GOLDEN_SETTINGS)
    changes = ({}, {"weights": (1.0, 2.5, 0.3)}, {"row_limits": (None, 901, None)}, {"weights": ()}, {"row_limits": ()})
    fingerprints = [Plan(dataclasses.replace(GOLDEN_INDEX, **change), settings).fingerprint for change in changes]
    assert len(set(fingerprints)) == len(changes)


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({"weights": (1.0, 1.0), "row_limits": (None, 31)}, {}, ("source 1", "rows 31", "30")),
        ({"weights": (1.0, 9.0)}, {}, ("source 1", "36 rows", "40", "30")),
        ({"weights": (1.0, 0.01)}, {}, ("source 1", "0.4 rows", "40")),
        ({"weights": (1.0, 1.0)}, {"global_batch": 40}, ("single global batch", "80")),
    ],
)
def test_impossible_mixtures_are_refused_with_their_numbers(change, settings, words):
    index = dataclasses.replace(make_index([[100], [30]]), **change)
    with pytest.raises(UserError) as caught:
        Plan(index, schema.Plan(**{"episode_size": 40, "lanes": 2, "global_batch": 8} | settings))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), caught.value
