"""Captions to token ids, by CLIP's byte-level BPE or by a transformers encoder's own tokenizer.

Where a caption ends is stored, not searched for: the end token stands at ``lengths - 1``. Masks come from lengths too, since CLIP's pad id 0 is a
real token.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema


class Tokens(NamedTuple):
    """ids int64 [B, C], padded on the right; lengths int64 [B], start and end token included."""

    ids: torch.Tensor
    lengths: torch.Tensor


def _pad(token_lists: list[list[int]], context_length: int, pad_id: int) -> Tokens:
    ids = np.full((len(token_lists), context_length), pad_id, dtype=np.int64)
    for row, tokens in zip(ids, token_lists, strict=True):
        row[: len(tokens)] = tokens
    return Tokens(torch.from_numpy(ids), torch.tensor([len(tokens) for tokens in token_lists], dtype=torch.int64))


class _Ids:
    """What every tokenizer knows of its ids: vocab_size; special_ids, those that stand for no text; added, how many of them it puts before and behind a text."""

    vocab_size: int
    special_ids: list[int]
    added: tuple[int, int]

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """int64, ascending: the ids that stand for text."""
        return np.setdiff1d(np.arange(self.vocab_size), self.special_ids)


class ClipTokenizer(_Ids):
    """CLIP's BPE (49,408 tokens, lower-cased), from open_clip: [start] + text + [end], zero-padded; a cut text keeps its end token.

    ``mask`` adds a mask token before start and end, as DeCLIP does: the end keeps the largest id, and ids are not those of a plain CLIP.
    """

    pad_id = 0
    added = (1, 1)
    modules = ("protoclip_scale.data.clip_bpe",)  # what a process that unpickles this imports

    def __init__(self, context_length: int, mask: bool = False):
        from protoclip_scale.data import clip_bpe  # reads the vocabulary; an encoder of transformers' needs none of it

        self._bpe, self._words_of = clip_bpe.BPE, clip_bpe.encode
        self.context_length = context_length
        self._num_words = self._bpe.sot_token_id
        self.mask_id = self._num_words if mask else None
        self.vocab_size = self._bpe.vocab_size + mask
        self.start_id, self.end_id = self._bpe.sot_token_id + mask, self._bpe.eot_token_id + mask
        self.special_ids = [*([self.mask_id] if mask else []), self.start_id, self.end_id]

    def __reduce__(self):
        return ClipTokenizer, (self.context_length, self.mask_id is not None)

    def _encode(self, text: str) -> list[int]:
        ids, added = self._words_of(text), self.start_id - self._num_words  # a text may spell out the start and end tokens
        return [token if token < self._num_words else token + added for token in ids] if added else ids

    def __call__(self, texts: list[str]) -> Tokens:
        lists = [[self.start_id, *self._encode(text)[: self.context_length - 2], self.end_id] for text in texts]
        return _pad(lists, self.context_length, self.pad_id)

    def num_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text before it is cut, start and end included."""
        return [len(self._encode(text)) + 2 for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of a row's ids, the mask token as [MASK] and no other special ones; for looking at."""
        runs, start = [], 0
        for place in [place for place, token in enumerate(ids) if token in self.special_ids] + [len(ids)]:
            runs += [self._bpe.decode(ids[start:place]).strip(), "[MASK]" if ids[place : place + 1] == [self.mask_id] else ""]
            start = place + 1
        return " ".join(run for run in runs if run)

    def save(self, folder: str | Path) -> None:
        """vocab.json, merges.txt and tokenizer_config.json, as transformers' CLIPTokenizer reads them (it pads with the end token: naming '!' would split it off every word)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        merges = [" ".join(pair) for pair, _ in sorted(self._bpe.bpe_ranks.items(), key=lambda item: item[1])]
        mask, start, end = "<|mask|>", "<|startoftext|>", "<|endoftext|>"
        vocabulary = {
            **{token: number for token, number in self._bpe.encoder.items() if number < self._num_words},
            **({} if self.mask_id is None else {mask: self.mask_id}),
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
            **({} if self.mask_id is None else {"mask_token": mask}),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


class EncoderTokenizer(_Ids):
    """The tokenizer that comes with a transformers encoder (a folder or a Hub name), cut to its own or the recipe's length, whichever is less.

    ``mask``: its mask token is needed; UserError if it has none.
    """

    modules = ("transformers",)

    def __init__(self, name: str, context_length: int, mask: bool = False):
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
        if mask and self._tokenizer.mask_token_id is None:
            raise UserError(f"model.text.name {name!r}: its tokenizer has no mask token, which masked language modelling needs; choose another encoder, or clip")
        self.context_length = min(context_length, self._tokenizer.model_max_length)
        self.vocab_size = len(self._tokenizer)
        self.pad_id, self.mask_id = self._tokenizer.pad_token_id, self._tokenizer.mask_token_id
        self.special_ids = sorted(self._tokenizer.all_special_ids)

    @cached_property
    def added(self) -> tuple[int, int]:
        special = self._tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        return special.index(0), special[::-1].index(0)

    def __call__(self, texts: list[str]) -> Tokens:
        encoded = self._tokenizer(texts, truncation=True, max_length=self.context_length)["input_ids"] if texts else []
        return _pad(encoded, self.context_length, self.pad_id)

    def num_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text before it is cut, start and end included."""
        return [len(ids) for ids in self._tokenizer(texts, verbose=False)["input_ids"]] if texts else []

    def decode(self, ids: list[int]) -> str:
        """The text of a row's ids, its mask token among them and no other special ones; for looking at."""
        return self._tokenizer.decode([token for token in ids if token == self.mask_id or token not in self.special_ids])

    def save(self, folder: str | Path) -> None:
        """The files transformers wrote it with; they cut texts where this one does."""
        self._tokenizer.model_max_length = self.context_length
        self._tokenizer.save_pretrained(str(folder))


def tokenizer_for(text: schema.TextTower, mask: bool = False) -> ClipTokenizer | EncoderTokenizer:
    """The tokenizer of a text tower: callable on list[str] -> Tokens, with num_tokens, context_length, vocab_size, pad_id, mask_id, special_ids, added, ordinary_ids, decode and save(folder).

    ``mask``: texts will be masked, whatever ``text.mask_token`` says, so a mask token is needed; CLIP's vocabulary then has one token more.
    """
    mask = mask or text.mask_token
    return ClipTokenizer(text.context_length, mask) if text.name == "clip" else EncoderTokenizer(text.name, text.context_length, mask)
