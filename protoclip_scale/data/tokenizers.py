"""Captions to token ids, by CLIP's byte-level BPE or by a transformers encoder's own tokenizer.

Where a caption ends is stored, not searched for: the end token stands at ``lengths - 1``. Masks come from lengths too, since CLIP's pad id 0 is a
real token.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema


class Tokens(NamedTuple):
    """ids int64 [B, C], padded on the right; lengths int64 [B], start and end token included."""

    ids: torch.Tensor
    lengths: torch.Tensor


def _pad(token_lists: list[list[int]], context_length: int, pad_id: int) -> Tokens:
    ids = torch.full((len(token_lists), context_length), pad_id, dtype=torch.int64)
    for row, tokens in enumerate(token_lists):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return Tokens(ids, torch.tensor([len(tokens) for tokens in token_lists], dtype=torch.int64))


class ClipTokenizer:
    """CLIP's BPE (49,408 tokens, lower-cased), from open_clip: [start] + text + [end], zero-padded; a cut text keeps its end token."""

    pad_id = 0
    modules = ("open_clip.tokenizer",)  # what a process that unpickles this imports

    def __init__(self, context_length: int):
        from open_clip.tokenizer import SimpleTokenizer  # takes seconds to import; an encoder of transformers' needs none of it

        self._bpe = SimpleTokenizer(context_length=context_length)
        self.context_length = context_length
        self.vocab_size = self._bpe.vocab_size
        self.start_id, self.end_id = self._bpe.sot_token_id, self._bpe.eot_token_id

    def __call__(self, texts: list[str]) -> Tokens:
        lists = [[self.start_id, *self._bpe.encode(text)[: self.context_length - 2], self.end_id] for text in texts]
        return _pad(lists, self.context_length, self.pad_id)

    def save(self, folder: str | Path) -> None:
        """vocab.json, merges.txt and tokenizer_config.json, as transformers' CLIPTokenizer reads them (it pads with the end token: naming '!' would split it off every word)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        merges = [" ".join(pair) for pair, _ in sorted(self._bpe.bpe_ranks.items(), key=lambda item: item[1])]
        end = self._bpe.decoder[self.end_id].replace("<end_of_text>", "<|endoftext|>")
        start = self._bpe.decoder[self.start_id].replace("<start_of_text>", "<|startoftext|>")
        vocabulary = {
            **{token: number for token, number in self._bpe.encoder.items() if number < self.start_id},
            start: self.start_id,
            end: self.end_id,
        }
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.context_length,
            "bos_token": start,
            "eos_token": end,
            "unk_token": end,
            "pad_token": end,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


class EncoderTokenizer:
    """The tokenizer that comes with a transformers encoder (a folder or a Hub name), cut to its own or the recipe's length, whichever is less."""

    modules = ("transformers",)

    def __init__(self, name: str, context_length: int):
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                name, use_fast=True, trust_remote_code=False, padding_side="right", truncation_side="right"
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.text.name {name!r}: no tokenizer could be loaded ({' '.join(str(error).split())[:200]}); give clip, a folder or a Hub name"
            ) from error
        if self._tokenizer.pad_token_id is None:
            raise UserError(f"model.text.name {name!r}: its tokenizer has no pad token; choose an encoder that pads, or clip")
        self.context_length = min(context_length, self._tokenizer.model_max_length)
        self.vocab_size = len(self._tokenizer)
        self.pad_id = self._tokenizer.pad_token_id

    def __call__(self, texts: list[str]) -> Tokens:
        encoded = self._tokenizer(texts, truncation=True, max_length=self.context_length)["input_ids"] if texts else []
        return _pad(encoded, self.context_length, self.pad_id)

    def save(self, folder: str | Path) -> None:
        """The files transformers wrote it with."""
        self._tokenizer.save_pretrained(str(folder))


def tokenizer_for(text: schema.TextTower) -> ClipTokenizer | EncoderTokenizer:
    """The tokenizer of a text tower: callable on list[str] -> Tokens, with context_length, vocab_size, pad_id and save(folder)."""
    return ClipTokenizer(text.context_length) if text.name == "clip" else EncoderTokenizer(text.name, text.context_length)
