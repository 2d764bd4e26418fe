"""benchmarks/loss_memory.py, accumulation.py, large_batch.py and text_length.py at small sizes: they run, and what they say of gradients holds."""

import json
import subprocess
import sys

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.slow


def run(name: str, *arguments: str) -> dict:
    """The object that a benchmark prints last."""
    done = subprocess.run([sys.executable, f"benchmarks/{name}.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_accumulation_beside_open_clip():
    found = run("accumulation", "--rows", "32", "--microbatches", "4")["errors"]
    for case in ("dropout 0", "dropout 0.1"):
        assert max(found[case]["ours"].values()) < 1e-9
    assert found["dropout 0"]["open_clip"]["logit_scale"] == pytest.approx(3, abs=1e-6), "4 times the gradient"
    assert max(error for part, error in found["dropout 0"]["open_clip"].items() if part != "logit_scale") < 1e-9
    assert found["dropout 0.1"]["open_clip"]["logit_scale"] > 2
    assert found["dropout 0.1"]["open_clip"]["text_tower"] > 0.1, "other masks the second time"


def test_one_step_of_a_large_batch_equals_its_slow_twins():
    """Law 2 on the demo towers through the engine; at 32,768 rows it is the benchmark's own run."""
    found = run("large_batch", "--rows", "2048", "--microbatch", "128", "--checked", "512", "--threads", "1")
    assert found["parameter_gradient_error"] < 1e-5 and found["embedding_gradient_error"] < 1e-5
    assert 0 < found["rows_mb"] < found["peak_mb"]


def test_lengths_of_texts():
    found = run("text_length", "--rows", "64", "--batches", "1", "--width", "128", "--layers", "2")["ways"]
    assert found["padded"]["tokens"] == 77 > found["trimmed"]["tokens"] > found["buckets"]["tokens"]
    for way in ("trimmed", "buckets"):
        assert found[way]["feature_difference"] < 1e-5 and found[way]["gradient_difference"] < 1e-4


def test_memory_of_the_loss_grows_with_the_rows_alone():
    found = run("loss_memory", "--width", "64", "--plain", "1024,4096", "--tiled", "4096,8192", "--compared", "256", "--rounds", "1", "--threads", "1")
    peak = {(line["loss"], line["rows"]): line["peak_mb"] for line in found["lines"]}
    assert peak["plain", 4096] > 8 * peak["plain", 1024] and peak["plain", 4096] > 5 * peak["tiled", 4096]
    assert peak["tiled", 8192] < 2.5 * peak["tiled", 4096] and found["tiled_over_plain"].keys() == {"256"}
