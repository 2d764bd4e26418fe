"""What is encoded over ranks: the same batches for any number of ranks, and equally many rows on each, as strategies need that gather weights in every call."""

import pytest
import torch

from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.evaluation.encode import encode_sharded, encode_texts
from protoclip_scale.models import text
from tests.strategies import environment, recipe_with, trainer_of
from tests.support import spawn

BATCH = 256
TEXTS = [f"{'a long way to ' * (number % 4)}caption {number}" for number in range(BATCH + 144)]  # 8 buckets on a CPU, and 4 where the rest is a batch of its own


@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, 15, 16, 23, 40])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_batches_are_those_of_one_rank_and_equally_large_on_all(monkeypatch, world, num_rows):
    encoded: dict[int, list[range]] = {rank: [] for rank in range(world)}

    def encode(rank: int, rows: range) -> torch.Tensor:
        encoded[rank].append(rows)
        return torch.stack([torch.tensor([row, rows.start]) for row in rows])

    def gather(own: torch.Tensor) -> torch.Tensor:
        """Of ranks that run one after the other: what the others encode follows from what this one does."""
        number = len(encoded[0]) - 1
        return torch.cat([own, *(torch.stack([torch.tensor([row, rows.start]) for row in rows]) for rank in range(1, world) for rows in [encoded[rank][number]])])

    monkeypatch.setattr("protoclip_scale.collectives.world_size", lambda: world)
    for rank in reversed(range(world)):
        monkeypatch.setattr("protoclip_scale.collectives.rank", lambda rank=rank: rank)
        monkeypatch.setattr("protoclip_scale.collectives.all_gather", gather if rank == 0 else lambda own: own.repeat(world, 1))
        found = encode_sharded(num_rows, 8, lambda rows, rank=rank: encode(rank, rows))
    assert found[:, 0].tolist() == list(range(num_rows))
    assert found[:, 1].tolist() == [max(0, min(row // 8 * 8, num_rows - 8)) for row in range(num_rows)]  # beside the same rows, whatever the world
    assert {len(rows) for of_rank in encoded.values() for rows in of_rank} == {min(8, num_rows)}
    assert len({len(of_rank) for of_rank in encoded.values()}) == 1


def encoded_texts(rank: int, world: int) -> torch.Tensor:
    accelerator = strategies.start(timeout_minutes=1)
    recipe = recipe_with("clip")
    trainer = trainer_of(recipe, accelerator)
    trainer.build(0)
    with trainer.strategy.evaluating() as model:
        return encode_texts(model, tokenizer_for(recipe.model.text), TEXTS, BATCH, accelerator.device)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_a_last_batch_that_is_shorter_keeps_ranks_together(strategy):
    assert len(text.bucket_sizes(BATCH, "cpu")) > len(text.bucket_sizes(len(TEXTS) % BATCH, "cpu"))
    expected = spawn(encoded_texts, 1)[0]
    for found in spawn(encoded_texts, 2, env=environment(strategy, 2)):
        assert torch.equal(found, expected)
