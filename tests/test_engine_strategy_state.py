"""One named state for every strategy: training goes on from a checkpoint under another number of ranks and another strategy as if nothing had happened,
with averaged weights, falling learning rates and a frozen part as well. The average is that of a slow twin, and training does not notice when it is looked at."""

from pathlib import Path

import pytest
import torch

from protoclip_scale import collectives
from protoclip_scale.engine import checkpoint
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.trainer import Trainer
from protoclip_scale.models.build import build_model
from tests.strategies import batches_of, drawn_prototypes, environment, fill_spool, recipe_with, saved, trainer_of, weights
from tests.support import spawn

EPISODE = 1
SETTINGS = ("model.image.name=test_convnext", "optim.precision=fp32", "optim.eps=1e-3", "optim.max_norm=1.0", "optim.weight_decay=0.5")
WEIGHTS = ("optim.ema={decay: 0.3, warmup: true}", "optim.layer_decay={image: 0.75, text: 0.5}", "model.frozen=[token_embedding]")
TABLE = "text_tower.encoder.embeddings.token_embedding.weight"


def leg(rank: int, world: int, spool_folder: str, folder: str, first: int, last: int) -> dict:
    """Steps [first, last) of the prototype objective, from ``step-FIRST`` (0: from nothing) to ``step-LAST`` in ``folder``; losses, and the end's weights."""
    torch.set_num_threads(1)
    accelerator = strategies.start(timeout_minutes=2)
    recipe = recipe_with("prototype", *SETTINGS, *WEIGHTS)
    trainer = trainer_of(recipe, accelerator)
    begin = Path(folder) / f"step-{first}"
    reader = checkpoint.Reader(begin, checkpoint.facts(begin)) if first else None
    trainer.build(EPISODE, reader)
    if reader:
        again = saved(trainer, Path(folder) / f"again-{first}-{world}")
        assert sorted(again.names()) == sorted(reader.names())
        assert all(torch.equal(again.tensor(name), reader.tensor(name)) for name in reader.names())
    trainer.model.train()
    losses, batches, began = [], batches_of(recipe, spool_folder, EPISODE), weights(trainer)
    average = {name: reader.tensor(f"ema/{name}") for name in began} if reader else began
    for step in range(first, last):
        loss = trainer.loss(batches[step % len(batches)], EPISODE, drawn_prototypes(recipe, torch.float32, EPISODE))
        losses.append((collectives.all_reduce(loss.total) / world).item())
        assert trainer.step(loss, step).taken
        average = twin(average, weights(trainer), step)
    assert torch.equal(weights(trainer)[TABLE], began[TABLE])
    seen = looked_at(trainer, average)
    reader = saved(trainer, Path(folder) / f"step-{last}")
    counted = {reader.tensor(name).item() for name in reader.names("optimizer/") if name.endswith("/step")}
    assert counted == {float(last)}
    assert sum(name.endswith("/exp_avg") for name in reader.names()) == sum(name.endswith("/step") for name in reader.names()) == len(trainer.trained)
    assert all(torch.equal(reader.tensor(f"ema/{name}"), each) for name, each in seen.items()) and reader.tensor("ema_updates") == last
    return {"losses": losses, "weights": weights(trainer) | {f"average of {name}": each for name, each in seen.items()}}


def twin(average: dict[str, torch.Tensor], live: dict[str, torch.Tensor], updates: int) -> dict[str, torch.Tensor]:
    """The average after one more step, in which the weights became ``live``."""
    left = min(0.3, (1 + updates) / (10 + updates))
    return {name: left * average[name] + (1 - left) * each if each.is_floating_point() else each for name, each in live.items()}


def looked_at(trainer: Trainer, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The averaged weights, which are as ``expected``, as are the features they give; afterwards all is as it was, what AdamW steps on as well."""
    ids, lengths = torch.arange(1, 9).view(2, 4), torch.tensor([4, 3])
    before, own = weights(trainer), [piece.values.clone() for piece in trainer.strategy.weight_pieces()]
    with trainer.averaged(), trainer.strategy.evaluating() as model, torch.no_grad():
        seen, features = weights(trainer), model.encode_text(ids, lengths)
    for name, each in expected.items():
        torch.testing.assert_close(seen[name], each, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    slow = build_model(trainer.recipe, trainer.features, seed=5).eval()
    slow.load_state_dict(expected)
    torch.testing.assert_close(features, slow.encode_text(ids, lengths).detach(), rtol=0, atol=1e-5)
    after = weights(trainer)
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert all(torch.equal(piece.values, each) for piece, each in zip(trainer.strategy.weight_pieces(), own, strict=True))
    assert any(not torch.equal(seen[name], each) for name, each in before.items())
    return seen


def walk(spool_folder: str, folder: Path, *legs: tuple[str, int, int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """All losses and the last weights of (strategy, ranks, steps) after one another."""
    folder.mkdir()
    losses, step = [], 0
    for strategy, ranks, steps in legs:
        found = spawn(leg, ranks, spool_folder, str(folder), step, step + steps, env=environment(strategy, ranks))[0]
        losses += found["losses"]
        step += steps
    return losses, found["weights"]


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    return fill_spool(tmp_path_factory.mktemp("spool"), recipe_with("clip"), EPISODE)


@pytest.fixture(scope="module")
def one_process(spool_folder, tmp_path_factory):
    return walk(spool_folder, tmp_path_factory.mktemp("one") / "run", ("ddp", 1, 4))


def assert_same(one_process, found) -> None:
    assert found[0] == pytest.approx(one_process[0], rel=2e-5)
    for name, tensor in one_process[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_zero2_then_one_process_then_ddp(one_process, spool_folder, tmp_path):
    assert_same(one_process, walk(spool_folder, tmp_path / "run", ("zero2", 2, 2), ("ddp", 1, 1), ("ddp", 4, 1)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "legs",
    [
        [("zero2", 2, 2), ("ddp", 1, 1), ("zero3", 4, 1)],
        [("zero3", 2, 2), ("zero3", 1, 1), ("zero3", 4, 1)],
        [("zero1", 4, 1), ("zero2", 1, 2), ("zero1", 2, 1)],
        [("ddp", 2, 1), ("zero3", 2, 1), ("zero2", 4, 2)],
        [("fsdp2", 2, 1), ("zero2", 1, 1), ("fsdp2", 4, 2)],
        [("zero3_offload", 2, 2), ("ddp", 1, 1), ("zero3_offload", 2, 1)],
    ],
    ids=lambda legs: ", ".join(f"{strategy} on {ranks}" for strategy, ranks, _ in legs),
)
def test_any_strategy_on_any_number_of_ranks(one_process, spool_folder, tmp_path, legs):
    assert_same(one_process, walk(spool_folder, tmp_path / "run", *legs))
