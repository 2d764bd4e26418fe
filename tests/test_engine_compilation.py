"""optim.compile_blocks with the real compiler: the same numbers as eager code, one graph for equal blocks and all caption lengths, and clear lines where it cannot be had."""

import pytest
import torch

from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.compilation import compile_blocks, need_compilers, num_graphs
from protoclip_scale.errors import UserError
from protoclip_scale.models.build import build_model
from tests.strategies import environment, largest_difference, recipe_with, trainer_of, whole_difference
from tests.support import CORPUS, TINY_PROTOTYPES, final_tensors, metrics, output, pretrain, spawn, zero_environment

EPISODE = 0
WANTS = frozenset({"image", "text", "logit_scale"})
ROWS, CONTEXT = 64, 24
TOWERS = ("model.image.name=test_vit", f"model.text={{width: 32, heads: 2, layers: 3, context_length: {CONTEXT}}}")
KINDS = {  # settings that change what is compiled or how it is called
    "fp32": (),
    "micro-batches": ("optim.microbatch=16",),
    "checkpointing": ("model.image.grad_checkpointing=true", f"model.text={{width: 32, heads: 2, layers: 3, context_length: {CONTEXT}, grad_checkpointing: true}}"),
    "bf16": ("optim.precision=bf16",),
    "stochastic depth": ("model.image.drop_path=0.5",),
}


def drawn(seed: int, longest: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    lengths = torch.randint(2, longest + 1, (ROWS,), generator=generator)
    return images, torch.randint(1, 1000, (ROWS, CONTEXT), generator=generator), lengths


def gradients(trainer, inputs: tuple[torch.Tensor, ...], microbatch: int | None) -> dict[str, torch.Tensor]:
    """Of a loss that couples all local rows, averaged over ranks; and the features."""
    images, token_ids, lengths = inputs
    device = trainer.strategy.device
    features = trainer.strategy(images.to(device), token_ids.to(device), lengths, wants=WANTS, microbatch=microbatch, row_keys=torch.arange(ROWS, device=device))
    loss = (features["logit_scale"] * features["image"] @ features["text"].T).logsumexp(1).mean()
    trainer.strategy.backward(loss)
    found = {name: gradient.detach().clone() for name, gradient in trainer.strategy.gradients()}
    trainer.strategy.set_learning_rates({"visual": 0.0, "other": 0.0})
    trainer.strategy.update()
    return found | {name: features[name].detach() for name in ("image", "text")}


def compared(rank: int, world: int, kind: str) -> dict:
    """The largest difference of features and gradients between compiled and eager blocks, relative to each tensor's largest value, and that of all as one vector; and the
    graphs that there are after each batch, whose captions are of other lengths each time."""
    torch.set_num_threads(1)
    accelerator = strategies.start(timeout_minutes=10)
    runs = []
    for compiled in ("false", "true"):
        recipe = recipe_with("clip", *TOWERS, *KINDS[kind], f"optim.compile_blocks={compiled}")
        trainer = trainer_of(recipe, accelerator)
        trainer.build(EPISODE)
        trainer.model.train()
        names, outcome, graphs = list(trainer.model.state_dict()), [], []
        for seed, longest in enumerate((CONTEXT, 9, 17, 5, 13)):
            outcome.append(gradients(trainer, drawn(seed + 100 * rank, longest), recipe.optim.microbatch))
            graphs.append(num_graphs() if compiled == "true" else 0)
        runs.append((names, outcome, graphs))
        trainer.strategy.release()
    (names, eager, _), (compiled_names, graphed, graphs) = runs
    assert names == compiled_names
    return {
        "largest": max(largest_difference(expected, found) for expected, found in zip(eager, graphed, strict=True)),
        "whole": max(whole_difference(expected, found) for expected, found in zip(eager, graphed, strict=True)),
        "graphs": graphs,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "ranks", "kind"),
    [*(("ddp", 1, kind) for kind in KINDS), *((strategy, 2, "fp32") for strategy in ("ddp", "zero1", "zero2", "fsdp2")), ("zero2", 2, "micro-batches")],
)
def test_compiled_blocks_equal_eager_ones(strategy, ranks, kind):
    for found in spawn(compared, ranks, kind, env=environment(strategy, ranks)):
        assert found["whole"] <= (0.03 if kind == "bf16" else 1e-5), found
        assert kind == "bf16" or found["largest"] <= 1e-5, found
        assert found["graphs"][0] <= 4 and found["graphs"][-1] == found["graphs"][0], found  # equal blocks share one, and so do all lengths


def test_what_cannot_be_compiled_is_told(monkeypatch):
    residual = build_model(recipe_with("clip", "model.text={width: 32, heads: 2, layers: 1, context_length: 16}"), WANTS, seed=0)
    residual.text_tower = torch.nn.Identity()
    with pytest.raises(UserError, match="optim.compile_blocks true has no effect"):
        compile_blocks(residual, torch.device("cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs no-such-compiler, which is not on PATH: install it, or set CXX; or set it to false"):
        need_compilers(torch.device("cpu"))


def test_zero3_refuses_in_one_line(tmp_path):
    folder = tmp_path / "run"
    recipe = ("optim.compile_blocks=true", "model.image.name=test_vit", "model.image.size=32", "data.workers=0", "evaluation=null")
    assert pretrain(folder, "demo_clip.yaml", recipe, env=zero_environment(3, 1)) == [1]
    assert "optim.compile_blocks true does not go with ZeRO-3" in output(folder).splitlines()[-1]


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    """Three episodes with extraction, back translation and an evaluation in them, beside the same with eager blocks; the checkpoints have the same names."""
    held_out = f"evaluation={{sets: [{{name: val, files: {CORPUS}/val-*.parquet}}], gallery: {{}}, probe_train: null, batch: 32}}"
    settings = (*(value for value in TINY_PROTOTYPES if not value.startswith("evaluation")), "model.image.name=test_vit", "optim.eps=1e-3", held_out)
    losses, weights = {}, {}
    for compiled in ("false", "true"):
        run = tmp_path / compiled
        assert pretrain(run, "demo_protoclip.yaml", (*settings, f"optim.compile_blocks={compiled}")) == [0], output(run)
        losses[compiled] = [line["loss/clip"] for line in metrics(run, "train")]
        weights[compiled] = final_tensors(run)
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-3)
    assert weights["true"].keys() == weights["false"].keys()
    graphs = [line["compiled_graphs"] for line in metrics(tmp_path / "true", "train")]
    assert 0 < graphs[-1] == graphs[0] <= 4
