"""Gradient error of accumulation against the whole batch, for every parameter: ours, and open_clip's, in one run.

    python benchmarks/accumulation.py [--rows 64] [--microbatches 4] [--corpus demo_corpus]

Both accumulate the gradient of the same model with the same weights (a timm ViT and CLIP's text transformer, small, in fp64) over the same real rows. open_clip's is that of its
package: open_clip_train.train.train_one_epoch with accum_freq, over a loader of micro-batches, with an optimiser that keeps the gradients it is handed. The second part gives
both towers dropout; the reference is then the same micro-batches with all activations kept, drawn from the same random state. An error is the largest
difference of a tensor over its largest value; k-fold gradients have an error of k - 1.

Prints a table, and as the last line one JSON object with its figures.
"""

import argparse
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from large_batch_parts.rows import read_batch
from open_clip_train.train import train_one_epoch
from rich.console import Console
from rich.table import Table
from torch import nn

from protoclip_scale.data.batches import Batch
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives.clip import clip_loss
from protoclip_scale.recipe import schema

ROOT = Path(__file__).resolve().parent.parent
FEATURES = frozenset({"image", "text", "logit_scale"})
MODEL = schema.Model(embed_dim=64, image={"name": "test_vit", "size": 32}, text={"width": 64, "heads": 2, "layers": 2, "context_length": 24})
DROPOUT = 0.1
NOTHING = 1e-12  # the bias of an attention's key has no gradient but rounding
PARTS = ("image_tower", "image_projection", "text_tower", "text_projection", "logit_scale")
Gradients = dict[str, torch.Tensor]


class AsOpenClip(nn.Module):
    """The dual encoder behind the interface of open_clip's models."""

    def __init__(self, encoder: DualEncoder):
        super().__init__()
        self.encoder = encoder

    @property
    def logit_scale(self) -> torch.Tensor:
        """The logarithm, which open_clip clamps after each step."""
        return self.encoder.logit_scale.log

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.encoder(images, texts, texts.argmax(dim=1) + 1, wants=FEATURES)  # the end token is the largest
        return {"image_features": features["image"], "text_features": features["text"], "logit_scale": features["logit_scale"]}


class Keeper(torch.optim.SGD):
    """Keeps the gradients it is handed and changes nothing."""

    kept: list[torch.Tensor | None] = []

    def step(self, closure=None) -> None:
        self.kept = [parameter.grad.clone() for parameter in self.param_groups[0]["params"]]


class Loader:
    """Micro-batches as open_clip's loader gives them."""

    def __init__(self, batch: Batch, size: int):
        self._pieces = list(zip(batch.images.split(size), batch.token_ids.split(size), strict=True))
        self.num_batches, self.num_samples = len(self._pieces), len(batch.images)

    def __iter__(self):
        return iter(self._pieces)


def build(dropout: float) -> DualEncoder:
    torch.manual_seed(0)
    model = DualEncoder(MODEL, FEATURES).double().train()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    for layer in model.text_tower.encoder.encoder.layers:
        layer.self_attn.dropout = dropout
    torch.manual_seed(1)
    return model


def by_name(model: nn.Module, gradients: list[torch.Tensor]) -> Gradients:
    return {name: gradient for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True)}


def of_open_clip(batch: Batch, microbatches: int, dropout: float) -> Gradients:
    model = AsOpenClip(build(dropout))
    optimizer = Keeper(model.parameters(), lr=1.0)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=Loader(batch, len(batch.images) // microbatches))}
    settings = SimpleNamespace(
        device="cpu", precision="fp32", accum_freq=microbatches, distill=False, skip_scheduler=True, horovod=False, grad_clip_norm=None,
        rank=0, local_rank=0, world_size=1, log_local=False, log_every_n_steps=1, batch_size=len(batch.images) // microbatches, wandb=False,
    )  # fmt: skip
    train_one_epoch(model, data, open_clip.ClipLoss(), 0, optimizer, None, None, None, settings)
    return by_name(model.encoder, optimizer.kept)


def of_ours(batch: Batch, microbatches: int, dropout: float) -> Gradients:
    model = build(dropout)
    features = model(batch.images, batch.token_ids, batch.token_lengths, wants=FEATURES, microbatch=len(batch.images) // microbatches)
    return _backward(model, features["image"], features["text"])


def kept_activations(batch: Batch, microbatches: int, dropout: float, together: bool) -> Gradients:
    """The reference. ``together``: both towers see a micro-batch before the next one, as in open_clip; else a tower sees all of them first."""
    model, size = build(dropout), len(batch.images) // microbatches
    pieces = list(zip(batch.images.split(size), batch.token_ids.split(size), batch.token_lengths.split(size), strict=True))
    if together:
        image, text = map(torch.cat, zip(*((model.encode_image(images), model.encode_text(ids, lengths)) for images, ids, lengths in pieces), strict=True))
    else:
        image, text = torch.cat([model.encode_image(images) for images, _, _ in pieces]), torch.cat([model.encode_text(*piece[1:]) for piece in pieces])
    return _backward(model, image, text)


def _backward(model: DualEncoder, image: torch.Tensor, text: torch.Tensor) -> Gradients:
    clip_loss(image, text, image, text, model.logit_scale(), torch.arange(len(image))).backward()
    return by_name(model, [parameter.grad for parameter in model.parameters()])


def errors(expected: Gradients, found: Gradients) -> dict[str, float]:
    """The largest of each part of the model, over all its parameters."""
    worst = dict.fromkeys(PARTS, 0.0)
    for name, tensor in expected.items():
        largest, difference = tensor.abs().max().item(), (found[name] - tensor).abs().max().item()
        part = name.split(".")[0]
        worst[part] = max(worst[part], difference / largest if largest > NOTHING else difference)
    return worst


def measured(batch: Batch, microbatches: int, dropout: float) -> dict[str, dict[str, float]]:
    if dropout:
        return {
            "ours": errors(kept_activations(batch, microbatches, dropout, together=False), of_ours(batch, microbatches, dropout)),
            "open_clip": errors(kept_activations(batch, microbatches, dropout, together=True), of_open_clip(batch, microbatches, dropout)),
        }
    return {name: errors(of(batch, 1, 0.0), of(batch, microbatches, 0.0)) for name, of in (("ours", of_ours), ("open_clip", of_open_clip))}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=ROOT / "recipes" / "demo_corpus", help="parquet file, or a folder with train*.parquet")
    parser.add_argument("--rows", type=int, default=64, help="of the whole batch")
    parser.add_argument("--microbatches", type=int, default=4)
    chosen = parser.parse_args(argv)
    if chosen.rows % chosen.microbatches:
        parser.error(f"--rows {chosen.rows} is not a multiple of --microbatches {chosen.microbatches}")
    logging.getLogger().setLevel(logging.WARNING)
    batch = read_batch(chosen.corpus, chosen.rows, MODEL.image.size, MODEL.text.context_length)
    found = {f"dropout {dropout:g}": measured(batch, chosen.microbatches, dropout) for dropout in (0.0, DROPOUT)}
    table = Table("", *PARTS, title=f"Gradient error of {chosen.microbatches} micro-batches against one batch of {chosen.rows} rows, fp64")
    for case, contestants in found.items():
        for name, worst in contestants.items():
            table.add_row(f"{name}, {case}", *(f"{worst[part]:.1e}" for part in PARTS))
    Console(soft_wrap=True).print(table)
    print(json.dumps({"rows": chosen.rows, "microbatches": chosen.microbatches, "open_clip": open_clip.__version__, "errors": found}))


if __name__ == "__main__":
    main()
