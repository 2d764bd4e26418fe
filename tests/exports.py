"""Models to export, and what the libraries that load exports compute of real pairs, in one process of their own without this package."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file

from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.export.source import published
from protoclip_scale.models.build import build_model
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.recipe import schema
from tests.support import CORPUS

PAIRS = 256
FEATURES = frozenset({"image", "text", "logit_scale", "image_prototype", "text_prototype", "prototype_scale"})
DEMO_TEXT = {"width": 192, "heads": 3, "layers": 3, "context_length": 32}
EVALUATION = CORPUS / "eval_seen_concept-00000-of-00002.parquet"

# What users of the libraries do; it prepares pictures and captions itself, and hands them over for the live model to see the same.
READER = """
import io, json, sys
import torch
import pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import save_file

def of_open_clip(folder, pictures, captions):
    import open_clip
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    images = torch.stack([preprocess(picture) for picture in pictures])
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(captions)
    model.eval()
    image = torch.cat([model.encode_image(part, normalize=True) for part in images.split(64)])
    text = torch.cat([model.encode_text(part, normalize=True) for part in ids.split(64)])
    return {"images": images, "ids": ids, "image": image, "text": text, "logit_scale": model.logit_scale.detach().clone()}

def of_transformers(folder, pictures, captions):
    from transformers import AutoModel, AutoProcessor
    model, processor = AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(text=captions, images=pictures, padding="max_length", truncation=True, return_tensors="pt")
    images, ids, mask = inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"]
    image = torch.cat([model.get_image_features(pixel_values=part).pooler_output for part in images.split(64)])
    text = torch.cat([model.get_text_features(input_ids=part, attention_mask=own).pooler_output for part, own in zip(ids.split(64), mask.split(64))])
    unit = torch.nn.functional.normalize
    return {"images": images, "ids": ids, "mask": mask, "image": unit(image), "text": unit(text), "logit_scale": model.logit_scale.detach().clone()}

corpus, rows, jobs = sys.argv[1:]
table = pq.read_table(corpus, columns=["image", "caption"]).slice(0, int(rows))
pictures = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in table["image"].to_pylist()]
captions = [caption[0] for caption in table["caption"].to_pylist()]
torch.set_num_threads(1)
with torch.no_grad():
    for layout, folder in json.loads(jobs):
        saved = {"open_clip": of_open_clip, "transformers": of_transformers}[layout](folder, pictures, captions)
        save_file({name: tensor.contiguous() for name, tensor in saved.items()}, f"{folder}.out")
assert not any(name.split(".")[0] == "protoclip_scale" for name in sys.modules)
"""


class Settings(NamedTuple):
    """As much of a recipe as a model is built of."""

    model: schema.Model


def recipe_of(embed_dim: int, image: dict, text: dict) -> Settings:
    return Settings(schema.Model(embed_dim=embed_dim, image=image, text=text))


def trained_looking(settings: schema.Model) -> DualEncoder:
    """A model whose weights and running statistics are none of their initial values."""
    model = build_model(Settings(settings), FEATURES, 0)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.01)
        model.logit_scale.log.fill_(7.0)
        size = settings.image.size
        model.train()(torch.randint(0, 256, (8, 3, size, size), generator=draws, dtype=torch.uint8), torch.full((8, 8), 49_407), torch.full((8,), 3), wants=FEATURES)
    return model.eval()


def computed_elsewhere(jobs: list[tuple[str, Path]], cwd: Path) -> list[dict[str, torch.Tensor]]:
    """What (layout, export) give there: images, ids, unit embeddings of both sides."""
    assert pq.read_metadata(EVALUATION).num_rows >= PAIRS
    given = json.dumps([(layout, str(folder)) for layout, folder in jobs])
    # in a folder from which the package cannot be imported by accident
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", READER, str(EVALUATION), str(PAIRS), given], cwd=cwd, env=environment, check=True, timeout=1500)
    return [load_file(f"{folder}.out") for _, folder in jobs]


def pairs() -> tuple[list[Image.Image], list[str]]:
    """The same pictures and captions."""
    table = pq.read_table(EVALUATION, columns=["image", "caption"]).slice(0, PAIRS)
    return [Image.open(io.BytesIO(image["bytes"])) for image in table["image"].to_pylist()], [caption[0] for caption in table["caption"].to_pylist()]


@torch.no_grad()
def differences(model: DualEncoder, settings: schema.Model, theirs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Largest differences of unit embeddings of the pixels that were given there and of the captions; the spread of ours over rows; the captions' tokens as the export has them."""
    tokens = tokenizer_for(settings.text)(pairs()[1])
    image = torch.cat([model.encode_image(part) for part in theirs["images"].split(64)])
    text = model.encode_text(tokens.ids, tokens.lengths)
    assert len(theirs["image"]) == len(theirs["text"]) == PAIRS
    return {
        "image": (image - theirs["image"]).abs().max().item(),
        "text": (text - theirs["text"]).abs().max().item(),
        "spread": min(image.std(0).mean().item(), text.std(0).mean().item()),
        "tokens": tokenizer_for(published(settings).text)(pairs()[1]),
    }
