"""All figures of a model on a recipe's held-out sets, as one flat dictionary."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from protoclip_scale import collectives
from protoclip_scale.data.decode import Limits
from protoclip_scale.evaluation.classifiers import ClassifierFiles
from protoclip_scale.evaluation.clusters import cluster_figures
from protoclip_scale.evaluation.diagnostics import modality_figures, space_figures
from protoclip_scale.evaluation.embedding_clusters import embedding_cluster_figures
from protoclip_scale.evaluation.encode import Encoder, encode_images, encode_texts, nothing
from protoclip_scale.evaluation.features import WithFeatures
from protoclip_scale.evaluation.learned import Rows, learned_figures
from protoclip_scale.evaluation.pixels import PixelStore, Preprocessing
from protoclip_scale.evaluation.ranking import average, ranking_figures
from protoclip_scale.evaluation.retrieval import retrieval_figures
from protoclip_scale.evaluation.sets import checked_set
from protoclip_scale.evaluation.suites import Suite, suite_of_recipe
from protoclip_scale.evaluation.zero_shot import class_embeddings, class_names, prompts, targets_of, zero_shot_figures
from protoclip_scale.models.build import build_model
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.recipe.schema import Evaluation, EvaluationSet, Recipe

EVERYTHING = sys.maxsize  # as a number of columns


@dataclass(frozen=True, eq=False)
class EncodedSet:
    """What figures are computed from: the decodable rows of a set, ``images`` [n, D] float32 unit rows on the CPU; ``image_prototypes`` [n, P] likewise, P = 0
    without prototypes; ``probe_features`` [n, F], which the linear probe sees."""

    settings: EvaluationSet
    images: torch.Tensor
    probe_features: torch.Tensor
    image_prototypes: torch.Tensor
    captions: list[list[str]]
    classes: dict[str, list[str]]
    undecodable: int

    def prompts(self, column: str) -> list[str]:
        """All prompts of a class column."""
        return [prompt for name in self.names(column) for prompt in prompts(name, self.settings.prompt_templates, self.settings.class_words)]

    def names(self, column: str) -> list[str]:
        """The classes of a column: those that the set lists, or those that occur."""
        return list(self.settings.classes) or class_names(self.classes[column])

    def labelled(self) -> Rows:
        return Rows(self.images, self.probe_features, self.classes)

    def with_captions(self) -> "EncodedSet":
        """The rows that have a caption: those that take part in retrieval and in the modality figures."""
        rows = [row for row, texts in enumerate(self.captions) if texts]
        return EncodedSet(self.settings, self.images[rows], self.probe_features[rows], self.image_prototypes[rows], [self.captions[row] for row in rows], {}, self.undecodable)


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
    image_size: int | Preprocessing,
    tokenizer: Callable,
    device: torch.device,
    precision: str = "fp32",
    prototypes: EpisodePrototypes | None = None,
    meanwhile: Callable[[], None] = nothing,
    classifiers: ClassifierFiles | None = None,
) -> dict[str, float]:
    """Zero-shot, retrieval, linear-probe and modality figures of a suite; a collective, the same on all ranks and for any W.

    Keys: ``SET/zero_shot/COLUMN/{top1,class_mean,constant,classes,n}``, ``SET/retrieval/{image_to_text,text_to_image}/R@{1,5,10}``,
    ``SET/retrieval/{mean_recall,chance_R@10,chance_mean_recall,n,captions}``, ``SET/probe/COLUMN/{top1,class_mean,constant,n}``,
    ``SET/{modality_gap,positive_cosine,image_feature_std,text_feature_std,rows,undecodable}``, and ``GALLERY/SET/retrieval/...`` for the
    queries of a set against a pooled gallery. Accuracies and recalls are shares in [0, 1]. With ``prototypes``, those of the episode that ``model``, a
    ``DualEncoder`` with prototype heads, was just trained on, also ``SET/clusters/COLUMN/PROTOTYPES/{ari,ami}`` (see ``label_agreement``).
    Where the suite asks for them: ``SET/few_shot/COLUMN/{S}shot/{top1,spread}``, ``SET/knn/COLUMN/{top1,class_mean,k,n}``, another probe under its own name
    (``learned``), ``SET/{image,text}_{effective_rank,self_similarity}`` and ``SET/kmeans/COLUMN/{ari,ami,k,n}``.

    ``SET/zero_shot/COLUMN/{top5,top1_top5}`` where there are more than five classes, ``roc_auc`` where it is the set's metric; ``SUITE/average`` of a suite with a
    name is the unweighted mean of the sets' metrics.

    Zero-shot classes are those that the set lists, or the names that occur in it. Their embeddings come from ``classifiers`` as far as it has them, and are put there. Retrieval leaves out images without a caption. The probe is fitted on
    ``probe_train`` and judged on each set that shares a column with it, on rows whose class it has seen.
    Images that cannot be decoded are left out and counted (``undecodable``).

    ``model`` has ``encode_image`` and ``encode_text`` (unit rows); ``precision`` is that of its towers: fp32, bf16 or fp16. ``meanwhile`` is called after each batch, on all ranks alike; what it raises ends the evaluation. Raises UserError
    for missing files or columns. Cost: a forward pass over all images and distinct texts, shared out over ranks; the rest on rank 0.
    Images are decoded once per process (up to 1 GB of pixels), texts are read once.
    """
    settings = suite.evaluation
    device = torch.device(device)
    store = _pixel_store(image_size, suite.limits)
    encoder, width = WithFeatures(model, settings.probe.features, bool(prototypes)), model.embed_dim if prototypes else EVERYTHING

    def encode(held_out: EvaluationSet) -> EncodedSet:
        rows = checked_set(held_out, suite)
        images, decodable = encode_images(encoder, store.pixels_of(rows), len(rows), settings.batch, device, precision, meanwhile)
        kept = decodable.nonzero()[:, 0].tolist()
        classes = {column: [values[row] for row in kept] for column, values in rows.classes.items()}
        split = encoder.split_images(images[kept])
        beside = split.get("probe", split["image"]), split.get("image_prototype", images[kept, :0])
        return EncodedSet(held_out, split["image"], *beside, [rows.captions[row] for row in kept], classes, len(rows) - len(kept))

    sets = {held_out.name: encode(held_out) for held_out in settings.sets}
    probe_train = encode(settings.probe_train) if settings.probe_train and sets else None
    columns = [(held_out, column) for held_out in sets.values() for column in held_out.classes if held_out.names(column)]
    known = collectives.from_rank_zero(lambda: _stored(columns, classifiers)) if classifiers else {}

    def text_rows(wanted: Sequence[str]) -> TextRows:
        return TextRows(wanted, lambda distinct: encode_texts(encoder, tokenizer, distinct, settings.batch, device, precision, meanwhile), width)

    # Prompts of a column are batched by themselves: whether another's come from a file changes no bit.
    made = {
        (held_out.settings.name, column): class_embeddings(held_out.names(column), held_out.settings.prompt_templates, text_rows(held_out.prompts(column)), held_out.settings.class_words)
        for held_out, column in columns
        if (held_out.settings.name, column) not in known
    }
    if classifiers:
        collectives.from_rank_zero(lambda: _store(columns, made, classifiers))
    texts = text_rows([text for held_out in sets.values() for own in held_out.captions for text in own])
    figures = collectives.from_rank_zero_patiently(lambda: _figures(settings, sets, probe_train, texts, prototypes, device, known | made), meanwhile)
    if settings.diagnostics:
        for name, held_out in sets.items():
            figures |= _under(name, embedding_cluster_figures(held_out.images, held_out.classes, settings.diagnostics))
    return figures | ({f"{suite.name}/average": average(settings.sets, figures)} if suite.name else {})


def baseline(
    recipe: Recipe, tokenizer: Callable, device: torch.device, precision: str = "fp32", meanwhile: Callable[[], None] = nothing
) -> dict[str, float]:
    """``evaluate`` for the recipe's model as it is before any training, ours or others': weights drawn from ``run.seed``."""
    model = build_model(recipe, frozenset({"image", "text"}), recipe.run.seed, fresh=False)
    return evaluate(model.to(device), recipe, tokenizer, device, precision, meanwhile=meanwhile)


@functools.lru_cache(maxsize=1)
def _pixel_store(preprocessing: int | Preprocessing, limits: Limits) -> PixelStore:
    return PixelStore(preprocessing, limits)


def _stored(columns: Sequence[tuple[EncodedSet, str]], classifiers: ClassifierFiles) -> dict[tuple[str, str], torch.Tensor]:
    """The classifiers that files hold, by set and column."""
    loaded = {(held_out.settings.name, column): classifiers.load(held_out.settings, column, held_out.names(column)) for held_out, column in columns}
    return {key: rows for key, rows in loaded.items() if rows is not None}


def _store(columns: Sequence[tuple[EncodedSet, str]], made: dict[tuple[str, str], torch.Tensor], classifiers: ClassifierFiles) -> None:
    for held_out, column in columns:
        if (rows := made.get((held_out.settings.name, column))) is not None:
            classifiers.save(held_out.settings, column, held_out.names(column), rows)


def _figures(
    settings: Evaluation,
    sets: dict[str, EncodedSet],
    probe_train: EncodedSet | None,
    texts: TextRows,
    prototypes: EpisodePrototypes | None,
    device: torch.device,
    class_rows: dict[tuple[str, str], torch.Tensor],
) -> dict[str, float]:
    learned = learned_figures(settings, probe_train.labelled(), {name: held_out.labelled() for name, held_out in sets.items()}, device) if probe_train else {}
    figures: dict[str, Any] = {}
    for name, held_out in sets.items():
        for column in held_out.classes:
            figures |= _under(f"{name}/zero_shot/{column}", _zero_shot(held_out, column, class_rows))
        captioned = held_out.with_captions()
        if len(captioned.images):
            figures |= _under(f"{name}/retrieval", _retrieval([captioned], captioned, texts))
        figures |= _under(name, learned.get(name, {}))
        if len(captioned.images):
            first_texts = texts([captions[0] for captions in captioned.captions])
            figures |= _under(name, modality_figures(captioned.images, first_texts))
            if settings.diagnostics:
                figures |= _under(name, space_figures(captioned.images, first_texts))
        if prototypes:
            figures |= _under(f"{name}/clusters", _clusters(held_out, texts, prototypes))
        figures |= {f"{name}/rows": len(held_out.images), f"{name}/undecodable": held_out.undecodable}
    for gallery, members in settings.gallery.items():
        pooled = [captioned for member in members if len((captioned := sets[member].with_captions()).images)]
        for asking in pooled:
            figures |= _under(f"{gallery}/{asking.settings.name}/retrieval", _retrieval(pooled, asking, texts))
    return figures


def _under(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{key}": value for key, value in figures.items()}


def _zero_shot(held_out: EncodedSet, column: str, classifiers: dict[tuple[str, str], torch.Tensor]) -> dict[str, float]:
    targets = targets_of(held_out.classes[column], held_out.names(column))
    if not (targets >= 0).any():
        return {}
    class_rows = classifiers[held_out.settings.name, column]
    figures = zero_shot_figures(held_out.images, class_rows, targets)
    return figures | ranking_figures(held_out.images, class_rows, targets, figures["top1"], held_out.settings.chosen_metric)


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
