"""Precision and non-finite numbers: loss scaling skips and recovers, a run whose loss is lost says so with its rows."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from protoclip_scale.engine import command
from protoclip_scale.engine.strategy import Precision, Strategy
from protoclip_scale.errors import UserError
from tests.support import RECIPES, TINY, metrics, overrides


def scaled_strategy(model: nn.Module) -> Strategy:
    """A strategy with fp16's loss scaling, on the CPU, where recipes may not ask for it: the logic is the same."""
    strategy = Strategy(Accelerator(cpu=True), Precision("fp32", torch.device("cpu")))
    strategy.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return strategy


def test_an_overflow_skips_the_step_and_halves_the_scale():
    model = nn.Linear(3, 1)
    strategy = scaled_strategy(model)
    before = model.weight.detach().clone()
    strategy.backward(model(torch.full((2, 3), 1e36)).sum())  # times 2^16 is more than fp32 holds
    strategy.clip(1.0)
    assert not strategy.step()
    assert torch.equal(model.weight, before) and strategy.precision.scaler.get_scale() == 2.0**15
    strategy.optimizer.zero_grad()
    strategy.backward(model(torch.ones(2, 3)).sum())
    norm = strategy.clip(None)
    assert norm.item() == pytest.approx(16**0.5, rel=1e-5)  # gradients are unscaled: three weights of 2 and a bias of 2
    assert strategy.step()
    assert torch.allclose(model.weight, before - 0.2)
    other = Precision("fp32", torch.device("cpu"))
    other.scaler = torch.amp.GradScaler("cpu")
    other.load(strategy.precision.state())
    assert other.scaler.get_scale() == 2.0**15


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
