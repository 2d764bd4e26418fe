"""Batches: the plan's rows, equal for any workers and ranks; unusable rows are replaced in their place and listed."""

import functools
import hashlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import dataloader

from protoclip_scale.data.batches import EpisodeBatches, make_loader
from protoclip_scale.data.captions import choose_caption
from protoclip_scale.data.decode import decode_image
from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan
from protoclip_scale.data.quarantine import Quarantine, read_quarantine
from protoclip_scale.data.randomness import generator
from protoclip_scale.data.rows import unpack_row_ids
from protoclip_scale.data.spool import Spool
from protoclip_scale.data.tokenizers import Tokens, tokenizer_for
from protoclip_scale.data.transforms import augment, eval_transform
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from tests.support import CORPUS, ROOT

SIZE = 24


class Letters:
    """A tokenizer that needs no vocabulary."""

    modules = ()

    def __call__(self, texts):
        lists = [[ord(letter) for letter in text[:20]] for text in texts]
        ids = torch.tensor([letters + [0] * (20 - len(letters)) for letters in lists])
        return Tokens(ids, torch.tensor([len(letters) for letters in lists]))


def text_of(batch, place):
    return "".join(chr(letter) for letter in batch.token_ids[place, : batch.token_lengths[place]].tolist())


def prepared(root, spool_folder, plan, files="rows.parquet", number=0, tokenizer=None, purpose="train", lanes=None, **settings):
    """EpisodeBatches of episode ``number``, spooled."""
    data = schema.Data(root=str(root), sources=[{"files": files}], plan=plan, **settings)
    readers = open_readers(data)
    episode = Plan(index_of(readers), data.plan).episode(number)
    spool = Spool(spool_folder, "run")
    spool.fill(episode, number, range(data.plan.lanes), readers)
    return EpisodeBatches(data, SIZE, tokenizer or Letters(), episode, spool, lanes or range(data.plan.lanes), purpose, seed=5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(**settings) -> EpisodeBatches of the demo corpus: 8 steps of 64 rows in 4 lanes of 128."""
    plan = {"episode_size": 512, "lanes": 4, "global_batch": 64}
    return functools.partial(prepared, CORPUS, tmp_path_factory.mktemp("spool"), plan, "train-*.parquet")


@pytest.fixture
def own_rows(tmp_path):
    """(plan, **settings) -> EpisodeBatches of what ``write_rows(tmp_path, ...)`` wrote."""
    return functools.partial(prepared, tmp_path, tmp_path / "spool")


def batch_hash(*batches) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for value in vars(batch).values():
            digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()


def images_of(row_ids, readers):
    _, block, row = unpack_row_ids(row_ids)
    return [readers[0].read(int(b)).slice(int(r), 1).to_pylist()[0] for b, r in zip(block, row, strict=True)]


def test_a_batch_equals_its_slow_twin(corpus):
    """Row by row from the files, with the definitions of caption, decoding and augmentation."""
    batches = corpus(augmentation="protoclip_light", caption="random")
    plan, readers = batches.episode_plan, open_readers(batches.data)
    batch = batches[3]
    assert batch.images.shape == (64, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
    assert batch.row_ids.tolist() == plan.batch_row_ids(3).tolist() and not batch.replaced
    assert batch.slots.tolist() == plan.slots(3).tolist() * 4
    assert batch.positions.tolist() == [lane * 128 + slot for lane in range(4) for slot in plan.slots(3)]
    assert np.array_equal(plan.row_ids.reshape(-1)[batch.positions], batch.row_ids)
    for place, row in enumerate(images_of(batch.row_ids.numpy(), readers)):
        keys = (0, int(batch.row_ids[place]), 0)
        image = augment("protoclip_light")(decode_image(row["image"]), SIZE, generator(5, "augmentation", *keys))
        assert torch.equal(batch.images[place], image)
        assert text_of(batch, place) == choose_caption(row["captions"], "random", generator(5, "caption", *keys))[:20]


def test_extraction_sees_the_evaluation_transform_and_the_same_captions(corpus):
    train, extract = corpus(caption="random"), corpus(caption="random", purpose="extract")
    assert torch.equal(train[2].token_ids, extract[2].token_ids) and torch.equal(train[2].row_ids, extract[2].row_ids)
    rows = images_of(extract[2].row_ids[:5].numpy(), open_readers(extract.data))
    for place, row in enumerate(rows):
        assert torch.equal(extract[2].images[place], eval_transform(decode_image(row["image"]), SIZE))
    assert not torch.equal(train[2].images, extract[2].images)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_make_the_batch_of_one_rank(corpus, world):
    whole = corpus()[1]
    parts = [corpus(lanes=range(rank * 4 // world, (rank + 1) * 4 // world))[1] for rank in range(world)]
    for name in ("images", "token_ids", "token_lengths", "positions", "row_ids", "slots"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_a_row_looks_different_in_another_epoch(corpus):
    batches = corpus()
    again = corpus()
    object.__setattr__(
        again, "episode_plan", type(again.episode_plan)(**{**vars(again.episode_plan), "epochs": again.episode_plan.epochs + 1})
    )
    assert torch.equal(batches[0].row_ids, again[0].row_ids)
    assert not torch.equal(batches[0].images, again[0].images)


def test_workers_change_nothing_and_a_dead_one_costs_no_batch(corpus, caplog):
    batches = corpus(tokenizer=tokenizer_for(schema.TextTower(context_length=16)), augmentation="protoclip_light")
    state = torch.get_rng_state()
    here = list(make_loader(batches, 1, 0))
    assert [batch.step for batch in here] == list(range(1, 8))
    ahead = list(make_loader(batches, 1, 2))
    assert batch_hash(*ahead) == batch_hash(*here)
    assert torch.equal(torch.get_rng_state(), state)
    loader = make_loader(batches, 1, 1)
    survivors = [next(loader)]
    workers = multiprocessing.active_children()
    assert len(workers) == 1
    os.kill(workers[0].pid, signal.SIGKILL)
    survivors += list(loader)
    assert batch_hash(*survivors) == batch_hash(*here)
    assert "a loader process died" in caplog.text


@pytest.mark.parametrize("dies", [True, False])
def test_a_batch_that_cannot_be_had_of_a_dying_worker_is_made_here(corpus, caplog, monkeypatch, dies):
    """Its memory is asked of the worker, whose connections end before it is seen to be dead."""
    batches = corpus(tokenizer=tokenizer_for(schema.TextTower(context_length=16)), augmentation="protoclip_light")
    loader = make_loader(batches, 1, 1)
    survivors = [next(loader)]

    def refused(self, timeout: float = 0) -> None:
        if dies:
            os.kill(self._workers[0].pid, signal.SIGKILL)
        raise EOFError

    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "_try_get_data", refused)
    monkeypatch.setattr("protoclip_scale.data.batches.DYING_SECONDS", 30 if dies else 0.2)
    if not dies:
        with pytest.raises(EOFError):
            next(loader)
        return
    survivors += list(loader)
    assert batch_hash(*survivors) == batch_hash(*make_loader(batches, 1, 0)) and "a loader process died" in caplog.text


SIGNALLED = """
import os, signal, time
from multiprocessing import forkserver
from protoclip_scale.data import loader_server

def signalled(pid, numbers=loader_server.SIGNALS):
    for number in numbers:
        os.kill(pid, number)

def exit_code(program, *numbers):
    with loader_server.out_of_reach():
        worker = loader_server.context().Process(target=exec, args=(program,))
        worker.start()
    signalled(worker.pid, numbers or loader_server.SIGNALS)
    worker.join()
    return worker.exitcode

loader_server.ALWAYS = ()
loader_server.start(())
server = forkserver._forkserver._forkserver_pid
signalled(server)
print(exit_code("import time; time.sleep(0.5)"), server == forkserver._forkserver._forkserver_pid)
print(exit_code("from protoclip_scale.data import loader_server; import time; loader_server.within_reach(); time.sleep(600)") < 0)
print(exit_code("from protoclip_scale.data import loader_server; import time; loader_server.within_reach(); time.sleep(0.5)", signal.SIGINT))
"""


def test_a_signal_to_all_processes_of_a_job_leaves_the_loaders_server_and_workers_that_start():
    done = subprocess.run([sys.executable, "-c", SIGNALLED], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["0 True", "True", "0"], done.stderr


def encoded(number, kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), (number % 256, number // 256, 77)).save(buffer, kind)
    return buffer.getvalue()


def number_of(image: torch.Tensor) -> int:
    """The row that ``encoded`` painted."""
    return int(image[0, 5, 5]) + 256 * int(image[1, 5, 5])


def write_rows(folder, num_rows, bad=None, captions=None, row_group_size=8):
    """Rows 0.. that know their number; ``bad`` maps rows to other bytes, ``captions`` to other captions."""
    images = [(bad or {}).get(row, encoded(row)) for row in range(num_rows)]
    texts = [(captions or {}).get(row, f"row {row}") for row in range(num_rows)]
    pq.write_table(
        pa.table({"image": pa.array(images, pa.binary()), "caption": texts}), folder / "rows.parquet", row_group_size=row_group_size
    )


def global_row(row_ids, row_group_size=8):
    _, block, row = unpack_row_ids(np.asarray(row_ids))
    return block * row_group_size + row


def bad_bytes(row: int) -> bytes | None:
    return [b"", None, b"not an image", encoded(row)[:60]][row % 4]


def check_replacements(batches, bad: set[int]):
    """Every bad place is filled by a good row of its lane that occurs once, is not in the batch, and is used once in it; nothing else moves."""
    plan = batches.episode_plan
    once = Counter(plan.row_ids.reshape(-1).tolist())
    num_replaced = 0
    for step in range(len(batches)):
        batch, planned = batches[step], plan.batch_row_ids(step)
        numbers = [number_of(image) for image in batch.images]
        assert numbers == global_row(batch.row_ids).tolist() and not set(numbers) & bad
        assert [text_of(batch, place) for place in range(len(numbers))] == [f"row {number}" for number in numbers]
        assert len(set(numbers)) == len(numbers)
        moved = np.flatnonzero(batch.row_ids.numpy() != planned)
        assert [row_id for row_id, _ in batch.replaced] == planned[moved].tolist()
        assert {int(row) for row in global_row(planned[moved])} == {int(row) for row in global_row(planned)} & bad
        for place in moved:
            used = int(batch.row_ids[place])
            lane = int(batch.positions[place]) // plan.lane_rows
            assert used in plan.row_ids[lane] and once[used] == 1 and used not in planned
        num_replaced += len(moved)
    return num_replaced


@pytest.mark.parametrize("seed", range(12))
def test_bad_rows_are_replaced_by_the_rules(tmp_path, own_rows, seed):
    rng = np.random.default_rng(seed)
    num_rows = 300
    bad = {int(row) for row in rng.choice(num_rows, 60, replace=False)}
    write_rows(tmp_path, num_rows, {row: bad_bytes(row) for row in bad})
    lanes = int(rng.choice([1, 2, 4]))
    plan = {"seed": seed, "episode_size": int(rng.choice([128, 200])), "lanes": lanes, "global_batch": 16}
    total = sum(check_replacements(own_rows(plan, number=number, augmentation="none"), bad) for number in (0, 1, 2))
    assert total > 30


def test_substitutes_do_not_depend_on_ranks_or_purpose(tmp_path, own_rows):
    bad = dict.fromkeys(range(0, 120, 5), b"bad")
    write_rows(tmp_path, 120, bad)
    plan = {"episode_size": 96, "lanes": 4, "global_batch": 16}
    whole = own_rows(plan)
    extract = own_rows(plan, purpose="extract")
    parts = [own_rows(plan, lanes=[lane]) for lane in range(4)]
    for step in range(len(whole)):
        assert torch.equal(torch.cat([part[step].row_ids for part in parts]), whole[step].row_ids)
        assert torch.equal(extract[step].row_ids, whole[step].row_ids)
        assert sum([part[step].replaced for part in parts], []) == whole[step].replaced == extract[step].replaced


def test_empty_captions_are_dropped_or_kept(tmp_path, own_rows):
    write_rows(tmp_path, 64, captions={3: "", 10: " \n", 20: None})
    plan = {"episode_size": 64, "lanes": 2, "global_batch": 16}
    dropped = own_rows(plan, augmentation="none")
    assert check_replacements(dropped, {3, 10, 20}) == 3
    assert {reason for step in range(4) for _, reason in dropped[step].replaced} == {"empty caption"}
    kept = own_rows(plan, empty_caption="keep")
    batches = [kept[step] for step in range(4)]
    assert not any(batch.replaced for batch in batches)
    assert sorted(torch.cat([batch.token_lengths for batch in batches]).tolist())[:4] == [0, 0, 0, 5]


def test_limits_of_the_recipe_are_used(tmp_path, own_rows):
    write_rows(tmp_path, 64, {7: encoded(7) + bytes(5000)})
    batches = own_rows({"episode_size": 64, "lanes": 1, "global_batch": 16}, max_bytes=4000, augmentation="none")
    assert check_replacements(batches, {7}) == 1
    assert "data.max_bytes 4000" in next(reason for step in range(4) for _, reason in batches[step].replaced)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lane_without_a_usable_row_stops_with_one_line(tmp_path, own_rows, workers):
    write_rows(tmp_path, 64, dict.fromkeys(range(64), b"bad"))
    batches = own_rows({"episode_size": 64, "lanes": 2, "global_batch": 16})
    with pytest.raises(UserError, match="lane 0 of episode 0 holds no usable row") as caught:
        next(make_loader(batches, 0, workers))
    assert "\n" not in str(caught.value)


def test_quarantine_lists_each_row_once_and_survives_a_kill(tmp_path):
    first, second = tmp_path / "rank-00000.jsonl", tmp_path / "rank-00001.jsonl"
    quarantine = Quarantine(first)
    assert not first.exists() and len(quarantine) == 0
    assert quarantine.record(5, "a.parquet", 0, 5, "truncated or corrupt: broken data stream")
    assert not quarantine.record(5, "a.parquet", 0, 5, "truncated or corrupt: broken data stream")
    assert quarantine.record(np.int64(6), "a.parquet", np.int64(0), np.int64(6), "zero bytes")
    with first.open("a") as file:
        file.write('{"row_id": 7, "fi')  # killed here
    again = Quarantine(first)
    assert 5 in again and 7 not in again and len(again) == 2
    assert again.record(7, "b.parquet", 1, 0, "zero bytes") and not again.record(6, "a.parquet", 0, 6, "zero bytes")
    assert again.reasons == {"truncated or corrupt": 1, "zero bytes": 2}
    Quarantine(second).record(5, "a.parquet", 0, 5, "zero bytes")
    entries = read_quarantine(tmp_path)
    assert sorted(entries) == [5, 6, 7]
    assert entries[7] == {"row_id": 7, "file": "b.parquet", "block": 1, "row": 0, "reason": "zero bytes"}


ORPHANS = """
import multiprocessing, os, signal, sys
from pathlib import Path
from protoclip_scale.data.batches import make_loader
from tests.test_data_batches import prepared

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    next(loader := make_loader(prepared(folder, folder / "spool", {"episode_size": 64, "lanes": 1, "global_batch": 16}), 0, 2))
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_workers_leave_with_a_killed_training_process(tmp_path):
    write_rows(tmp_path, 64)
    (tmp_path / "killed.py").write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, tmp_path / "killed.py", tmp_path], env=environment, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in killed.stdout.split()]
    assert killed.returncode == -signal.SIGKILL and len(workers) == 2
    deadline = time.monotonic() + 30
    while any(lives(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlived the process they worked for"
        time.sleep(0.2)
