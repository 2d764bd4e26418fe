"""benchmarks/memory.py and compile.py at small sizes: --check's memory is what ranks take, and compiled steps are measured beside eager ones."""

import json
import subprocess
import sys

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.slow
SMALL = ("--set", "model.image.name=test_vit", "--set", "model.image.size=32", "--set", "model.text={width: 32, heads: 2, layers: 2, context_length: 24}")


def run(name: str, *arguments: str) -> dict:
    """The object that a benchmark prints last."""
    done = subprocess.run([sys.executable, f"benchmarks/{name}.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_is_what_check_says():
    """Two ranks of the demo towers: few rows, where weights, gradients, AdamW and buckets are nearly all; and many, where activations are."""
    for line in run("memory", "--rows", "16", "256", "--strategies", "ddp", "zero2", "zero3")["results"]:
        assert 0.8 < line["ratio"] < 1.25, line


def test_compiled_steps_are_measured():
    found = run("compile", "--rows", "40", "--steps", "3", "--threads", "1", *SMALL)
    assert found["graphs"] <= 4 and found["graphs_after_first_step"] == 0
    assert found["compiled_over_eager"] == pytest.approx(found["seconds"]["median"]["compiled"] / found["seconds"]["median"]["eager"], rel=0.01)
