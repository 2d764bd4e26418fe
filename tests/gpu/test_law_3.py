"""Law 3 on GPUs: killed at named events and resumed gives the final weights of a run that was never killed."""

import torch

from tests.gpu.devices import DETERMINISTIC, cases, of
from tests.runs import rows_of_final_weights
from tests.support import TINY_PROTOTYPES, final_tensors, output, pretrain

BOUND = 1e-6  # of a tensor's largest value; bit-equal where all kernels are deterministic
SETTINGS = (*TINY_PROTOTYPES, "model.image.name=test_convnext", "run.checkpoint_steps=2", "optim.ema={decay: 0.9}", "optim.precision=fp32", "optim.eps=1e-3", "evaluation=null")
KILLS = ("train.step:3", "extract.block:2", "cluster.iteration:3", "train.forward:2", "checkpoint.written:1")


def largest(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    assert expected.keys() == found.keys() and len(expected) > 100
    pairs = [(tensor.double(), found[name].double()) for name, tensor in expected.items()]
    return max(((one - other).abs().max() / one.abs().max().clamp(min=1e-12)).item() for one, other in pairs if one.numel())


@cases(twins=(("ddp", 2),), strategies=("ddp", "zero2", "fsdp2"))
def test_killed_and_resumed_equals_never_killed(tmp_path, figure, device, strategy, ranks):
    env = DETERMINISTIC | of(device, strategy, ranks)
    whole, again, killed = (tmp_path / name for name in ("whole", "again", "killed"))
    for folder in (whole, again):
        assert pretrain(folder, "demo.yaml", SETTINGS, ranks=ranks, env=env) == [0] * ranks, output(folder)
    for number, event in enumerate(KILLS):
        rank = number % ranks
        codes = pretrain(killed, "demo.yaml", SETTINGS, ranks=ranks, env=env | {"PROTOCLIP_KILL_AT": f"{event}@{rank}"}, patience=60)
        assert codes[rank] == -9, f"{event} never fired: {output(killed, rank)[-2000:]}"
    assert pretrain(killed, "demo.yaml", SETTINGS, ranks=ranks, env=env) == [0] * ranks, output(killed)
    assert rows_of_final_weights(killed) == rows_of_final_weights(whole)
    expected = final_tensors(whole)
    figure(f"{strategy}: two runs that were never killed, final weights", ranks, device, largest(expected, final_tensors(again)))
    figure(f"law 3, {strategy}, {len(KILLS)} kills: final weights", ranks, device, largest(expected, final_tensors(killed)), BOUND)
