"""Evaluation of token-level models: F8 of the method specification, scores streamed over classes, and retrieval with a matrix for each direction."""

import pytest
import torch

from protoclip_scale.evaluation.late_interaction import class_prompts, class_scores, late_retrieval_figures, late_zero_shot_figures
from protoclip_scale.evaluation.retrieval import retrieval_figures
from protoclip_scale.evaluation.zero_shot import zero_shot_figures
from protoclip_scale.objectives.late_interaction import Tokens, late_similarities
from tests.losses import unit_rows
from tests.test_objectives_filip import IMAGES, TEXTS

PICTURES = Tokens(unit_rows(6, 4, 8), torch.ones(6, 4, dtype=torch.bool))
LENGTHS = torch.tensor([[3, 5, 2], [4, 4, 1], [2, 3, 5]])  # tokens of three prompts of three classes
CLASSES = [Tokens(unit_rows(3, 5, 8, seed=1 + number), torch.arange(5) < lengths[:, None]) for number, lengths in enumerate(LENGTHS)]


def test_scores_are_mean_similarities_over_prompts():
    """The slow twin: each prompt on its own, cut to its tokens."""
    scores = class_scores(PICTURES, CLASSES)
    for number, (prompts, lengths) in enumerate(zip(CLASSES, LENGTHS.tolist(), strict=True)):
        for picture in range(6):
            each = [(PICTURES.rows[picture] @ rows[:length].T).amax(1).mean() for rows, length in zip(prompts.rows, lengths, strict=True)]
            assert scores[picture, number].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-12)


def test_f8_equal_templates_equal_one():
    repeated = [Tokens(each.rows[:1].expand(7, -1, -1), each.mask[:1].expand(7, -1)) for each in CLASSES]
    one = [Tokens(each.rows[:1], each.mask[:1]) for each in CLASSES]
    assert torch.allclose(class_scores(PICTURES, repeated), class_scores(PICTURES, one), rtol=0, atol=1e-14)


def test_padding_of_prompts_does_not_count():
    filled = [Tokens(each.rows.masked_fill(~each.mask[..., None], torch.nan), each.mask) for each in CLASSES]
    assert torch.equal(class_scores(PICTURES, filled), class_scores(PICTURES, CLASSES))


def test_classes_are_made_one_at_a_time():
    made, alive = [], []

    def tokens_of(texts):
        alive.append(sum(made))
        made.append(len(texts))
        return CLASSES[len(made) - 1]

    prompts = class_prompts(["cat", "dog", "hen"], lambda name: [f"a {name}", f"the {name}", name], tokens_of)
    assert not made
    assert torch.equal(class_scores(PICTURES, prompts), class_scores(PICTURES, CLASSES)) and made == [3, 3, 3]


def test_figures_of_scores_follow_the_rules_of_zero_shot():
    """One token each: late interaction is the cosine, so both ways give the same figures, ties and left-out rows included."""
    images, classes, targets = unit_rows(6, 1, 8), unit_rows(3, 1, 8, seed=5), torch.tensor([0, 2, 1, -1, 1, 0])
    images[4], classes[2] = classes[1], classes[1]  # two classes level at the top
    scores = class_scores(Tokens(images, torch.ones(6, 1, dtype=torch.bool)), [Tokens(each[None], torch.ones(1, 1, dtype=torch.bool)) for each in classes])
    expected = zero_shot_figures(images[:, 0], classes[:, 0], targets)
    assert late_zero_shot_figures(scores, targets) == {name: pytest.approx(value) for name, value in expected.items()} and expected["n"] == 5


def test_retrieval_asks_both_matrices():
    """F2's matrices: by S^I both images find their text, by S^T the second text's image has 0.5987 against 0.3333."""
    pairs = torch.arange(2)
    figures = late_retrieval_figures(IMAGES, TEXTS, pairs, pairs)
    assert figures["image_to_text/R@1"] == figures["text_to_image/R@1"] == 1
    swapped = Tokens(TEXTS.rows.flip(0), TEXTS.mask.flip(0))
    wrong = late_retrieval_figures(IMAGES, swapped, pairs, pairs)
    by_hand = {"image_to_text/R@1": late_similarities(IMAGES, swapped), "text_to_image/R@1": late_similarities(swapped, IMAGES)}
    assert {name: wrong[name] for name in by_hand} == {name: (each.argmax(1) == pairs).double().mean().item() for name, each in by_hand.items()}


def test_retrieval_directions_differ():
    """A case in which the transposed matrix would give another figure."""
    draws = [(Tokens(unit_rows(5, 3, 4, seed=seed), torch.ones(5, 3, dtype=torch.bool)), Tokens(unit_rows(5, 2, 4, seed=100 + seed), torch.ones(5, 2, dtype=torch.bool))) for seed in range(30)]
    differing, pairs = 0, torch.arange(5)
    for images, texts in draws:
        figures, of_images = late_retrieval_figures(images, texts, pairs, pairs), late_similarities(images, texts)
        assert figures["image_to_text/R@1"] == pytest.approx((of_images.argmax(1) == pairs).double().mean().item())
        assert figures["text_to_image/R@1"] == pytest.approx((late_similarities(texts, images).argmax(1) == pairs).double().mean().item())
        differing += figures["text_to_image/R@1"] != (of_images.argmax(0) == pairs).double().mean().item()
    assert differing


def test_several_captions_and_queries_as_with_embeddings():
    images, texts, queries = unit_rows(4, 1, 8), unit_rows(6, 1, 8, seed=2), torch.tensor([0, 3])
    caption_text, caption_image = torch.tensor([0, 1, 2, 3, 4, 5, 0]), torch.tensor([0, 0, 1, 2, 3, 3, 2])
    whole = (Tokens(each, torch.ones(len(each), 1, dtype=torch.bool)) for each in (images, texts))
    expected = retrieval_figures(images[:, 0], texts[:, 0], caption_text, caption_image, queries)
    assert late_retrieval_figures(*whole, caption_text, caption_image, queries) == {name: pytest.approx(value) for name, value in expected.items()}
