"""Transforms against torchvision and Pillow, and augmentations against their definitions."""

import functools
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from protoclip_scale.data import color, transforms
from protoclip_scale.data.decode import decode_image
from protoclip_scale.data.randomness import generator
from protoclip_scale.data.transforms import AUGMENTATIONS, NORMALIZATION, RandomView, augment, draw_crop, eval_transform, normalize
from tests.support import CORPUS


def picture(height, width, seed=0):
    low = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return torch.from_numpy(np.array(Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def photographs():
    """Sixteen pictures of the demo corpus, and one of noise."""
    rows = pq.read_table(sorted(CORPUS.glob("train-*.parquet"))[4], columns=["image"]).column("image").to_pylist()[:: 512 // 16]
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)).permute(2, 0, 1)
    return [*(decode_image(row["bytes"]) for row in rows), noise]


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


# methods 6.5, 2.1 and 3.1: area of the crop; probabilities of flip, jitter, gray and blur; strength and hue of the jitter
DEFINITIONS = {
    "clip": ((0.9, 1.0), (0, 0, 0, 0), None),
    "protoclip_light": ((0.5, 1.0), (0.5, 0.2, 0.2, 0.2), (0.8, 0.2)),
    "slip": ((0.5, 1.0), (0, 0, 0, 0), None),
    "slip_ssl": ((0.08, 1.0), (0.5, 0.8, 0.2, 0.5), (0.4, 0.1)),
    "declip": ((0.2, 1.0), (0.5, 0.8, 0.2, 0.5), (0.4, 0.1)),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_each_part_is_done_as_often_in_the_order_and_with_the_settings_of_the_definition(name, monkeypatch):
    scale, probabilities, jitter = DEFINITIONS[name]
    done, settings, areas = [], {"jitter": [], "blur": []}, []
    draw = transforms.draw_crop

    def crop(height, width, scale, rng):
        done.append([])
        areas.append(scale)
        return draw(height, width, scale, rng)

    def note(part):
        def noted(image, *arguments):
            done[-1].append(part)
            settings.setdefault(part, []).append(arguments[:2])
            return image

        return noted

    monkeypatch.setattr(transforms, "draw_crop", crop)
    monkeypatch.setattr(transforms, "color_jitter", note("jitter"))
    monkeypatch.setattr(color, "grayscale", note("gray"))
    monkeypatch.setattr(color, "gaussian_blur", note("blur"))
    columns = torch.arange(100, dtype=torch.uint8).expand(3, 100, 100)
    num_draws, num_flips = 1000, 0
    for number in range(num_draws):
        row = augment(name)(columns, 16, generator(3, "augmentation", number))[0, 8].int()
        num_flips += bool(row[-1] < row[0])
    assert set(areas) == {scale}
    counts = (num_flips, *(sum(part in each for each in done) for part in ("jitter", "gray", "blur")))
    for count, probability in zip(counts, probabilities, strict=True):
        assert abs(count - probability * num_draws) <= 4 * math.sqrt(num_draws * probability * (1 - probability))
    together = sum({"jitter", "blur"} <= set(each) for each in done) / num_draws
    assert abs(together - probabilities[1] * probabilities[3]) < 0.06  # independent of each other
    assert all(each == sorted(each, key=["jitter", "gray", "blur"].index) for each in done)
    if jitter:
        assert set(settings["jitter"]) == {jitter}
        sigmas, likes = zip(*settings["blur"], strict=True)
        assert np.allclose(np.quantile(sigmas, [0, 0.25, 0.5, 0.75, 1]), np.linspace(0.1, 2, 5), atol=0.15)
        assert set(likes) == {"torchvision" if name == "protoclip_light" else "pillow"}


class PillowBlur:
    """The blur of SLIP's and MoCo's code."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))


def original(name, size):
    """The definition as the original repositories write it, on PIL images."""
    scale, (flip, jitter, gray, blur), strengths = DEFINITIONS[name]
    interpolation = InterpolationMode.BICUBIC if name in ("clip", "protoclip_light") else InterpolationMode.BILINEAR
    parts = [v2.RandomResizedCrop(size, scale, interpolation=interpolation)]
    if strengths:
        blurring = v2.GaussianBlur(21, (0.1, 2.0)) if name == "protoclip_light" else PillowBlur()
        strength, hue = strengths
        parts += [v2.RandomApply([v2.ColorJitter(strength, strength, strength, hue)], jitter), v2.RandomGrayscale(gray)]
        parts += [v2.RandomApply([blurring], blur), v2.RandomHorizontalFlip(flip)]
    return v2.Compose(parts)


def statistics_of(image):
    """What crops, colours, blur and mirroring change; one row."""
    x = image.float()
    means, spread = x.mean((1, 2)), x.std((1, 2))
    saturation, detail = (x.amax(0) - x.amin(0)).mean(), x.diff(dim=2).abs().mean()
    half = x.shape[2] // 2
    sides = x[:, :, :half].mean() - x[:, :, half:].mean()
    middle = x[:, 12:20, 12:20].mean((1, 2))
    return torch.stack([*means, *spread, *middle, saturation, detail, sides, sides.abs(), (saturation == 0).float(), means.var()])


def moments(images):
    """Mean and standard error of each statistic and of its square."""
    rows = torch.stack([statistics_of(image) for image in images]).double()
    rows = torch.cat([rows, rows**2], dim=1)
    return rows.mean(0), rows.std(0) / math.sqrt(len(rows))


NUM_DRAWS, SIZE = 500, 32


@pytest.fixture(scope="module")
def original_moments(photographs):
    """(definition) -> moments of what torchvision makes of one picture in many draws; kept."""

    @functools.cache
    def of(name):
        transform, picture = original(name, SIZE), to_pil(photographs[5])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return moments([functional.pil_to_tensor(transform(picture)) for _ in range(NUM_DRAWS)])

    return of


def farthest_moment(view, picture, expected):
    """The largest difference of a moment from the expected one, in standard errors."""
    mean, error = moments([view(picture, SIZE, generator(1, "augmentation", number)) for number in range(NUM_DRAWS)])
    return float(((mean - expected[0]).abs() / (error**2 + expected[1] ** 2 + 1e-12).sqrt()).max())


@pytest.mark.parametrize("name", DEFINITIONS)
def test_pixels_are_distributed_as_by_the_original_definition(name, photographs, original_moments):
    """No moment differs by more than chance."""
    assert farthest_moment(augment(name), photographs[5], original_moments(name)) < 4.5


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("clip", {"scale": (0.8, 1.0)}),
        ("protoclip_light", {"jitter": 0.8}),
        ("slip", {"interpolation": "bicubic"}),
        ("slip_ssl", {"scale": (0.4, 1.0)}),
        ("slip_ssl", {"flip": 0.0}),
        ("declip", {"gray": 0.0}),
        ("declip", {"blur": 0.0}),
    ],
)
def test_pixels_tell_a_wrong_definition(name, changed, photographs, original_moments):
    wrong = RandomView(**{**vars(AUGMENTATIONS[name]), **changed})
    assert farthest_moment(wrong, photographs[5], original_moments(name)) > 6


def test_mirroring_first_or_last_is_the_same(photographs):
    settings = {"scale": (0.3, 1.0), "jitter": 1.0, "gray": 0.3, "blur": 1.0, "strength": 0.4, "hue": 0.1}
    for number, image in enumerate(photographs):
        for like in ("pillow", "torchvision"):
            plain, mirrored = (
                RandomView(**settings, flip=flip, blur_like=like)(image, 40, generator(0, "augmentation", number)) for flip in (0.0, 1.0)
            )
            assert torch.equal(mirrored, plain.flip(-1))


def test_colour_jitter_draws_its_factors_and_order_as_defined(monkeypatch):
    drawn, orders = [], []

    def note(name):
        return lambda levels, factor: drawn.append((name, factor))

    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(color, name, note(name))
    for number in range(1000):
        transforms.color_jitter(np.zeros((3, 8, 8)), 0.8, 0.2, generator(0, "jitter", number))
        orders.append(tuple(name for name, _ in drawn[-4:]))
    assert len(set(orders)) == 24
    for name, low, high in (("brightness", 0.2, 1.8), ("contrast", 0.2, 1.8), ("saturation", 0.2, 1.8), ("hue", -0.2, 0.2)):
        values = [factor for which, factor in drawn if which == name]
        assert np.allclose(np.quantile(values, [0, 0.25, 0.5, 0.75, 1]), np.linspace(low, high, 5), atol=0.05 * (high - low))


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (color.brightness, functional.adjust_brightness, (0, 0.2, 0.99, 1, 1.3, 1.8)),
        (color.contrast, functional.adjust_contrast, (0, 0.2, 0.99, 1, 1.3, 1.8)),
        (color.saturation, functional.adjust_saturation, (0, 0.2, 0.99, 1, 1.3, 1.8)),
        (color.hue, functional.adjust_hue, (-0.5, -0.31, -0.1, 0, 0.05, 0.2, 0.5)),
    ],
)
def test_colour_operations_equal_torchvisions_to_one_level(ours, theirs, factors, photographs):
    for image in photographs:
        for factor in factors:
            levels = color.to_levels(image)
            ours(levels, factor)
            difference = (color.to_image(levels).int() - theirs(image, factor).int()).abs()
            assert difference.max() <= 1 and difference.float().mean() < 0.2, factor  # torchvision's hue is cut to whole levels, not rounded


def test_gray_equals_torchvisions(photographs):
    for image in photographs:
        levels = color.to_levels(image)
        assert torch.equal(color.to_image(levels), image)
        color.grayscale(levels)
        assert (color.to_image(levels).int() - functional.rgb_to_grayscale(image, 3).int()).abs().max() <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.3, 2.0])
def test_blur_equals_torchvisions_to_one_level(sigma, photographs):
    for image in photographs:
        expected = functional.gaussian_blur(image, [21, 21], [sigma, sigma])
        assert (color.gaussian_blur(image, sigma, "torchvision").int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0])
def test_blur_comes_near_pillows(sigma, photographs):
    """Away from the border: Pillow filters with three boxes of the same variance, each of which repeats the border, and rounds six times."""
    for image in photographs:
        by_pillow, ours, plain = (
            picture[:, 8:-8, 8:-8].float()
            for picture in (
                functional.pil_to_tensor(to_pil(image).filter(ImageFilter.GaussianBlur(sigma))),
                color.gaussian_blur(image, sigma, "pillow"),
                image,
            )
        )
        distance, effect = (ours - by_pillow).abs().mean(), (plain - by_pillow).abs().mean()
        assert distance < 1 + 0.1 * effect
        assert (ours - by_pillow).mean().abs() < 0.6
    assert effect > (5 if sigma > 0.2 else 0.2)  # on noise, so it is a blur that is compared


@pytest.mark.parametrize("like", ["torchvision", "pillow"])
def test_blur_is_the_convolution_that_its_taps_say(like):
    """Against a slow twin, in a size that is no multiple of anything, and smaller than the taps' reach."""
    for height, width in ((23, 17), (3, 40), (1, 1)):
        image, sigma = picture(height, width), 1.4
        taps_of, places_of, mirrors = color.BLURS[like]
        reach = min(math.ceil(3.5 * sigma), min(height, width) - 1) if mirrors else math.ceil(3.5 * sigma)
        taps = taps_of(sigma, np.abs(np.arange(-reach, reach + 1)).astype(float))
        taps /= taps.sum()
        expected = image.permute(1, 2, 0).numpy().astype(float)
        for axis in (0, 1):
            moved = expected.take(places_of(expected.shape[axis], reach), axis)
            size = expected.shape[axis]
            expected = sum(tap * moved.take(range(at, at + size), axis) for at, tap in enumerate(taps))
        ours = color.gaussian_blur(image, sigma, like).permute(1, 2, 0).numpy()
        assert np.abs(ours - expected).max() < 0.51


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_generator_alone_decides(name):
    image = picture(80, 90)
    state = torch.get_rng_state()
    first, again, other = (augment(name)(image, 24, generator(0, "augmentation", number)) for number in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.dtype == torch.uint8 and first.shape == (3, 24, 24)
    assert first.stride(0) == 1
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "none")
    for size in (1, 2, 9, 20, 21):
        assert augment(name)(image, size, generator(0, "augmentation", size)).shape == (3, size, size)


@pytest.mark.parametrize("name", ["clip", "imagenet"])
def test_normalisation_equals_torchvisions(name):
    images = torch.stack([picture(8, 8, seed) for seed in range(3)])
    expected = v2.functional.normalize(images.float() / 255, *NORMALIZATION[name])
    for batch in (images, images.contiguous(memory_format=torch.channels_last)):
        normalised = normalize(batch, *NORMALIZATION[name])
        assert torch.allclose(normalised, expected, atol=1e-6)
        assert normalised.is_contiguous(memory_format=torch.channels_last)


def test_the_bits_do_not_depend_on_memory_format_or_threads(photographs):
    threads = torch.get_num_threads()
    try:
        for name in AUGMENTATIONS:
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                for image in (photographs[0], photographs[0].contiguous()):
                    results += [augment(name)(image, 48, generator(0, "augmentation", number)) for number in range(6)]
            assert all(torch.equal(results[at], results[at % 6]) for at in range(len(results)))
    finally:
        torch.set_num_threads(threads)
