"""What is exported: a model whose weights are read one at a time, from memory or from a checkpoint."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from protoclip_scale.export.logits import Logits, plain_logits
from protoclip_scale.export.token_heads import TokenHeads
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.text import CLIP_VOCABULARY, TextTower, own_ids
from protoclip_scale.recipe import schema

FEATURES = frozenset({"image", "text", "logit_scale"})
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Probe(NamedTuple):
    """Made-up inputs on which both models are compared: float images [2, 3, S, S], token ids [2, C] as the export has them, and their lengths [2]."""

    images: torch.Tensor
    token_ids: torch.Tensor
    lengths: torch.Tensor


class Embeddings(NamedTuple):
    """Unit rows [2, embed_dim] of a probe."""

    image: torch.Tensor
    text: torch.Tensor


class Source(NamedTuple):
    """``structure``: the model, perhaps without values (on the meta device); ``read``: one of its tensors by its name; ``embed``: the model's embeddings of a
    probe, its weights rounded to a dtype as files of that dtype round them; ``logits``: its temperature; ``tokens``: of its token heads. ``read`` has what both are made of."""

    settings: schema.Model
    structure: DualEncoder
    read: Callable[[str], torch.Tensor]
    embed: Callable[[Probe, torch.dtype], Embeddings]
    logits: Logits
    tokens: TokenHeads | None = None


def source_of_model(model: DualEncoder, settings: schema.Model, logits: Logits | None = None, tokens: TokenHeads | None = None) -> Source:
    """A model in memory; it is not changed. Costs a second copy while files of another dtype than float32, or a model on a GPU, are checked."""
    state = model.state_dict()

    def embed(probe: Probe, dtype: torch.dtype) -> Embeddings:
        training, on_cpu = model.training, next(model.parameters()).device.type == "cpu"
        twin = model if on_cpu and dtype == torch.float32 else copy.deepcopy(model).cpu()  # a GPU's products may be rounded otherwise
        if twin is not model:
            round_weights(twin, dtype)
        try:
            return embeddings_of(twin.eval(), probe)
        finally:
            model.train(training)

    return Source(settings, model, lambda name: state[name].detach(), embed, logits or plain_logits(settings), tokens)


def structure_of(settings: schema.Model) -> DualEncoder:
    """The model without any values: a second or two, no memory."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return DualEncoder(settings, FEATURES, pretrained=False).eval()


def published(settings: schema.Model) -> schema.Model:
    """The settings to publish: a text encoder that is a folder of this machine keeps its last name alone, and CLIP's table of tokens has no row for a mask token."""
    name = Path(settings.text.name).name if Path(settings.text.name).exists() else settings.text.name
    return settings.model_copy(update={"text": settings.text.model_copy(update={"name": name, "mask_token": False}), "init_from": None})


def stays_float32(name: str) -> bool:
    """Of our names: running statistics, which may be beyond float16, and temperatures, whose rounding would show in every logit."""
    return name.endswith(("running_mean", "running_var", "logit_scale.log", "_scale_head.log", "_bias_head.value"))


@torch.no_grad()
def round_weights(model: DualEncoder, dtype: torch.dtype) -> None:
    """To what files of this dtype hold, in place."""
    for name, tensor in model.state_dict().items():
        if dtype != torch.float32 and tensor.is_floating_point() and not stays_float32(name):
            tensor.copy_(tensor.to(dtype))


@torch.no_grad()
def embeddings_of(model: DualEncoder, probe: Probe) -> Embeddings:
    """In float32, whatever the model was trained in."""
    compute_dtype, model.compute_dtype = model.compute_dtype, None
    try:
        ids = own_ids(probe.token_ids) if model.text_tower.has_mask_row else probe.token_ids
        return Embeddings(model.encode_image(probe.images).float(), model.encode_text(ids, probe.lengths).float())
    finally:
        model.compute_dtype = compute_dtype


def made_up(settings: schema.Model, tower: TextTower) -> Probe:
    """Seeded noise, and token ids of a full row and a shorter one."""
    draws = torch.Generator().manual_seed(0)
    context_length, size = settings.text.context_length, settings.image.size
    vocabulary, padding = CLIP_VOCABULARY if tower.is_clip else tower.encoder.config.vocab_size, tower.encoder.config.pad_token_id
    images = torch.randn(2, 3, size, size, generator=draws)
    lengths = torch.tensor([context_length, max(2, context_length // 2)])
    ids = torch.randint(1, vocabulary - 2, (2, context_length), generator=draws)
    ids[ids == padding] += 1
    if tower.is_clip:
        ids[torch.arange(2), lengths - 1] = vocabulary - 1  # the end token has the largest id, which open_clip pools by
    return Probe(images, ids.masked_fill(torch.arange(context_length) >= lengths[:, None], padding), lengths)
