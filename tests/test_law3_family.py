"""Law 3 for what further objectives bring: views, heads, and a state, which is a queue here; killed and resumed equals never killed, at two ranks."""

import pytest
import torch

from tests.runs import check_equal, history, save_again
from tests.support import TINY, final_tensors, output, pretrain

OBJECTIVES = "objectives={clip: null, simclr: {hidden_dim: 32, dim: 16}, mlm: {}, neighbour: {size: 100}}"  # the batch of 64 does not divide the queue
SETTINGS = (*TINY, "model.image.name=test_convnext", "run.checkpoint_steps=2", "model.text.mask_token=true", "schedule.total=2 episodes", OBJECTIVES)
KILLS = ("train.step:3", "checkpoint.written:1", "train.forward:2")
RANKS = 2


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain(run, "demo_clip.yaml", SETTINGS, ranks=RANKS) == [0] * RANKS, output(run)
    return run


def test_a_killed_run_equals_one_never_killed(tmp_path, never_killed):
    run = tmp_path / "run"
    for number, event in enumerate(KILLS):
        codes = pretrain(run, "demo_clip.yaml", SETTINGS, ranks=RANKS, env={"PROTOCLIP_KILL_AT": f"{event}@{number % RANKS}"})
        assert codes[number % RANKS] == -9, f"{event} never fired: {codes} {output(run)[-2000:]}"
    assert pretrain(run, "demo_clip.yaml", SETTINGS, ranks=RANKS) == [0] * RANKS, output(run)
    check_equal(run, never_killed)
    state = {name: tensor for name, tensor in final_tensors(never_killed).items() if name.startswith("objective/")}
    assert state.keys() == {"objective/neighbour/entries", "objective/neighbour/pushed"}
    assert int(state["objective/neighbour/pushed"]) == 8 * 2 * 64 and state["objective/neighbour/entries"].any(-1).all()
    torch.testing.assert_close(state["objective/neighbour/entries"].norm(dim=-1), torch.ones(1, 100))


def test_the_same_with_another_number_of_ranks(tmp_path, never_killed):
    """The queue of one rank is that of two, to rounding, and a run goes on from either."""
    run = tmp_path / "run"
    assert pretrain(run, "demo_clip.yaml", SETTINGS, ranks=RANKS, env={"PROTOCLIP_STOP_AT": "train.step:2"}) == [75] * RANKS, output(run)
    assert pretrain(run, "demo_clip.yaml", SETTINGS) == [0], output(run)
    expected, found = history(never_killed), history(run)
    assert expected.keys() == found.keys()
    assert all(found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4) for step in expected)


def test_a_resumption_with_an_empty_queue_fails_the_law(tmp_path, never_killed):
    run = tmp_path / "run"
    pretrain(run, "demo_clip.yaml", SETTINGS, ranks=RANKS, env={"PROTOCLIP_KILL_AT": "train.step:3@0"})
    save_again(run, lambda name, tensor: torch.zeros_like(tensor) if name.startswith("objective/") else tensor)
    pretrain(run, "demo_clip.yaml", SETTINGS, ranks=RANKS)
    assert history(run) != history(never_killed)
