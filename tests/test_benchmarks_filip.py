"""benchmarks/filip_memory.py at the acceptance's size: what it says of memory and gradients holds."""

import pytest

from tests.test_benchmarks_large_batches import run

pytestmark = pytest.mark.slow


def test_streamed_late_interaction_takes_a_fifth_of_the_memory_and_gives_the_same():
    found = run("filip_memory", "--rows", "512", "--threads", "1")
    assert found["tokens"] == [4, 24, 128]
    assert found["streamed_over_plain"]["512"] <= 0.2
    assert found["difference"]["512"] <= 1e-5
