"""Precision and non-finite numbers: loss scaling skips and recovers, a run whose loss is lost says so with its rows."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from protoclip_scale.engine import command
from protoclip_scale.engine.strategy import LossScale, Precision, make_strategy
from protoclip_scale.errors import UserError
from protoclip_scale.recipe.schema import Optim
from tests.support import RECIPES, TINY, metrics, overrides


def scaled_strategy(model: nn.Module, lr: float):
    """A strategy with fp16's loss scaling, on the CPU, where recipes may not ask for it: the logic is the same."""
    precision = Precision("fp32", torch.device("cpu"))
    precision.scale = LossScale()
    strategy = make_strategy(Accelerator(cpu=True), precision)
    names = [name for name, _ in model.named_parameters()]
    strategy.prepare(model, [{"params": list(model.parameters()), "names": names, "side": "other", "weight_decay": 0.0}], Optim(lr=lr, eps=1e-12))
    return strategy


def test_an_overflow_skips_the_step_and_halves_the_scale():
    model = nn.Linear(3, 1)
    strategy = scaled_strategy(model, lr=0.1)
    before = model.weight.detach().clone()
    strategy.backward(model(torch.full((2, 3), 1e36)).sum())  # times 2^16 is more than fp32 holds
    update = strategy.update()
    assert not update.taken and not np.isfinite(update.norm)
    assert torch.equal(model.weight, before) and strategy.precision.scale.value == 2.0**15
    strategy.backward(model(torch.ones(2, 3)).sum())
    update = strategy.update()
    assert update.taken and update.norm == pytest.approx(16**0.5, rel=1e-5)  # gradients are unscaled: three weights of 2 and a bias of 2
    assert torch.allclose(model.weight, before - 0.1)  # AdamW's first step
    assert strategy.optimizer.state[model.weight]["exp_avg"].max().item() == pytest.approx(0.2)  # a tenth of the unscaled gradient
    other = Precision("fp32", torch.device("cpu"))
    other.scale = LossScale()
    other.load(strategy.precision.state())
    assert other.scale.value == 2.0**15 and other.scale.good_steps == 1


def test_the_scale_follows_torchs_own(monkeypatch):
    monkeypatch.setattr(LossScale, "INTERVAL", 20)
    ours, theirs = LossScale(), torch.amp.GradScaler("cpu", init_scale=LossScale.START, growth_interval=LossScale.INTERVAL)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(2 * LossScale.INTERVAL + 10):
        overflows = step in (3, 5, LossScale.INTERVAL + 7)
        weight.grad = torch.full((1,), float("inf") if overflows else 1.0)
        theirs.scale(torch.zeros(1))  # makes its state
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflows)
        assert (ours.value, ours.good_steps) == (theirs.get_scale(), theirs.state_dict()["_growth_tracker"])
    assert ours.value == LossScale.START / 2  # halved three times, doubled twice


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(UserError, match="optim.precision fp16 needs a GPU"):
        Precision("fp16", torch.device("cpu"))


def test_bf16_trains_close_to_fp32(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        values = (*TINY, "schedule.total=2 episodes", f"optim.precision={precision}")
        folder = tmp_path / precision
        assert command.main(["--recipe", str(RECIPES / "demo_clip.yaml"), "--run-dir", str(folder), *overrides(values)]) == 0
        losses[precision] = [line["loss"] for line in metrics(folder, "train")]
    assert losses["fp32"] != losses["bf16"]
    assert np.allclose(losses["fp32"], losses["bf16"], rtol=0.05)


def test_a_lost_loss_is_skipped_then_told_with_its_rows(tmp_path, capsys):
    values = (*TINY, "optim.lr=1e38", "optim.nonfinite_skips=2", "optim.max_norm=null")
    assert command.main(["--recipe", str(RECIPES / "demo_clip.yaml"), "--run-dir", str(tmp_path / "run"), *overrides(values)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite in 3 steps in a row" in said and "optim.nonfinite_skips 2" in said and "source/block/row" in said
    assert metrics(tmp_path / "run", "train")[-1]["skipped_steps"] == 2
