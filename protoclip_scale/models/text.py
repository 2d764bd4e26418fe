"""The text tower: CLIP's causal transformer, or any transformers encoder."""

import json
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPTextConfig, CLIPTextModel, PretrainedConfig

from protoclip_scale.errors import UserError
from protoclip_scale.models.outputs import TowerOutput
from protoclip_scale.recipe import schema

CLIP_VOCABULARY = 49_408
POOLING_MODES = {"mean": "mean_tokens", "first": "cls_token"}  # ours -> sentence-transformers'
WIDTH_STEP = {"cuda": 8}  # tensor cores take eight at a time, and fewer widths make fewer kernels
BUCKET_ROWS = {"cpu": 32, "cuda": 512}  # a GPU is busy with many tokens only


class TextTower(nn.Module):
    """[B, C] token ids and [B] lengths (on any device) -> pooled features [B, num_features]; columns past the longest row are not computed (on GPUs
    past the next multiple of 8).

    CLIP pools the state at ``lengths - 1``, the end token; attention is causal, so what follows it has no influence. An
    encoder pools as its folder says (sentence-transformers' ``1_Pooling``: first token or mean), without one by the mean over the
    ``lengths`` first tokens; padding is masked. ``mask`` is true for tokens before ``lengths``.

    Raises UserError if the encoder cannot be found, is none, or has fewer positions than ``settings.context_length``.
    """

    def __init__(self, settings: schema.TextTower, pretrained: bool | None = None):
        super().__init__()
        self.name = settings.name
        self.causal = settings.name == "clip"
        if self.causal:
            self.encoder, self.pooling = _clip(settings), "end"
        else:
            self.encoder, self.pooling = _encoder(settings, settings.pretrained if pretrained is None else pretrained), pooling_of(settings.name)
        self.num_features = self.encoder.config.hidden_size
        if settings.grad_checkpointing:
            _checkpoint_activations(self.encoder, settings.name)

    def forward(self, token_ids: torch.Tensor, lengths: torch.Tensor, want_layers: bool = False) -> TowerOutput:
        token_ids = _trimmed(token_ids, lengths)
        lengths = lengths.to(token_ids.device, non_blocking=True)
        mask = torch.arange(token_ids.shape[1], device=token_ids.device) < lengths[:, None]
        # with causal attention a mask would change nothing but the speed
        output = self.encoder(input_ids=token_ids, attention_mask=None if self.causal else mask.long(), output_hidden_states=want_layers)
        tokens = output.last_hidden_state
        if self.pooling == "end":
            pooled = tokens[torch.arange(len(tokens), device=tokens.device), lengths - 1]
        elif self.pooling == "first":
            pooled = tokens[:, 0]
        else:
            weights = mask.to(tokens.dtype)
            pooled = (tokens * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        layers = tuple(output.hidden_states[1:]) if want_layers else None
        return TowerOutput(pooled, tokens, mask, layers)

    def pooled(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """``forward``'s pooled features, in buckets of rows of like length, so that short captions do not pay for the padding of long ones."""
        device, sizes = token_ids.device, bucket_sizes(len(token_ids), token_ids.device.type)
        if len(sizes) == 1 and self.causal:
            return self._end_states(self.encoder.embeddings(input_ids=_trimmed(token_ids, lengths)), lengths)
        if len(sizes) == 1:
            return self(token_ids, lengths).pooled
        lengths = lengths.cpu()
        order = lengths.argsort(stable=True)
        token_ids, lengths = token_ids[order.to(device, non_blocking=True)], lengths[order].split(sizes)
        if self.causal:  # embedded together: a gradient of the vocabulary's table is as large as the table
            inputs, encode = self.encoder.embeddings(input_ids=_trimmed(token_ids, lengths[-1])), self._end_states
        else:
            inputs, encode = token_ids, lambda ids, lengths: self(ids, lengths).pooled
        pooled = torch.cat([encode(*each) for each in zip(inputs.split(sizes), lengths, strict=True)])
        return pooled.index_select(0, order.argsort().to(device, non_blocking=True))

    def _end_states(self, embedded: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What CLIP's encoder pools of embedded tokens [b, T, D]."""
        # contiguous: compiled layers would else make one graph more for the first of them
        states = self.encoder.encoder(inputs_embeds=_trimmed(embedded, lengths).contiguous(), attention_mask=None, is_causal=True).last_hidden_state
        ends = lengths.to(states.device, non_blocking=True) - 1
        return self.encoder.final_layer_norm(states[torch.arange(len(states), device=states.device), ends])


def bucket_sizes(num_rows: int, device: str) -> list[int]:
    """Rows of each bucket: a function of the number of rows, never of their lengths. Ranks with equal batches call their towers equally often, as
    strategies need that gather weights in each call; only the widths of those calls differ."""
    count = max(1, num_rows // BUCKET_ROWS.get(device, BUCKET_ROWS["cpu"]))
    return [num_rows // count + (number < num_rows % count) for number in range(count)]


def _trimmed(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[b, C, ...] without the columns behind the longest row."""
    step = WIDTH_STEP.get(tokens.device.type, 1)
    return tokens[:, : max(1, -(-int(lengths.max()) // step) * step)]


def _clip(settings: schema.TextTower) -> CLIPTextModel:
    width, depth = settings.width, settings.layers
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=CLIP_VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=settings.heads,
            max_position_embeddings=settings.context_length,
            hidden_act=settings.activation,
            pad_token_id=0,
        )
    )
    nn.init.normal_(encoder.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(encoder.embeddings.position_embedding.weight, std=0.01)
    for layer in encoder.encoder.layers:  # methods 1.1; transformers' own init swaps the two attention deviations
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            nn.init.normal_(linear.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
    return encoder


def _encoder(settings: schema.TextTower, pretrained: bool) -> nn.Module:
    name = settings.name
    try:
        config = _without_dropout(AutoConfig.from_pretrained(name))
        encoder = AutoModel.from_pretrained(name, config=config, use_safetensors=True, dtype=torch.float32) if pretrained else AutoModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.text.name: transformers cannot load {name!r} ({reason}); give 'clip', a reachable hub name, or a folder with config.json") from error
    if config.is_encoder_decoder:
        encoder = encoder.get_encoder()
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # its output is unused, and DDP refuses parameters without a gradient
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa's family starts counting behind the padding id
    if positions and config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"):
        positions -= config.pad_token_id + 1
    if positions and settings.context_length > positions:
        raise UserError(f"model.text.context_length {settings.context_length} is more than the {positions} positions of model.text.name {name}; lower it")
    return encoder


def _checkpoint_activations(encoder: nn.Module, name: str) -> None:
    enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable  # the name has changed in transformers 5
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"model.text.grad_checkpointing: {error} Set it to false, or choose another model.text.name than {name}") from error


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Dropout's masks would depend on the rank that draws them; CLIP's towers have none either."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def pooling_of(name: str) -> str:
    """``first`` or ``mean``, as the folder of a text encoder says. Raises UserError if it asks for another pooling."""
    file = Path(name) / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    modes = [key for key, on in json.loads(file.read_text(encoding="utf-8")).items() if key.startswith("pooling_mode_") and on is True]
    known = {f"pooling_mode_{mode}": kind for kind, mode in POOLING_MODES.items()}
    if len(modes) != 1 or modes[0] not in known:
        raise UserError(f"model.text.name: {file} asks for {', '.join(modes) or 'no pooling'}; only mean and first-token pooling are supported, choose another encoder")
    return known[modes[0]]


# the console is ours: no progress bars and notes of transformers between its lines
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
