"""Units and groups of a teacher's extraction: every row once, whatever the blocks, and shares that fit any number of processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoclip_scale.prototypes import teacher_work
from protoclip_scale.prototypes.teacher_work import MAX_GROUPS, MIN_GROUP_ROWS, UNIT_ROWS, Work

blocks = st.lists(st.lists(st.one_of(st.integers(0, 80), st.integers(900, 5000)), min_size=1, max_size=12), min_size=1, max_size=4)


def rows_of(work: Work, unit: int) -> list[tuple[int, int, int]]:
    first = int(work.first_in_block[unit])
    return [(int(work.source[unit]), int(work.block[unit]), row) for row in range(first, first + int(work.rows[unit]))]


@settings(max_examples=30, deadline=None)
@given(blocks)
def test_units_and_groups_hold_every_row_once_and_in_order(block_rows):
    work = Work.of_sources([np.array(rows) for rows in block_rows])
    expected = [(s, b, row) for s, rows in enumerate(block_rows) for b, count in enumerate(rows) for row in range(count)]
    units = [unit for group in range(len(work.group_rows)) for unit in work.units_of(group)]
    assert units == list(range(len(work.rows)))
    assert [row for unit in units for row in rows_of(work, unit)] == expected
    assert not len(work.rows) or (work.rows.min() >= 1 and work.rows.max() <= UNIT_ROWS)
    first_of_source = [sum(map(sum, block_rows[:source])) for source in range(len(block_rows))]
    for group, group_rows in enumerate(work.group_rows):
        own = work.units_of(group)
        assert len({int(work.source[unit]) for unit in own}) == 1 and group_rows < 2 * MIN_GROUP_ROWS + 2 * UNIT_ROWS
        assert [work.rows_in_group(unit) for unit in own] == [slice(int(a), int(b)) for a, b in zip(np.cumsum(work.rows[own]) - work.rows[own], np.cumsum(work.rows[own]), strict=True)]
    for unit in units:
        row = rows_of(work, unit)[0]
        assert expected[first_of_source[row[0]] + int(work.first_in_source[unit])] == row


@settings(max_examples=30, deadline=None)
@given(blocks, st.integers(1, 9), st.integers(0, 2**32))
def test_shares_split_the_groups_among_any_number_of_processes(block_rows, world, seed):
    work = Work.of_sources([np.array(rows) for rows in block_rows])
    groups = np.flatnonzero(np.random.default_rng(seed).random(len(work.group_rows)) < 0.7).tolist()
    shares = [work.share(groups, rank, world) for rank in range(world)]
    assert sum(shares, []) == groups
    rows = [sum(work.group_rows[group] for group in share) for share in shares]
    largest = max((work.group_rows[group] for group in groups), default=0)
    assert all(abs(own - sum(rows) / world) <= largest for own in rows)


def test_a_sample_is_a_seeded_choice_of_units_that_takes_all_when_it_may():
    work = Work.of_sources([np.full(300, 64), np.array([20_000])])
    for wanted in (1, 500, 10_000):
        sample, chosen = work.sample(wanted)
        assert wanted <= sample.num_rows < wanted + UNIT_ROWS
        assert (np.diff(chosen) > 0).all() and [rows_of(sample, n) for n in range(len(chosen))] == [rows_of(work, unit) for unit in chosen]
        assert np.array_equal(chosen, work.sample(wanted)[1])
    of_large_block = sample.rows[sample.source == 1].sum() / sample.num_rows
    assert 0.3 < of_large_block < 0.7, "one large block and many small ones are both represented"
    everything, chosen = work.sample(10**9)
    assert np.array_equal(chosen, np.arange(len(work.rows))) and everything.num_rows == work.num_rows


def test_fifteen_million_rows_are_some_hundred_groups():
    work = Work.of_sources([np.full(15_389, 1000)])
    assert work.num_rows == 15_389_000 and MAX_GROUPS // 2 < len(work.group_rows) <= MAX_GROUPS
    assert sum(array.nbytes for array in vars(work).values()) < 2e6


@pytest.mark.parametrize("world", [1, 2, 64])
def test_a_process_meets_each_block_in_one_run(world, monkeypatch):
    monkeypatch.setattr(teacher_work, "MIN_GROUP_ROWS", 100)
    work = Work.of_sources([np.array([10_000, 30, 5_000])])
    owners = [work.share(list(range(len(work.group_rows))), rank, world) for rank in range(world)]
    for groups in owners:
        assert groups == list(range(groups[0], groups[0] + len(groups))) if groups else True
