"""--check --fetch: what a recipe needs from hubs is cached where there is a network, and loads afterwards where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from protoclip_scale.engine import command
from protoclip_scale.engine.prefetch import needs
from protoclip_scale.recipe import load_recipe
from tests.servers import Server
from tests.support import RECIPES, ROOT, TINY, overrides

ENCODER = "org/tiny-encoder"


def recipe(*values: str):
    return load_recipe(RECIPES / "demo_clip.yaml", values)


def loaders(*values: str) -> list[str]:
    return [need.loader for need in needs(recipe(*values))]


def test_only_what_a_job_would_download_is_needed(tmp_path):
    assert loaders() == []
    assert loaders("model.image.pretrained=true") == ["image"]
    assert loaders("model.text={name: org/encoder, pretrained: true}") == ["text"]
    assert loaders(f"model.text={{name: {tmp_path}}}") == [] == loaders(f"model.init_from={tmp_path}")
    assert loaders("model.init_from=open_clip:ViT-B-32/openai", "model.text={name: org/encoder}") == ["text", "init_from"]


def test_fetch_alone_is_refused(capsys):
    assert command.main(["--recipe", str(RECIPES / "demo.yaml"), "--fetch"]) == 1
    assert "--fetch has no effect without --check" in capsys.readouterr().err


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A repository with a small transformers encoder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat"]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    BertModel(BertConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)).save_pretrained(folder)
    return folder


def check(cache: Path, endpoint: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """``--check`` of a recipe with that encoder, with a cache of its own."""
    values = (*TINY, f"model.text={{name: {ENCODER}, pretrained: true, context_length: 16}}")
    hub = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "launch/pretrain.py", "--recipe", "recipes/demo_clip.yaml", "--check", *arguments, *overrides(values)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | hub, capture_output=True, text=True)


@pytest.mark.slow
def test_what_was_fetched_loads_without_a_network(encoder, tmp_path):
    nowhere = "http://127.0.0.1:9"
    with Server("hub_server", "--repo", ENCODER, "--commit", encoder) as server:
        first = check(tmp_path, server.url, "--fetch", HF_HUB_OFFLINE="1")  # it is asked for a network, whatever the shell says
        assert first.returncode == 0, first.stdout + first.stderr
        assert f"fetched model.text {ENCODER}: configuration, tokenizer and weights" in first.stdout
        assert "no problems found" in first.stdout
    again = check(tmp_path, nowhere, "--fetch")
    assert again.returncode == 0 and f"already there model.text {ENCODER}" in again.stdout, again.stdout + again.stderr
    job = check(tmp_path, nowhere, HF_HUB_OFFLINE="1")
    assert job.returncode == 0, job.stdout + job.stderr


@pytest.mark.slow
def test_what_cannot_be_fetched_is_one_line(encoder, tmp_path):
    with Server("hub_server", "--repo", "org/another", "--commit", encoder) as server:
        done = check(tmp_path, server.url, "--fetch")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --fetch: model.text {ENCODER}") and len(done.stderr.splitlines()) == 1, done.stderr
