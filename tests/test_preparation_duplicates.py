"""Finding repeats: equal to a comparison of all with all, on any mixture of clusters; hashes that mean what they say on real images."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.fft
from PIL import Image

from protoclip_scale.preparation import duplicates
from protoclip_scale.preparation.decisions import EXACT, LEAKED, NEAR, EvaluationHashes, decide
from protoclip_scale.preparation.hashes import caption_hash, perceptual_hash, pixel_hash
from protoclip_scale.preparation.settings import Settings
from tests.support import CORPUS


def slow_first_near(hashes: np.ndarray, radius: int) -> list[int]:
    """The definition: each row in order, compared with every row kept so far."""
    values, kept, first = hashes.tolist(), [], []
    for row, value in enumerate(values):
        near = next((other for other in kept if (value ^ values[other]).bit_count() <= radius), row)
        kept += [row] if near == row else []
        first.append(near)
    return first


def clustered(seed: int) -> tuple[np.ndarray, int]:
    """Hashes around 150 centres, some bits apart, with many equal ones; a radius."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 1500))
    hashes = rng.integers(0, 2**64, size=150, dtype=np.uint64)[rng.integers(0, 150, rows)]
    for _ in range(int(rng.integers(0, 6))):
        flipped = np.uint64(1) << rng.integers(0, 64, rows).astype(np.uint64)
        hashes = np.where(rng.random(rows) < 0.5, hashes ^ flipped, hashes)
    return hashes, int(rng.integers(0, duplicates.MAX_RADIUS + 1))


@pytest.mark.parametrize(("few_rows", "max_pairs"), [(64, 10**7), (64, 100), (1024, 10**7)], ids=["sorts", "halves", "all with all"])
def test_near_repeats_are_those_of_a_comparison_of_all_with_all(monkeypatch, few_rows, max_pairs):
    monkeypatch.setattr(duplicates, "FEW_ROWS", few_rows)
    monkeypatch.setattr(duplicates, "MAX_PAIRS", max_pairs)
    num_dropped = 0
    for seed in range(12):
        hashes, radius = clustered(seed)
        expected = slow_first_near(hashes, radius)
        assert duplicates.first_near(hashes, radius).tolist() == expected, (seed, radius)
        num_dropped += sum(first != row for row, first in enumerate(expected))
    assert num_dropped > 1000


def test_groups_are_compared_by_themselves():
    for seed in range(8):
        hashes, radius = clustered(seed)
        groups = np.random.default_rng(seed).integers(0, 20, len(hashes)).astype(np.uint64)
        expected = np.empty(len(hashes), dtype=np.int64)
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            expected[members] = members[slow_first_near(hashes[members], radius)]
        assert duplicates.first_near_within(groups, hashes, radius).tolist() == expected.tolist(), seed
    assert duplicates.first_near_within(np.empty(0, np.uint64), np.empty(0, np.uint64), 4).tolist() == []


def test_the_nearest_of_a_base_is_its_first_within_the_radius():
    for seed in range(8):
        hashes, radius = clustered(seed)
        base, rest = hashes[: len(hashes) // 3], hashes[len(hashes) // 3 :]
        close = np.bitwise_count(rest[:, None] ^ base[None, :]) <= radius
        expected = np.where(close.any(1), close.argmax(1), -1) if len(base) else np.full(len(rest), -1)
        assert duplicates.nearest_in(base, rest, radius).tolist() == expected.tolist(), seed


def test_a_long_chain_is_thinned_and_not_swallowed():
    """Frames of a film: each 2 bits from the next, so every third stays at radius 4."""
    chain = np.array([(1 << bits) - 1 for bits in range(0, 65, 2)], dtype=np.uint64)
    assert duplicates.first_near(chain, 4).tolist() == [number // 3 * 3 for number in range(len(chain))]


def test_equal_rows_name_the_first():
    first, second = np.array([5, 5, 1, 5, 1], np.uint64), np.array([7, 8, 7, 7, 7], np.uint64)
    assert duplicates.first_equal(first).tolist() == [0, 0, 2, 0, 2]
    assert duplicates.first_equal(first, second).tolist() == [0, 1, 2, 0, 2]
    assert duplicates.first_equal(np.empty(0, np.uint64)).tolist() == []


def columns(pixels, perceptual, captions) -> dict[str, np.ndarray]:
    return {
        "row": np.arange(10, 10 + len(pixels)),
        **{name: np.array(values, dtype=np.uint64) for name, values in (("pixels", pixels), ("perceptual", perceptual), ("captions", captions))},
    }


NOTHING = EvaluationHashes(np.empty(0, np.uint64), np.empty(0, np.int64))


def dropped(hashes: dict[str, np.ndarray], evaluation: EvaluationHashes = NOTHING, **settings) -> list[tuple[int, int, int]]:
    return [(int(row), int(reason), int(of)) for row, reason, of in zip(*decide(hashes, evaluation, Settings(**settings)), strict=True)]


def test_a_pair_repeats_only_with_its_captions_and_an_image_without():
    hashes = columns(pixels=[1, 1, 1, 2], perceptual=[0, 0, 0, 1 << 40], captions=[3, 4, 3, 3])
    assert dropped(hashes, deduplicate="exact") == [(12, EXACT, 10)]
    assert dropped(hashes, deduplicate="exact", deduplicate_by="image") == [(11, EXACT, 10), (12, EXACT, 10)]
    assert dropped(hashes, deduplicate="perceptual") == [(12, EXACT, 10), (13, NEAR, 10)]
    assert dropped(hashes, deduplicate="perceptual", radius=0) == [(12, EXACT, 10)]


def test_leaked_rows_go_first_and_drag_nothing_along():
    hashes = columns(pixels=[1, 1, 2, 3], perceptual=[0b1, 0b1, 0b110001, 0b111111111], captions=[5, 5, 5, 5])
    evaluation = EvaluationHashes(np.array([7 << 50, 0], dtype=np.uint64), np.array([4, 9]))
    assert dropped(hashes, evaluation, leakage=("x",), radius=2) == [(10, LEAKED, 9), (11, LEAKED, 9)]
    assert dropped(hashes, evaluation, leakage=("x",), radius=2, deduplicate="perceptual") == [(10, LEAKED, 9), (11, LEAKED, 9)]


def test_what_equals_a_near_repeat_names_the_row_that_stays():
    hashes = columns(pixels=[1, 2, 2], perceptual=[0, 3, 3], captions=[5, 5, 5])
    assert dropped(hashes, deduplicate="perceptual") == [(11, NEAR, 10), (12, EXACT, 10)]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    table = pq.read_table(CORPUS / "val-00000-of-00001.parquet", columns=["image"])
    return [np.array(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in table.to_pylist()]


def test_perceptual_hashes_are_the_dct_hashes_of_their_definition(images):
    for pixels in images:
        gray = np.asarray(Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
        low = scipy.fft.dctn(gray, type=2)[:8, :8].ravel()
        clear = np.abs(low - np.median(low)) > 1e-2  # the rest are ties but for rounding
        bits = np.array([int(bit) for bit in f"{perceptual_hash(pixels):064b}"])
        assert (bits == (low > np.median(low)))[clear].all() and clear.sum() > 60
    assert perceptual_hash(np.full((40, 40, 3), 200, np.uint8)) == perceptual_hash(np.full((40, 40, 3), 90, np.uint8))


def test_copies_lie_within_the_radius_and_most_other_images_do_not(images):
    def copy(pixels: np.ndarray, side: int, quality: int) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
        return np.array(Image.open(buffer))

    hashes = np.array([perceptual_hash(pixels) for pixels in images], dtype=np.uint64)
    copies = np.array([perceptual_hash(copy(pixels, 96, 75)) for pixels in images], dtype=np.uint64)
    radius = Settings().radius
    assert (duplicates.distance(hashes, copies) <= radius).mean() > 0.95
    others = duplicates.distance(hashes[:, None], hashes[None, :])[np.triu_indices(len(hashes), 1)]
    assert (others <= radius).mean() < 0.002


def test_pixel_hashes_tell_every_pixel_and_the_shape(images):
    assert len({pixel_hash(pixels) for pixels in images}) == len(images)
    changed = images[0].copy()
    changed[-1, -1, -1] ^= 1
    assert pixel_hash(changed) != pixel_hash(images[0]) == pixel_hash(images[0].copy())
    assert pixel_hash(np.zeros((2, 8, 3), np.uint8)) != pixel_hash(np.zeros((4, 4, 3), np.uint8))


def test_caption_hashes_see_what_training_sees():
    assert caption_hash(["a  cat\n", "", "cat"]) == caption_hash(["a cat", "cat"])
    assert len({caption_hash(captions) for captions in (["a cat"], ["cat", "a cat"], ["a cat", "cat"], ["a catcat"], [])}) == 5
