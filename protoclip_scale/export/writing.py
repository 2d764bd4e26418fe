"""An export: written beside its place, compared with the model in the library that will load it, and published by one rename."""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from protoclip_scale.errors import UserError
from protoclip_scale.export import open_clip_layout, transformers_layout
from protoclip_scale.export.logits import bias_of
from protoclip_scale.export.manifest import NAME as MANIFEST
from protoclip_scale.export.manifest import check_files, write_manifest
from protoclip_scale.export.source import DTYPES, Embeddings, Probe, Source, made_up, published, source_of_model, structure_of
from protoclip_scale.export.tensors import Plan, compare_tensors, write_tensors
from protoclip_scale.export.token_heads import FILE as TOKEN_HEADS
from protoclip_scale.export.token_heads import read_facts
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.open_clip_keys import Made
from protoclip_scale.recipe import schema

TOLERANCE = 1e-4  # of the self-test's unit embeddings; fp32 rounding stays far below, a wrong pooling far above
CARD, PROTOTYPES = "README.md", "prototypes.safetensors"


class Layout(NamedTuple):
    """Why a layout cannot express towers; what writes its small files and says what its weights are made of; what embeds a probe with the written files."""

    reasons: Callable[[schema.Model, DualEncoder], list[str]]
    write_files: Callable[[Source, Path, str], dict[str, Plan]]
    embed: Callable[[Path, Probe], Embeddings]


LAYOUTS = {name: Layout(module.reasons, module.write_files, module.embed) for name, module in (("open_clip", open_clip_layout), ("transformers", transformers_layout))}


class Extras(NamedTuple):
    """What an export may hold besides the towers. ``card``: from the layout and the folder's files to the text of README.md; ``prototypes``: tensors for
    prototypes.safetensors; ``origin``: facts for the manifest."""

    card: Callable[[str, Path], str] | None = None
    prototypes: dict[str, torch.Tensor] | None = None
    origin: dict[str, Any] | None = None


def check_layout(layout: str, settings: schema.Model, structure: DualEncoder | None = None) -> list[str]:
    """Why a layout cannot express the towers; empty if it can. Builds both libraries' towers without values (seconds)."""
    return LAYOUTS[layout].reasons(settings, structure or structure_of(settings))


def try_layout(layout: str, model: DualEncoder, settings: schema.Model) -> list[str]:
    """Why a model cannot be exported, found by exporting it to a temporary folder and comparing; costs the files' bytes there and some seconds."""
    if reasons := check_layout(layout, settings, model):
        return reasons
    try:
        with TemporaryDirectory() as folder:
            export(source_of_model(model, settings), layout, Path(folder) / "export")
    except UserError as error:
        return [str(error).removeprefix("export: ")]
    except OSError as error:
        return [f"this was not tried, since the temporary folder could not be written ({error.strerror}); set TMPDIR to one with room"]
    return []


def export(source: Source, layout: str, folder: str | Path, dtype: str = "float32", extras: Extras = Extras()) -> Path:  # noqa: B008 (it is immutable)
    """Write weights, configuration, tokenizer, image processing, token heads if the source has any, card and manifest. The folder appears only after the layout's library has loaded it and given
    the model's own embeddings of made-up inputs. Returns the folder.

    Memory: one parameter at a time is read and written; the comparison holds the model, if ``source.embed`` must load it, and then the other library's, never
    both. Raises UserError if the folder holds files already, the layout cannot express the towers, or what was written computes something else.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export: {folder} is not empty; choose another folder with --out or remove it")
    settings, structure = source.settings, source.structure
    if reasons := check_layout(layout, settings, structure):
        raise UserError(f"export: {layout} cannot express this model: {'; '.join(reasons)}")
    draft = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        plans = LAYOUTS[layout].write_files(source, draft, dtype)
        state = structure.state_dict() | {name: source.read(name) for each in source.logits if each for name in each.sources}
        digests = {file: write_tensors(draft / file, plan, state, source.read, DTYPES[dtype]) for file, plan in plans.items()}
        if source.tokens:
            plan = source.tokens.plan()
            kept = {name: source.read(name) for each in plan.values() for name in each.sources}
            digests[TOKEN_HEADS] = write_tensors(draft / TOKEN_HEADS, plan, kept, kept.__getitem__, torch.float32, source.tokens.facts.metadata())
        if extras.prototypes:
            kept = extras.prototypes
            digests[PROTOTYPES] = write_tensors(draft / PROTOTYPES, _as_they_are(kept), kept, kept.__getitem__, torch.float32)
        if extras.card:
            (draft / CARD).write_text(extras.card(layout, draft), encoding="utf-8")
        about = {"layout": layout, "dtype": dtype, "model": published(settings).model_dump(mode="json", exclude={"init_from", "frozen"}), "origin": extras.origin or {}}
        if source.logits.bias:
            about["logit_bias"] = bias_of(source.logits, source.read)
        write_manifest(draft, about, digests)
        _compare(source, layout, draft, DTYPES[dtype])
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def verify(source: Source, folder: str | Path) -> dict[str, Any]:
    """The manifest of an export whose files are as they were written and hold this model's weights, rounded to the files' dtype. Reads one parameter at a time.

    Raises UserError, naming the first file or weight that differs.
    """
    folder = Path(folder)
    manifest = check_files(folder)
    with TemporaryDirectory() as scratch:
        plans = LAYOUTS[manifest["layout"]].write_files(source, Path(scratch), manifest["dtype"]) | ({TOKEN_HEADS: source.tokens.plan()} if source.tokens else {})
    if manifest.get("logit_bias") != bias_of(source.logits, source.read):
        raise UserError(f"{folder}: its logit_bias in {MANIFEST} is not the model's; it is an export of another run, write it again")
    for file, plan in plans.items():
        if file not in manifest["files"]:
            raise UserError(f"{folder}: it has no {file}; it is not an export of this model, write it again")
        compare_tensors(folder / file, plan, source.read)
    if source.tokens and read_facts(folder / TOKEN_HEADS) != source.tokens.facts:
        raise UserError(f"{folder / TOKEN_HEADS}: what it says of its tokens is not so in the model; it is an export of another run, write it again")
    return manifest


def _as_they_are(tensors: dict[str, torch.Tensor]) -> Plan:
    return {name: Made((name,)) for name in tensors}


def _compare(source: Source, layout: str, draft: Path, dtype: torch.dtype) -> None:
    """UserError unless the layout's library gives the model's embeddings."""
    settings = source.settings
    probe = made_up(settings, source.structure.text_tower)
    ours = source.embed(probe, dtype)
    try:
        theirs = LAYOUTS[layout].embed(draft, probe)
    except Exception as error:
        raise UserError(f"export: {layout} cannot load what was written ({' '.join(str(error).split())[:300]}); this tower cannot be exported to {layout}") from error
    difference = max((own - other).abs().max().item() for own, other in zip(ours, theirs, strict=True))
    if not difference <= TOLERANCE:
        raise UserError(f"export: {layout} computes other embeddings for {settings.image.name} and {settings.text.name} (they differ by {difference:.2g}); this tower cannot be exported to {layout}")
