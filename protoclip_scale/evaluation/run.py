"""All figures of a model on a recipe's held-out sets, as one flat dictionary."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from protoclip_scale import collectives
from protoclip_scale.data.decode import Limits
from protoclip_scale.evaluation.clusters import WithPrototypes, cluster_figures
from protoclip_scale.evaluation.diagnostics import modality_figures
from protoclip_scale.evaluation.encode import Encoder, encode_images, encode_texts, nothing
from protoclip_scale.evaluation.pixels import PixelStore
from protoclip_scale.evaluation.probe import LinearProbe
from protoclip_scale.evaluation.retrieval import retrieval_figures
from protoclip_scale.evaluation.sets import cached_set
from protoclip_scale.evaluation.suites import Suite, suite_of_recipe
from protoclip_scale.evaluation.zero_shot import (
    accuracy_figures,
    class_embeddings,
    class_names,
    constant_accuracy,
    prompts,
    targets_of,
    zero_shot_figures,
)
from protoclip_scale.models.build import build_model
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.recipe.schema import Evaluation, EvaluationSet, Recipe

EVERYTHING = sys.maxsize  # as a number of columns


@dataclass(frozen=True, eq=False)
class EncodedSet:
    """What figures are computed from: the decodable rows of a set, ``images`` [n, D] float32 unit rows on the CPU; ``image_prototypes`` [n, P] likewise, P = 0
    without prototypes."""

    settings: EvaluationSet
    images: torch.Tensor
    image_prototypes: torch.Tensor
    captions: list[list[str]]
    classes: dict[str, list[str]]
    undecodable: int

    def prompts(self) -> list[str]:
        """All prompts of all class columns."""
        return [prompt for values in self.classes.values() for name in class_names(values) for prompt in prompts(name, self.settings.templates, self.settings.class_words)]

    def with_captions(self) -> "EncodedSet":
        """The rows that have a caption: those that take part in retrieval and in the modality figures."""
        rows = [row for row, texts in enumerate(self.captions) if texts]
        return EncodedSet(self.settings, self.images[rows], self.image_prototypes[rows], [self.captions[row] for row in rows], {}, self.undecodable)


class TextRows:
    """Rows of distinct texts, encoded once each, so that equal texts score exactly alike: an embedding of ``width``, and what ``encode`` gives beside it."""

    def __init__(self, texts: Sequence[str], encode: Callable[[list[str]], torch.Tensor], width: int = EVERYTHING):
        ordered = sorted(set(texts), key=lambda text: (len(text), text))  # batches of like length leave little padding
        self.numbers = {text: number for number, text in enumerate(ordered)}
        rows = encode(ordered) if ordered else torch.empty(0, 0)
        self.rows, self.beside = rows[:, :width], rows[:, width:]

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        return self.rows[[self.numbers[text] for text in texts]]

    def prototypes(self, texts: Sequence[str]) -> torch.Tensor:
        """Their prototype features [n, P]."""
        return self.beside[[self.numbers[text] for text in texts]]


def evaluate(
    model: Encoder,
    recipe: Recipe,
    tokenizer: Callable,
    device: torch.device,
    precision: str = "fp32",
    prototypes: EpisodePrototypes | None = None,
    meanwhile: Callable[[], None] = nothing,
) -> dict[str, float]:
    """``evaluate_suite`` on the recipe's own held-out sets."""
    return evaluate_suite(model, suite_of_recipe(recipe), recipe.model.image.size, tokenizer, device, precision, prototypes, meanwhile)


def evaluate_suite(
    model: Encoder,
    suite: Suite,
    image_size: int,
    tokenizer: Callable,
    device: torch.device,
    precision: str = "fp32",
    prototypes: EpisodePrototypes | None = None,
    meanwhile: Callable[[], None] = nothing,
) -> dict[str, float]:
    """Zero-shot, retrieval, linear-probe and modality figures of a suite; a collective, the same on all ranks and for any W.

    Keys: ``SET/zero_shot/COLUMN/{top1,class_mean,constant,classes,n}``, ``SET/retrieval/{image_to_text,text_to_image}/R@{1,5,10}``,
    ``SET/retrieval/{mean_recall,chance_R@10,chance_mean_recall,n,captions}``, ``SET/probe/COLUMN/{top1,class_mean,constant,n}``,
    ``SET/{modality_gap,positive_cosine,image_feature_std,text_feature_std,undecodable}``, and ``GALLERY/SET/retrieval/...`` for the
    queries of a set against a pooled gallery. Accuracies and recalls are shares in [0, 1]. With ``prototypes``, those of the episode that ``model``, a
    ``DualEncoder`` with prototype heads, was just trained on, also ``SET/clusters/COLUMN/PROTOTYPES/{ari,ami}`` (see ``label_agreement``).

    Zero-shot classes are the names that occur in the set. Retrieval leaves out images without a caption. The probe is fitted on
    unit embeddings of ``probe_train`` and judged on each set that shares a column with it, on rows whose class it has seen.
    Images that cannot be decoded are left out and counted (``undecodable``).

    ``model`` has ``encode_image`` and ``encode_text`` (unit rows); ``precision`` is that of its towers: fp32, bf16 or fp16. ``meanwhile`` is called after each batch, on all ranks alike; what it raises ends the evaluation. Raises UserError
    for missing files or columns. Cost: a forward pass over all images and distinct texts, shared out over ranks; the rest on rank 0.
    Images are decoded once per process (up to 1 GB of pixels), texts are read once.
    """
    settings = suite.evaluation
    device = torch.device(device)
    store = _pixel_store(image_size, suite.limits)
    encoder, width = (WithPrototypes(model), model.embed_dim) if prototypes else (model, EVERYTHING)

    def encode(held_out: EvaluationSet) -> EncodedSet:
        rows = cached_set(held_out, suite.root, suite.retry_seconds)
        images, decodable = encode_images(encoder, store.pixels_of(rows), len(rows), settings.batch, device, precision, meanwhile)
        kept = decodable.nonzero()[:, 0].tolist()
        classes = {column: [values[row] for row in kept] for column, values in rows.classes.items()}
        return EncodedSet(held_out, images[kept, :width], images[kept, width:], [rows.captions[row] for row in kept], classes, len(rows) - len(kept))

    sets = {held_out.name: encode(held_out) for held_out in settings.sets}
    probe_train = encode(settings.probe_train) if settings.probe_train and sets else None
    wanted = [text for held_out in sets.values() for texts in (*held_out.captions, held_out.prompts()) for text in texts]
    texts = TextRows(wanted, lambda distinct: encode_texts(encoder, tokenizer, distinct, settings.batch, device, precision, meanwhile), width)
    return collectives.from_rank_zero(lambda: _figures(settings, sets, probe_train, texts, prototypes, device))


def baseline(
    recipe: Recipe, tokenizer: Callable, device: torch.device, precision: str = "fp32", meanwhile: Callable[[], None] = nothing
) -> dict[str, float]:
    """``evaluate`` for the recipe's model as it is before any training, ours or others': weights drawn from ``run.seed``."""
    model = build_model(recipe, frozenset({"image", "text"}), recipe.run.seed, fresh=False)
    return evaluate(model.to(device), recipe, tokenizer, device, precision, meanwhile=meanwhile)


@functools.lru_cache(maxsize=1)
def _pixel_store(size: int, limits: Limits) -> PixelStore:
    return PixelStore(size, limits)


def _figures(
    settings: Evaluation,
    sets: dict[str, EncodedSet],
    probe_train: EncodedSet | None,
    texts: TextRows,
    prototypes: EpisodePrototypes | None,
    device: torch.device,
) -> dict[str, float]:
    probes = _fit_probes(probe_train, sets, device) if probe_train else {}
    figures: dict[str, Any] = {}
    for name, held_out in sets.items():
        for column in held_out.classes:
            figures |= _under(f"{name}/zero_shot/{column}", _zero_shot(held_out, column, texts))
        captioned = held_out.with_captions()
        if len(captioned.images):
            figures |= _under(f"{name}/retrieval", _retrieval([captioned], captioned, texts))
        for column, (names, probe) in probes.items():
            if column in held_out.classes:
                figures |= _under(f"{name}/probe/{column}", _probe(held_out, column, names, probe, device))
        if len(captioned.images):
            figures |= _under(name, modality_figures(captioned.images, texts([captions[0] for captions in captioned.captions])))
        if prototypes:
            figures |= _under(f"{name}/clusters", _clusters(held_out, texts, prototypes))
        figures[f"{name}/undecodable"] = held_out.undecodable
    for gallery, members in settings.gallery.items():
        pooled = [captioned for member in members if len((captioned := sets[member].with_captions()).images)]
        for asking in pooled:
            figures |= _under(f"{gallery}/{asking.settings.name}/retrieval", _retrieval(pooled, asking, texts))
    return figures


def _under(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{key}": value for key, value in figures.items()}


def _zero_shot(held_out: EncodedSet, column: str, texts: TextRows) -> dict[str, float]:
    names = class_names(held_out.classes[column])
    if not names:
        return {}
    class_rows = class_embeddings(names, held_out.settings.templates, texts, held_out.settings.class_words)
    return zero_shot_figures(held_out.images, class_rows, targets_of(held_out.classes[column], names))


def _retrieval(pooled: list[EncodedSet], asking: EncodedSet, texts: TextRows) -> dict[str, float]:
    captions = [own for held_out in pooled for own in held_out.captions]
    distinct = list(dict.fromkeys(text for own in captions for text in own))
    numbers = {text: number for number, text in enumerate(distinct)}
    caption_text = torch.tensor([numbers[text] for own in captions for text in own])
    caption_image = torch.tensor([image for image, own in enumerate(captions) for _ in own])
    first = sum(len(held_out.images) for held_out in pooled[: pooled.index(asking)])
    queries = torch.arange(first, first + len(asking.images))
    return retrieval_figures(torch.cat([held_out.images for held_out in pooled]), texts(distinct), caption_text, caption_image, queries)


def _clusters(held_out: EncodedSet, texts: TextRows, prototypes: EpisodePrototypes) -> dict[str, float]:
    with_text = [row for row, captions in enumerate(held_out.captions) if captions]
    return cluster_figures(prototypes, held_out.image_prototypes, texts.prototypes([held_out.captions[row][0] for row in with_text]), with_text, held_out.classes)


def _fit_probes(train: EncodedSet, sets: dict[str, EncodedSet], device: torch.device) -> dict[str, tuple[list[str], LinearProbe]]:
    """One probe for each class column of the training rows that some set has too, with at least two classes."""
    probes = {}
    for column, values in train.classes.items():
        names = class_names(values)
        if len(names) > 1 and any(column in held_out.classes for held_out in sets.values()):
            targets = targets_of(values, names)
            probes[column] = names, LinearProbe(train.images[targets >= 0].to(device), targets[targets >= 0].to(device), len(names))
    return probes


def _probe(held_out: EncodedSet, column: str, names: list[str], probe: LinearProbe, device: torch.device) -> dict[str, float]:
    targets = targets_of(held_out.classes[column], names)
    images, targets = held_out.images[targets >= 0], targets[targets >= 0]
    if not len(targets):
        return {}
    correct = probe.predict(images.to(device)).cpu() == targets
    return {**accuracy_figures(correct, targets), "constant": constant_accuracy(targets), "n": len(targets)}
