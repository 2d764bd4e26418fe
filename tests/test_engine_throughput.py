"""Figures of speed: FLOPs of a model are those one counts by hand, and MFU is the formula that docs/performance.md states."""

import functools

import pytest
import torch

from protoclip_scale.engine.model_cost import measure
from protoclip_scale.engine.peaks import known_peak
from protoclip_scale.engine.throughput import Throughput, training_flops
from protoclip_scale.objectives import build_objectives
from protoclip_scale.recipe import load_recipe
from tests.support import RECIPES, TINY

WANTS = frozenset({"image", "text", "logit_scale"})
BOTH_TRAIN = ("image_tower.a", "text_tower.b", "image_projection.weight", "text_projection.weight")
TOWERS = ("model.image.name=vit_tiny_patch16_224", "model.image.size=224", "model.text={width: 64, heads: 2, layers: 3, context_length: 32}")


@functools.cache
def cost(*overrides: str):
    recipe = load_recipe(RECIPES / "demo_clip.yaml", [*TINY, *overrides])
    return recipe, measure(recipe, build_objectives(recipe))


def transformer(tokens: int, width: int, layers: int) -> int:
    """Projections of attention and an MLP four times as wide, 12 w^2 weights; and attention's two products."""
    return layers * (2 * 12 * width**2 * tokens + 2 * 2 * tokens**2 * width)


def test_flops_are_those_of_the_textbook():
    recipe, counted = cost(*TOWERS)
    patches = 14 * 14
    by_hand = 2 * patches * (3 * 16 * 16) * 192 + transformer(patches + 1, 192, 12)
    assert counted.flops["image_tower"].at(0) == pytest.approx(by_hand, rel=0.01)
    for tokens in (1, 7, 32):
        assert counted.flops["text_tower"].at(tokens) == pytest.approx(transformer(tokens, 64, 3), rel=1e-6)
    assert counted.flops["text_projection"].at(0) == 2 * 64 * recipe.model.embed_dim


def test_parts_that_do_not_train_count_once():
    counted = cost(*TOWERS)[1]
    flops = counted.flops
    sample = training_flops(counted, WANTS, BOTH_TRAIN)
    assert sample.at(5) == pytest.approx(3 * sum(each.at(5) for each in flops.values()))
    locked = training_flops(counted, WANTS, BOTH_TRAIN[1:])
    assert sample.at(5) - locked.at(5) == pytest.approx(2 * flops["image_tower"].at(5))
    assert training_flops(counted, frozenset({"text"}), BOTH_TRAIN).at(5) == pytest.approx(3 * (flops["text_tower"].at(5) + flops["text_projection"].at(5)))


def test_mfu_is_its_formula():
    """Model FLOPs of the captions as they are, times samples per second and rank, over the peak."""
    recipe, counted = cost("run.peak_tflops=0.5")
    meter = Throughput(recipe, build_objectives(recipe), torch.device("cpu"))
    meter.begin(WANTS, BOTH_TRAIN)
    lengths = [torch.randint(2, 17, (64,), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for each in lengths:
        meter.add(each)
    figures = meter.figures(seconds=2.0)
    by_caption = [3 * sum(part.at(int(tokens)) for part in counted.flops.values()) for tokens in torch.cat(lengths)]
    assert figures["samples_per_second"] == figures["samples_per_second_per_rank"] == 3 * 64 / 2.0
    assert figures["mfu"] == pytest.approx(sum(by_caption) / 2.0 / 0.5e12)
    meter.add(lengths[0])
    assert meter.figures(seconds=1.0)["samples_per_second"] == 64  # of the new window alone


def test_without_a_known_peak_there_is_no_mfu():
    recipe = load_recipe(RECIPES / "demo_clip.yaml", TINY)
    meter = Throughput(recipe, build_objectives(recipe), torch.device("cpu"))
    meter.begin(WANTS, BOTH_TRAIN)
    meter.add(torch.full((64,), 5))
    assert "mfu" not in meter.figures(seconds=1.0)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-32GB", "fp16", 112),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA A1000", "bf16", None),
    ],
)
def test_peaks_are_found_by_the_drivers_names(name, precision, tflops):
    found = known_peak(name, precision)
    assert found == (tflops and pytest.approx(tflops * 1e12))
