"""Figures of unit embeddings: zero-shot classification, retrieval, modalities, prototypes' clusters."""

from collections.abc import Callable, Sequence

import torch

from protoclip_scale import collectives
from protoclip_scale.evaluation.classifiers import ClassifierFiles
from protoclip_scale.evaluation.clusters import cluster_figures
from protoclip_scale.evaluation.diagnostics import modality_figures, space_figures
from protoclip_scale.evaluation.encoded import EncodedSet, Gallery, TextRows, galleries
from protoclip_scale.evaluation.ranking import ranking_figures
from protoclip_scale.evaluation.retrieval import retrieval_figures
from protoclip_scale.evaluation.zero_shot import class_embeddings, targets_of, zero_shot_figures
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.recipe.schema import Evaluation

ClassRows = dict[tuple[str, str], torch.Tensor]  # [C, D] unit rows by set and class column


def class_rows_of(sets: dict[str, EncodedSet], text_rows: Callable[[Sequence[str]], TextRows], classifiers: ClassifierFiles | None) -> ClassRows:
    """Of every class column: from ``classifiers`` as far as it has them, which get the others; a collective."""
    columns = [(held_out, column) for held_out in sets.values() for column in held_out.classes if held_out.names(column)]
    known = collectives.from_rank_zero(lambda: _stored(columns, classifiers)) if classifiers else {}
    # Prompts of a column are batched by themselves: whether another's come from a file changes no bit.
    made = {
        (held_out.settings.name, column): class_embeddings(held_out.names(column), held_out.settings.prompt_templates, text_rows(held_out.prompts(column)), held_out.settings.class_words)
        for held_out, column in columns
        if (held_out.settings.name, column) not in known
    }
    if classifiers:
        collectives.from_rank_zero(lambda: _store(columns, made, classifiers))
    return known | made


def _stored(columns: Sequence[tuple[EncodedSet, str]], classifiers: ClassifierFiles) -> ClassRows:
    """The classifiers that files hold, by set and column."""
    loaded = {(held_out.settings.name, column): classifiers.load(held_out.settings, column, held_out.names(column)) for held_out, column in columns}
    return {key: rows for key, rows in loaded.items() if rows is not None}


def _store(columns: Sequence[tuple[EncodedSet, str]], made: ClassRows, classifiers: ClassifierFiles) -> None:
    for held_out, column in columns:
        if (rows := made.get((held_out.settings.name, column))) is not None:
            classifiers.save(held_out.settings, column, held_out.names(column), rows)


def embedding_figures(settings: Evaluation, sets: dict[str, EncodedSet], texts: TextRows, prototypes: EpisodePrototypes | None, class_rows: ClassRows) -> dict[str, float]:
    """Of all sets and galleries, by the keys that ``evaluate_suite`` lists; for rank 0."""
    figures: dict[str, float] = {}
    for name, held_out in sets.items():
        for column in held_out.classes:
            figures |= under(f"{name}/zero_shot/{column}", _zero_shot(held_out, column, class_rows))
        captioned = held_out.with_captions()
        if len(captioned.images):
            first_texts = texts([captions[0] for captions in captioned.captions])
            figures |= under(name, modality_figures(captioned.images, first_texts))
            if settings.diagnostics:
                figures |= under(name, space_figures(captioned.images, first_texts))
        if prototypes:
            figures |= under(f"{name}/clusters", _clusters(held_out, texts, prototypes))
    for place, (pooled, asking) in galleries(sets, settings.gallery).items():
        figures |= under(f"{place}/retrieval", _retrieval(pooled, asking, texts))
    return figures


def under(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{key}": value for key, value in figures.items()}


def _zero_shot(held_out: EncodedSet, column: str, classifiers: ClassRows) -> dict[str, float]:
    targets = targets_of(held_out.classes[column], held_out.names(column))
    if not (targets >= 0).any():
        return {}
    class_rows = classifiers[held_out.settings.name, column]
    figures = zero_shot_figures(held_out.images, class_rows, targets)
    return figures | ranking_figures(held_out.images, class_rows, targets, figures["top1"], held_out.settings.chosen_metric)


def _retrieval(pooled: list[EncodedSet], asking: EncodedSet, texts: TextRows) -> dict[str, float]:
    gallery, images = Gallery(pooled, asking), torch.cat([held_out.images for held_out in pooled])
    return retrieval_figures(images, texts(gallery.texts), gallery.caption_text, gallery.caption_image, gallery.queries)


def _clusters(held_out: EncodedSet, texts: TextRows, prototypes: EpisodePrototypes) -> dict[str, float]:
    with_text = [row for row, captions in enumerate(held_out.captions) if captions]
    return cluster_figures(prototypes, held_out.image_prototypes, texts.prototypes([held_out.captions[row][0] for row in with_text]), with_text, held_out.classes)
