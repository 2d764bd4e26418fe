"""What a rank's watch says of the others, from what it has heard: who is lost, who is late, who waits."""

import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from protoclip_scale import collectives, standing
from protoclip_scale.engine.watch import heard, stacks
from protoclip_scale.engine.watch.heard import Beat, Failure, Member, View, ranks_named, this_member

NOW = 1000.0


def view(me: int = 0, hosts: tuple[str, ...] = ("h0", "h0", "h1", "h1")) -> View:
    """Of ranks that all wait in one collective of step 7 and were heard just now."""
    members = [Member(rank, host, 100 + rank, f"machine of {host}", 0) for rank, host in enumerate(hosts)]
    found = View(members, me, NOW - 60)
    found.answered = found.listened = NOW
    for member in members:
        hear(found, member.rank)
    return found


def hear(found: View, rank: int, ago: float = 0.0, number: int = 5, **changes) -> None:
    beat = Beat(number, "train", 1, 7, 40, 0.5, "any_rank in training.py:50", waits=True)
    found.hear(rank, dataclasses.replace(beat, **changes), NOW - ago)


def test_a_rank_whose_beats_stop_is_silent_and_named_with_its_host_and_place():
    found = view()
    assert found.silent(4) == []
    hear(found, 3, ago=9, number=6, step=6)
    assert found.silent(4) == [3]
    assert found.lost([3], NOW) == "lost rank 3 on h1 (pid 103), last heard 9 s ago in train, episode 2, step 6"
    assert found.lost([2, 3], NOW) == "lost ranks 2-3 on h1, last heard 0 s ago in train, episode 2, step 7"
    assert found.lost([1, 3], NOW).startswith("lost rank 1 on h0 (pid 101), last heard 0 s ago in train, episode 2, step 7; rank 3 on h1 (pid 103), last heard 9 s")
    found.listened = NOW - 8  # had the others not been listened to since, nothing would be known
    assert found.silent(4) == []


def test_a_beat_that_is_read_again_is_no_new_one():
    found = view()
    hear(found, 1, ago=9, number=6)
    hear(found, 1, ago=0, number=6)
    assert found.silent(4) == [1]


def test_a_rank_that_said_that_it_leaves_is_not_lost():
    found = view()
    hear(found, 3, ago=9, number=6, left=True)
    assert found.silent(4) == [] and found.others() == [1, 2]


def test_a_store_that_does_not_answer_takes_the_ranks_of_its_host_with_it():
    found = view(me=3)
    said = found.lost_store("10.0.0.1:29500", NOW)
    assert said.startswith("lost ranks 0-1 on h0, last heard 0 s ago") and said.endswith("the store that the launcher keeps there, at 10.0.0.1:29500, does not answer")
    found.is_store_gone = True
    assert found.lost_store("10.0.0.1:29500", NOW).endswith("is gone")
    assert found.first_elsewhere() == 2 and view(hosts=("h0", "h0")).first_elsewhere() == 1


def test_the_first_failure_is_told_with_its_rank_and_what_others_lost_as_it_is():
    found = view()
    found.failure = Failure(2, "data: 9 of 10 rows could not be decoded", own=True)
    assert found.failed() == "rank 2 on h1 failed: data: 9 of 10 rows could not be decoded"
    found.failure = Failure(2, "lost rank 3 on h1 (pid 103)", own=False)
    assert found.failed() == "lost rank 3 on h1 (pid 103)"


def test_the_late_are_those_that_do_not_answer_then_those_that_do_not_wait_then_those_behind():
    found = view()
    hear(found, 1, number=6, step=6, age=20.0)  # waits in another collective
    assert found.late(NOW) == (
        "rank 1 on h0 is late, waiting in train, episode 2, step 6 at any_rank in training.py:50 for 20 s; ranks 0, 2-3 wait for it at any_rank in training.py:50",
        [1],
    )
    hear(found, 2, number=6, where="batches.py:9", waits=False, age=21.0)
    said, late = found.late(NOW)
    assert late == [2] and said.startswith("rank 2 on h1 is late, working in train, episode 2, step 7 at batches.py:9 for 21 s; ranks 0-1, 3 wait for it")
    hear(found, 3, ago=22, number=6)
    said, late = found.late(NOW)
    assert late == [3] and said.startswith("rank 3 on h1 does not answer, last heard 22 s ago in train, episode 2, step 7; ranks 0-2 wait for it")


def test_a_thousand_late_ranks_make_one_short_line():
    found = view(hosts=("h0",) * 1000)
    for rank in range(1000):
        hear(found, rank, number=6, waits=False)
    said, late = found.late(NOW)
    assert len(late) == 1000 and said.endswith("; and 996 more") and len(said) < 600
    assert ranks_named(list(range(1000))) == "ranks 0-999" and ranks_named([4]) == "rank 4" and ranks_named([5, 0, 2, 1]) == "ranks 0-2, 5"


def test_a_process_is_known_to_have_ended_only_where_it_can_be_seen():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = this_member(0)
    if not here.machine:
        pytest.skip("this system does not tell which machine it is")
    there = dataclasses.replace(here, rank=1, pid=child.pid, began=heard._process(child.pid)[1])
    assert not there.has_ended(here)
    assert dataclasses.replace(there, began=there.began - 5).has_ended(here)  # the number was given to another process
    child.kill()
    while heard._process(child.pid)[0] != "Z":
        pass
    assert there.has_ended(here)  # not yet waited for by its parent
    child.wait()
    assert there.has_ended(here)
    assert not dataclasses.replace(there, machine="another").has_ended(here)


def test_errors_of_collectives_are_told_from_others():
    for text in (
        "[/torch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:5858: Connection reset by peer.",
        "[/torch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "NCCL communicator was aborted on rank 1.",
    ):
        assert collectives.is_about_other_ranks(RuntimeError(text)), text
    assert collectives.is_about_other_ranks(dist.DistBackendError("anything"))
    assert not collectives.is_about_other_ranks(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not collectives.is_about_other_ranks(ValueError("gloo"))


def test_the_place_in_the_code_is_that_of_the_main_thread():
    told: list[tuple[str, bool]] = []

    def ask_another_thread() -> None:
        thread = threading.Thread(target=lambda: told.append(stacks.whereabouts()))
        thread.start()
        thread.join()

    ask_another_thread()
    collectives.from_rank_zero(ask_another_thread)
    assert told == [("", False), ("", True)]  # the test's own frames are none of the package's


def test_stacks_are_appended_with_their_reason(tmp_path):
    for reason in ("first", "second"):
        stacks.dump(tmp_path / "hangs" / "rank-00003.txt", reason)
    text = (tmp_path / "hangs/rank-00003.txt").read_text()
    assert text.index(" first\n") < text.index(" second\n") and text.count(os.path.basename(__file__)) >= 2


def test_phases_stand_inside_each_other_and_any_mark_is_progress():
    with standing.inside("train"):
        standing.at(episode=2, step=30)
        with standing.inside("checkpoint"):
            assert standing.HERE.phase == "checkpoint"
            standing.got_on()
        assert standing.HERE.phase == "train"
    assert (standing.HERE.episode, standing.HERE.step, standing.HERE.marks) == (2, 30, 5)
