"""All figures of a model on a recipe's held-out sets, as one flat dictionary."""

import functools
from collections.abc import Callable, Sequence

import torch

from protoclip_scale import collectives
from protoclip_scale.data.decode import Limits
from protoclip_scale.evaluation.classifiers import ClassifierFiles
from protoclip_scale.evaluation.embedding_clusters import embedding_cluster_figures
from protoclip_scale.evaluation.embedding_figures import class_rows_of, embedding_figures, under
from protoclip_scale.evaluation.encode import Encoder, encode_images, encode_texts, nothing
from protoclip_scale.evaluation.encoded import EVERYTHING, EncodedSet, TextRows
from protoclip_scale.evaluation.features import WithFeatures
from protoclip_scale.evaluation.learned import learned_figures
from protoclip_scale.evaluation.pixels import PixelStore, Preprocessing
from protoclip_scale.evaluation.ranking import TOKENS, average
from protoclip_scale.evaluation.sets import checked_set
from protoclip_scale.evaluation.suites import Suite, suite_of_recipe
from protoclip_scale.evaluation.token_figures import token_figures
from protoclip_scale.evaluation.token_scores import TokenEncoder
from protoclip_scale.models.build import build_model
from protoclip_scale.objectives import build_objectives, heads_of
from protoclip_scale.objectives.compared import Compared, compared_by
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.recipe.schema import EvaluationSet, Recipe


def evaluate(
    model: Encoder,
    recipe: Recipe,
    tokenizer: Callable,
    device: torch.device,
    precision: str = "fp32",
    prototypes: EpisodePrototypes | None = None,
    meanwhile: Callable[[], None] = nothing,
) -> dict[str, float]:
    """``evaluate_suite`` on the recipe's own held-out sets, by what its objectives have trained."""
    return evaluate_suite(model, suite_of_recipe(recipe), recipe.model.image.size, tokenizer, device, precision, prototypes, meanwhile, compared=compared_by(recipe))


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
    compared: Compared = Compared(),  # noqa: B008 (it is immutable)
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

    By tokens, where ``compared`` says that the model has any: ``SET/zero_shot_tokens/COLUMN/...``, ``SET/retrieval_tokens/...`` and ``GALLERY/SET/retrieval_tokens/...`` (``token_figures``).
    Where it says that there are no embeddings to compare, there are no figures of them; the mean of an image's tokens stands for its embedding in ``SET/{probe,few_shot,knn}_tokens/...``.

    Zero-shot classes are those that the set lists, or the names that occur in it. Their embeddings come from ``classifiers`` as far as it has them, and are put there. Retrieval leaves out images without a caption. The probe is fitted on
    ``probe_train`` and judged on each set that shares a column with it, on rows whose class it has seen.
    Images that cannot be decoded are left out and counted (``undecodable``).

    ``model`` has ``encode_image`` and ``encode_text`` (unit rows); ``precision`` is that of its towers: fp32, bf16 or fp16. ``meanwhile`` is called after each batch, on all ranks alike; what it raises ends the evaluation. Raises UserError
    for missing files or columns. Cost: a forward pass over all images and distinct texts, shared out over ranks; the rest on rank 0; with tokens ``late_scores`` of each set.
    Images are decoded once per process (up to 1 GB of pixels), texts are read once.
    """
    settings, device = suite.evaluation, torch.device(device)
    store = _pixel_store(image_size, suite.limits)
    encoder = WithFeatures(model, settings.probe.features, bool(prototypes), compared)

    def encode(held_out: EvaluationSet) -> EncodedSet:
        rows = checked_set(held_out, suite)
        images, decodable = encode_images(encoder, store.pixels_of(rows), len(rows), settings.batch, device, precision, meanwhile)
        kept = decodable.nonzero()[:, 0].tolist()
        classes = {column: [values[row] for row in kept] for column, values in rows.classes.items()}
        split = encoder.split_images(images[kept])
        beside = split.get("probe", split["image"]), split.get("image_prototype", images[kept, :0])
        return EncodedSet(held_out, split["image"], *beside, [rows.captions[row] for row in kept], classes, len(rows) - len(kept), kept)

    def text_rows(wanted: Sequence[str]) -> TextRows:
        width = model.embed_dim if prototypes else EVERYTHING
        return TextRows(wanted, lambda distinct: encode_texts(encoder, tokenizer, distinct, settings.batch, device, precision, meanwhile), width)

    sets = {held_out.name: encode(held_out) for held_out in settings.sets}
    probe_train = encode(settings.probe_train) if settings.probe_train and sets else None
    figures: dict[str, float] = {}
    if compared.embeddings:
        class_rows = class_rows_of(sets, text_rows, classifiers)
        texts = text_rows([text for held_out in sets.values() for own in held_out.captions for text in own])
        figures |= collectives.from_rank_zero_patiently(lambda: embedding_figures(settings, sets, texts, prototypes, class_rows), meanwhile)
    if compared.tokens:
        tokens = TokenEncoder(model, compared.tokens, tokenizer, settings.batch, device, precision, meanwhile)
        rows = {held_out.name: checked_set(held_out, suite) for held_out in settings.sets}
        figures |= token_figures(settings, sets, lambda name: (store.pixels_of(rows[name]), len(rows[name])), tokens)
    if probe_train:
        about = settings, probe_train.labelled(), {name: held_out.labelled() for name, held_out in sets.items()}, device, "" if compared.embeddings else TOKENS
        for name, found in collectives.from_rank_zero_patiently(lambda: learned_figures(*about), meanwhile).items():
            figures |= under(name, found)
    for name, held_out in sets.items():
        if settings.diagnostics and compared.embeddings:
            figures |= under(name, embedding_cluster_figures(held_out.images, held_out.classes, settings.diagnostics))
        figures |= {f"{name}/rows": len(held_out.images), f"{name}/undecodable": held_out.undecodable}
    return figures | ({f"{suite.name}/average": average(settings.sets, figures)} if suite.name else {})


def baseline(
    recipe: Recipe, tokenizer: Callable, device: torch.device, precision: str = "fp32", meanwhile: Callable[[], None] = nothing
) -> dict[str, float]:
    """``evaluate`` for the recipe's model as it is before any training, ours or others': weights drawn from ``run.seed``."""
    features = frozenset({"image", "text", *(compared_by(recipe).tokens or ())})
    model = build_model(recipe, features, recipe.run.seed, fresh=False, heads=heads_of(build_objectives(recipe)))
    return evaluate(model.to(device), recipe, tokenizer, device, precision, meanwhile=meanwhile)


@functools.lru_cache(maxsize=1)
def _pixel_store(preprocessing: int | Preprocessing, limits: Limits) -> PixelStore:
    return PixelStore(preprocessing, limits)
