"""Random draws as pure functions of what they are for: never of a rank, a worker or the number of draws before.

The key of a Philox generator is the SHA-256 of the seed, a purpose and integers (epoch, row id, view, ...), so any process can draw what any
other would. Making one costs about 12 microseconds.
"""

import hashlib

import numpy as np


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A generator of its own for (seed, purpose, numbers)."""
    text = "|".join(["protoclip-scale 1", purpose, str(int(seed)), *(str(int(number)) for number in numbers)])
    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")))


def raw_keys(count: int, seed: int, purpose: str, *numbers: int) -> np.ndarray:
    """[count] uint64 straight from the bit stream, which NumPy guarantees never to change (its distributions it does not)."""
    return generator(seed, purpose, *numbers).bit_generator.random_raw(count)


def permutation(count: int, seed: int, purpose: str, *numbers: int) -> np.ndarray:
    """A uniform permutation of range(count), int64, the same in every version of NumPy."""
    return np.argsort(raw_keys(count, seed, purpose, *numbers), kind="stable")
