"""Transforms against torchvision and Pillow, and augmentations against their definitions."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from protoclip_scale.data import transforms
from protoclip_scale.data.randomness import generator
from protoclip_scale.data.transforms import NORMALIZATION, augment, draw_crop, eval_transform, gaussian_blur, normalize


def picture(height, width, seed=0):
    low = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return torch.from_numpy(np.array(Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), [(72, 72), (100, 80), (81, 300), (33, 40), (500, 64)])
def test_evaluation_transform_equals_torchvisions(height, width):
    image = picture(height, width)
    expected = v2.Compose([v2.Resize(64, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(64)])(image)
    assert torch.equal(eval_transform(image, 64), expected)
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    by_pil = functional.pil_to_tensor(v2.Compose([v2.Resize(64, v2.InterpolationMode.BICUBIC), v2.CenterCrop(64)])(pil))
    difference = (eval_transform(image, 64).int() - by_pil.int()).abs()  # both round after each of two passes, in other arithmetic
    assert difference.max() <= 2 and difference.float().mean() < 0.1


def test_extremely_long_images_keep_their_middle_at_bounded_size():
    image = torch.zeros((3, 1, 60_000), dtype=torch.uint8)
    image[:, :, 29_998:30_002] = 200
    assert eval_transform(image, 224).shape == (3, 224, 224)
    assert eval_transform(image, 224).float().mean() > 150
    assert eval_transform(image.permute(0, 2, 1), 32).shape == (3, 32, 32)


def test_crops_follow_random_resized_crop():
    """Area share uniform, log of the aspect uniform, place uniform, always inside."""
    height = width = 1000
    crops = np.array([draw_crop(height, width, (0.2, 0.5), generator(0, "crop", number)) for number in range(4000)])
    top, left, crop_height, crop_width = crops.T
    assert (top >= 0).all() and (left >= 0).all() and (top + crop_height <= height).all() and (left + crop_width <= width).all()
    area, log_aspect = crop_height * crop_width / (height * width), np.log(crop_width / crop_height)
    places = left / (width - crop_width + 1e-9)
    for values, low, high in ((area, 0.2, 0.5), (log_aspect, math.log(3 / 4), math.log(4 / 3)), (places, 0, 1)):
        quantiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        assert np.allclose(quantiles, np.linspace(low, high, 5), atol=0.03 * (high - low) + 0.002)


def test_a_crop_that_fits_nowhere_falls_back_to_the_middle():
    assert draw_crop(10, 1000, (0.9, 1.0), generator(0, "crop")) == (0, 493, 10, 13)
    assert draw_crop(1000, 9, (0.9, 1.0), generator(0, "crop")) == (494, 0, 12, 9)
    assert draw_crop(1, 1, (0.9, 1.0), generator(0, "crop")) == (0, 0, 1, 1)


def test_clip_keeps_90_percent_and_neither_flips_nor_recolours():
    """On an image whose value is its column, a crop shows a range of columns, ascending."""
    columns = torch.arange(100, dtype=torch.uint8).expand(3, 100, 100)
    for number in range(200):
        row = augment("clip")(columns, 64, generator(0, "augmentation", number))[0, 32].int()
        assert (row.diff() >= 0).all()
        assert row[-1] - row[0] >= 100 * math.sqrt(0.9 * 3 / 4) - 4


def test_protoclip_light_does_each_part_as_often_as_defined(monkeypatch):
    counts = dict.fromkeys(("jitter", "gray", "blur", "flip"), 0)
    settings = {"jitter": [], "blur": []}

    def jitter(image, strength, hue, rng):
        counts["jitter"] += 1
        settings["jitter"].append((strength, hue))
        return image

    def gray(image, num_output_channels):
        counts["gray"] += 1
        return image

    def blur(image, kernel, sigma):
        counts["blur"] += 1
        settings["blur"].append((kernel, sigma))
        return image

    monkeypatch.setattr(transforms, "color_jitter", jitter)
    monkeypatch.setattr(transforms, "gaussian_blur", blur)
    monkeypatch.setattr(transforms.functional, "rgb_to_grayscale", gray)
    columns = torch.arange(100, dtype=torch.uint8).expand(3, 100, 100)
    num_draws = 2000
    for number in range(num_draws):
        row = augment("protoclip_light")(columns, 32, generator(3, "augmentation", number))[0, 16].int()
        counts["flip"] += bool(row[-1] < row[0])
        assert abs(int(row[-1] - row[0])) >= 100 * math.sqrt(0.5 * 3 / 4) - 8
    for name, share in (("flip", 0.5), ("jitter", 0.2), ("gray", 0.2), ("blur", 0.2)):
        assert abs(counts[name] - share * num_draws) < 4 * math.sqrt(num_draws * share * (1 - share)), name
    assert set(settings["jitter"]) == {(0.8, 0.2)}
    kernels, sigmas = zip(*settings["blur"], strict=True)
    assert set(kernels) == {21}
    assert np.allclose(np.quantile(sigmas, [0, 0.5, 1]), [0.1, 1.05, 2.0], atol=0.15)


def test_colour_jitter_draws_its_factors_and_order_as_defined(monkeypatch):
    drawn, orders = [], []

    def note(name):
        return lambda image, factor: drawn.append((name, factor)) or image

    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(transforms.functional, f"adjust_{name}", note(name))
    for number in range(1000):
        transforms.color_jitter(picture(8, 8), 0.8, 0.2, generator(0, "jitter", number))
        orders.append(tuple(name for name, _ in drawn[-4:]))
    assert len(set(orders)) == 24
    for name, low, high in (("brightness", 0.2, 1.8), ("contrast", 0.2, 1.8), ("saturation", 0.2, 1.8), ("hue", -0.2, 0.2)):
        values = [factor for which, factor in drawn if which == name]
        assert np.allclose(np.quantile(values, [0, 0.25, 0.5, 0.75, 1]), np.linspace(low, high, 5), atol=0.05 * (high - low))


@pytest.mark.parametrize(("kernel", "sigma"), [(21, 0.1), (21, 1.3), (21, 2.0), (5, 0.7)])
def test_blur_equals_torchvisions(kernel, sigma):
    image = picture(40, 33)
    assert (
        gaussian_blur(image, kernel, sigma).int() - functional.gaussian_blur(image, [kernel, kernel], [sigma, sigma]).int()
    ).abs().max() <= 1


@pytest.mark.parametrize("name", ["clip", "protoclip_light", "none"])
def test_the_generator_alone_decides(name):
    image = picture(80, 90)
    state = torch.get_rng_state()
    first, again, other = (augment(name)(image, 24, generator(0, "augmentation", number)) for number in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.dtype == torch.uint8 and first.shape == (3, 24, 24)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "none")
    for size in (1, 2, 9, 20, 21):
        assert augment(name)(image, size, generator(0, "augmentation", size)).shape == (3, size, size)


@pytest.mark.parametrize("name", ["clip", "imagenet"])
def test_normalisation_equals_torchvisions(name):
    images = torch.stack([picture(8, 8, seed) for seed in range(3)])
    expected = v2.functional.normalize(images.float() / 255, *NORMALIZATION[name])
    assert torch.allclose(normalize(images, *NORMALIZATION[name]), expected, atol=1e-6)
