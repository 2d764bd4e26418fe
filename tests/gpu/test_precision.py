"""Loss scaling on GPUs: overflows are skipped, counted and kept in checkpoints, under every strategy; runs in bf16 and fp16 stay near those in fp32."""

import numpy as np
import pytest
import torch

from protoclip_scale.engine import checkpoint, command
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.strategy import LossScale, Precision
from tests.gpu.devices import DETERMINISTIC, ON_CPU, cases, of
from tests.strategies import fill_spool, recipe_with
from tests.support import RECIPES, TINY, TINY_PROTOTYPES, metrics, output, overrides, pretrain, spawn
from tests.test_engine_strategy_steps import EPISODE, check, steps

NEAR = {"fp32": 0.02, "bf16": 0.05, "fp16": 0.05}
# Gradients of such a loss overflow, and so the first steps are skipped: in fp16 on a GPU; on a CPU, where only the scale can be tried, their norm in fp32.
HEAVY = {"cuda": ("optim.precision=fp16", "objectives.clip.weight=100"), "cpu": ("optim.precision=fp32", "objectives.clip.weight=1e14")}


def trained(rank: int, world: int, folder: str, arguments: list[str]) -> int:
    """The exit code of a run with a scaled loss."""
    if not torch.cuda.is_available():
        made = Precision.__init__

        def scaled(self, *given):
            made(self, *given)
            self.scale = LossScale()

        Precision.__init__ = scaled
    return command.main(["--recipe", str(RECIPES / "demo_clip.yaml"), "--run-dir", folder, *arguments])


@cases(twins=(("ddp", 2), ("zero2", 2)))
def test_skipped_steps_are_counted_and_the_scale_is_saved(tmp_path, figure, device, strategy, ranks):
    run, env = tmp_path / "run", of(device, strategy, ranks)
    assert strategies.LossScale.INTERVAL > 100  # it does not grow in these runs
    for total, more in (("4 episodes", ()), ("5 episodes", ("--extend",))):
        values = (*(value for value in TINY if not value.startswith("schedule.total")), f"schedule.total={total}", *HEAVY[device])
        assert spawn(trained, ranks, str(run), [*overrides(values), *more], env=env) == [0] * ranks
        _, manifest, _ = checkpoint.find(run, "latest")
        lines = metrics(run, "train")
        skipped = lines[-1]["skipped_steps"]
        assert 1 <= skipped < len(lines) and all(np.isfinite(line["loss"]) for line in lines)
        assert manifest["skipped_steps"] == skipped
        assert manifest["scaler"] == {"scale": 2.0**16 / 2**skipped, "_growth_tracker": len(lines) - skipped}
    figure(f"{strategy}, loss scaling: steps skipped, of {len(lines)}", ranks, device, skipped)


@cases(twins=(("fsdp2", 2),))
def test_steps_that_overflow_are_skipped_by_all(tmp_path, device, strategy, ranks):
    folder = fill_spool(tmp_path / "spool", recipe_with("clip"), EPISODE)
    for told in spawn(steps, ranks, folder, env=DETERMINISTIC | of(device, strategy, ranks)):
        check(told)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu") / "run"
    assert pretrain(folder, "demo.yaml", TINY_PROTOTYPES, env=ON_CPU) == [0], output(folder)
    return [line["loss/clip"] for line in metrics(folder, "train")]


@cases(twins=(("zero3", 2),))
def test_whole_runs_stay_near_one_on_a_cpu_and_go_on_under_ddp(tmp_path, on_cpu, figure, device, strategy, ranks):
    env = of(device, strategy, ranks)
    for precision in NEAR if device == "cuda" else ("fp32", "bf16"):
        folder, settings = tmp_path / precision, (*TINY_PROTOTYPES, f"optim.precision={precision}")
        assert pretrain(folder, "demo.yaml", settings, ranks=ranks, env=env) == [0] * ranks, output(folder)
        assert f"device         {device}" in output(folder)
        found = [line["loss/clip"] for line in metrics(folder, "train")]
        difference = max(abs(one / other - 1) for one, other in zip(found, on_cpu, strict=True))
        figure(f"demo, {strategy}, {precision}: loss against a CPU's", ranks, device, difference, NEAR[precision])
        more = (*(each for each in settings if not each.startswith("schedule.total")), "schedule.total=4 episodes")
        assert pretrain(folder, "demo.yaml", more, "--extend", ranks=ranks, env=of(device, "ddp", ranks)) == [0] * ranks, output(folder)
        assert len(metrics(folder, "train")) == len(found) * 4 // 3
