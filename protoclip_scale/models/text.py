"""The text tower: CLIP's transformer, or any transformers encoder."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPTextConfig, CLIPTextModel, PretrainedConfig

from protoclip_scale.errors import UserError
from protoclip_scale.models.microbatches import Outputs, joined
from protoclip_scale.models.outputs import TowerOutput
from protoclip_scale.recipe import schema

CLIP_VOCABULARY = 49_408
MASK_ID = CLIP_VOCABULARY - 2  # of a tokenizer with a mask token; start and end come after it
POOLING_MODES = {"mean": "mean_tokens", "first": "cls_token"}  # ours -> sentence-transformers'
WIDTH_STEP = {"cuda": 8}  # tensor cores take eight at a time, and fewer widths make fewer kernels
BUCKET_ROWS = {"cpu": 32, "cuda": 512}  # a GPU is busy with many tokens only


class TextTower(nn.Module):
    """[B, C] token ids and [B] lengths (on any device) -> pooled features [B, num_features]; columns past the longest row are not computed (on GPUs
    past the next multiple of 8).

    CLIP pools the state at ``lengths - 1``, the end token; attention is causal, so what follows it has no influence, or (``settings.causal`` false) padding is masked. An
    encoder pools as its folder says (sentence-transformers' ``1_Pooling``: first token or mean), without one by the mean over the
    ``lengths`` first tokens; padding is masked. ``mask`` is true for tokens before ``lengths``.

    Raises UserError if the encoder cannot be found, is none, or has fewer positions than ``settings.context_length``.
    """

    def __init__(self, settings: schema.TextTower, pretrained: bool | None = None):
        super().__init__()
        self.name = settings.name
        self.is_clip = settings.name == "clip"
        self.causal = self.is_clip and settings.causal
        self.has_mask_row = self.is_clip and settings.mask_token
        if self.is_clip:
            self.encoder, self.pooling = _clip(settings), "end"
        else:
            self.encoder, self.pooling = _encoder(settings, settings.pretrained if pretrained is None else pretrained), pooling_of(settings.name)
        self.num_features = self.encoder.config.hidden_size
        if settings.grad_checkpointing:
            _checkpoint_activations(self.encoder, settings.name)

    def forward(self, token_ids: torch.Tensor, lengths: torch.Tensor, want_layers: bool = False) -> TowerOutput:
        token_ids = _trimmed(token_ids, lengths)
        mask = _mask(token_ids, lengths)
        if self.is_clip and not self.causal:
            assert not want_layers
            return self._output(self._clip_states(self.encoder.embeddings(input_ids=token_ids), lengths), lengths)
        # with causal attention a mask would change nothing but the speed
        output = self.encoder(input_ids=token_ids, attention_mask=None if self.causal else mask.long(), output_hidden_states=want_layers)
        return self._output(output.last_hidden_state, lengths, tuple(output.hidden_states[1:]) if want_layers else None)

    def _output(self, tokens: torch.Tensor, lengths: torch.Tensor, layers: tuple[torch.Tensor, ...] | None = None) -> TowerOutput:
        """The tower's output of token states behind the last norm."""
        mask = _mask(tokens, lengths)
        if self.pooling == "end":
            pooled = tokens[torch.arange(len(tokens), device=tokens.device), lengths.to(tokens.device, non_blocking=True) - 1]
        elif self.pooling == "first":
            pooled = tokens[:, 0]
        else:
            weights = mask.to(tokens.dtype)
            pooled = (tokens * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        return TowerOutput(pooled, tokens, mask, layers)

    def pooled(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """``forward``'s pooled features, in buckets of rows of like length, so that short captions do not pay for the padding of long ones."""
        pool = self._end_states if self.is_clip else lambda ids, lengths: self(ids, lengths).pooled
        return self._in_buckets(pool, token_ids, lengths)

    def read(self, take: Callable[..., Outputs], token_ids: torch.Tensor, lengths: torch.Tensor, *rows: torch.Tensor) -> Outputs:
        """``take(output, *rows)`` of what ``forward`` gives, in the same buckets: tensors [b, ...], whose shapes must not depend on the bucket's length. ``rows``: further
        tensors [B, ...]."""
        if self.is_clip:
            return self._in_buckets(lambda embedded, lengths, *rows: take(self._output(self._clip_states(embedded, lengths), lengths), *rows), token_ids, lengths, *rows)
        return self._in_buckets(lambda ids, lengths, *rows: take(self(ids, lengths), *rows), token_ids, lengths, *rows)

    def _in_buckets(self, encode: Callable[..., Outputs], token_ids: torch.Tensor, lengths: torch.Tensor, *rows: torch.Tensor) -> Outputs:
        """``encode(inputs, lengths, *rows)``, whose inputs are CLIP's embedded tokens [b, T, D], or ids [b, C] of another encoder, put together again in the rows' own order."""
        device, sizes = token_ids.device, bucket_sizes(len(token_ids), token_ids.device.type)
        if len(sizes) == 1:
            inputs = self.encoder.embeddings(input_ids=_trimmed(token_ids, lengths)) if self.is_clip else token_ids
            return encode(inputs, lengths, *rows)
        lengths = lengths.cpu()
        order = lengths.argsort(stable=True)
        token_ids, *rows = (each[order.to(each.device, non_blocking=True)] for each in (token_ids, *rows))
        lengths = lengths[order].split(sizes)
        # embedded together: a gradient of the vocabulary's table is as large as the table
        inputs = self.encoder.embeddings(input_ids=_trimmed(token_ids, lengths[-1])) if self.is_clip else token_ids
        output = joined([encode(*each) for each in zip(inputs.split(sizes), lengths, *(each.split(sizes) for each in rows), strict=True)])
        back = order.argsort().to(device, non_blocking=True)
        return output.index_select(0, back) if isinstance(output, torch.Tensor) else tuple(each.index_select(0, back) for each in output)

    def _end_states(self, embedded: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What CLIP's encoder pools of embedded tokens [b, T, D]."""
        states = self._clip_layers(embedded, lengths)
        ends = lengths.to(states.device, non_blocking=True) - 1
        return self.encoder.final_layer_norm(states[torch.arange(len(states), device=states.device), ends])

    def _clip_states(self, embedded: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The states of embedded tokens behind the last norm; columns past the longest row are cut."""
        return self.encoder.final_layer_norm(self._clip_layers(embedded, lengths))

    def _clip_layers(self, embedded: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        # contiguous: compiled layers would else make one graph more for the first of them
        embedded = _trimmed(embedded, lengths).contiguous()
        mask = None if self.causal else _mask(embedded, lengths)[:, None, None, :].expand(-1, -1, embedded.shape[1], -1)
        return self.encoder.encoder(inputs_embeds=embedded, attention_mask=mask, is_causal=self.causal).last_hidden_state


def bucket_sizes(num_rows: int, device: str) -> list[int]:
    """Rows of each bucket: a function of the number of rows, never of their lengths. Ranks with equal batches call their towers equally often, as
    strategies need that gather weights in each call; only the widths of those calls differ."""
    count = max(1, num_rows // BUCKET_ROWS.get(device, BUCKET_ROWS["cpu"]))
    return [num_rows // count + (number < num_rows % count) for number in range(count)]


def _trimmed(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[b, C, ...] without the columns behind the longest row."""
    step = WIDTH_STEP.get(tokens.device.type, 1)
    return tokens[:, : max(1, -(-int(lengths.max()) // step) * step)]


def _mask(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[b, T], true where a token of [b, T, ...] counts."""
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device, non_blocking=True)[:, None]


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
    if settings.mask_token:
        _make_room_for_mask(encoder)
    return encoder


def _make_room_for_mask(encoder: CLIPTextModel) -> None:
    """One more row in the table of tokens, before start and end, where ``ClipTokenizer`` has its mask token; all other weights are those of the tower without it."""
    table = encoder.embeddings.token_embedding.weight
    with torch.random.fork_rng(devices=[]):
        row = torch.empty_like(table[:1]).normal_(std=0.02)
    enlarged = nn.Embedding.from_pretrained(with_mask_row(table.detach(), row), freeze=False)
    encoder.embeddings.token_embedding = enlarged
    encoder.config.vocab_size = len(enlarged.weight)


def with_mask_row(table: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """A table of CLIP's tokens with a row for the mask token."""
    return torch.cat((table[:MASK_ID], row, table[MASK_ID:]))


def own_ids(clip_ids: torch.Tensor) -> torch.Tensor:
    """Ids of CLIP's own tokenizer as a tower with a row for the mask token has them."""
    return torch.where(clip_ids >= MASK_ID, clip_ids + 1, clip_ids)


def without_mask_row(table: torch.Tensor) -> torch.Tensor:
    """The table for CLIP's own ids; the same table if it has no row for the mask token."""
    return table if len(table) == CLIP_VOCABULARY else torch.cat((table[:MASK_ID], table[MASK_ID + 1 :]))


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
