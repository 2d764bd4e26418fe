"""Evaluation of token-level models: F8 of the method specification, similarities averaged over prompts, and retrieval with a matrix for each direction."""

from types import SimpleNamespace

import pytest
import torch

from protoclip_scale.evaluation.encoded import EncodedSet
from protoclip_scale.evaluation.late_interaction import (
    Pairs,
    add_similarities,
    late_retrieval_figures,
    late_zero_shot_figures,
    questions_of_classes,
    questions_of_texts,
)
from protoclip_scale.evaluation.retrieval import retrieval_figures
from protoclip_scale.evaluation.zero_shot import zero_shot_figures
from protoclip_scale.objectives.shared.late_interaction import Tokens, late_similarities
from tests.losses import unit_rows
from tests.test_objectives_filip import IMAGES, TEXTS

PICTURES = Tokens(unit_rows(6, 4, 8), torch.ones(6, 4, dtype=torch.bool))
NAMES = ("cat", "dog", "hen")
PROMPTS = {"cat": ["a cat", "the big cat", "cat"], "dog": ["dog", "a dog", "one more dog"], "hen": ["hens", "hen", "hen"]}
LENGTHS = {text: 1 + number % 5 for number, text in enumerate(sorted({text for own in PROMPTS.values() for text in own}))}
ROWS = {text: unit_rows(5, 8, seed=1 + number) for number, text in enumerate(LENGTHS)}


def tokens_of(texts, padding=0.0):
    mask = torch.arange(5) < torch.tensor([LENGTHS[text] for text in texts])[:, None]
    return Tokens(torch.stack([ROWS[text] for text in texts]).masked_fill(~mask[..., None], padding), mask)


def class_scores(prompts_of, tile=2, padding=0.0):
    """[6, C] by questions, ``tile`` prompts at a time."""
    asked = questions_of_classes(NAMES, prompts_of)
    answer = torch.zeros(6, asked.num_columns, dtype=torch.float64)
    for start in range(0, len(asked.texts), tile):
        part = slice(start, start + tile)
        add_similarities([answer], PICTURES, tokens_of(asked.texts[part], padding), asked.columns[part], asked.shares[part].double())
    return answer


def test_scores_are_mean_similarities_over_prompts():
    """The slow twin: each prompt on its own, cut to its tokens; a prompt that stands twice counts twice."""
    scores = class_scores(PROMPTS.__getitem__)
    for number, name in enumerate(NAMES):
        for picture in range(6):
            each = [(PICTURES.rows[picture] @ ROWS[text][: LENGTHS[text]].T).amax(1).mean() for text in PROMPTS[name]]
            assert scores[picture, number].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-7)


def test_f8_equal_templates_equal_one():
    repeated, one = class_scores(lambda name: PROMPTS[name][:1] * 7), class_scores(lambda name: PROMPTS[name][:1])
    assert torch.allclose(repeated, one, rtol=0, atol=1e-7)


def test_padding_of_prompts_does_not_count_and_tiles_change_nothing():
    assert torch.equal(class_scores(PROMPTS.__getitem__, padding=torch.nan), class_scores(PROMPTS.__getitem__))
    torch.testing.assert_close(class_scores(PROMPTS.__getitem__, tile=9), class_scores(PROMPTS.__getitem__), rtol=0, atol=1e-14)


def test_prompts_of_like_length_stand_together():
    asked = questions_of_classes(NAMES, PROMPTS.__getitem__)
    assert [len(text) for text in asked.texts] == sorted(len(text) for own in PROMPTS.values() for text in own) and not asked.both
    assert {(text, NAMES[column]) for text, column in zip(asked.texts, asked.columns.tolist(), strict=True)} == {(text, name) for name, own in PROMPTS.items() for text in own}


def single(rows):
    return Tokens(rows[:, None], torch.ones(len(rows), 1, dtype=torch.bool))


def test_figures_of_scores_follow_the_rules_of_zero_shot():
    """One token each: late interaction is the cosine, so both ways give the same figures, ties and left-out rows included."""
    images, classes, targets = unit_rows(6, 8), unit_rows(3, 8, seed=5), torch.tensor([0, 2, 1, -1, 1, 0])
    images[4], classes[2] = classes[1], classes[1]  # two classes level at the top
    expected = zero_shot_figures(images, classes, targets)
    scores = late_similarities(single(images), single(classes))
    assert late_zero_shot_figures(scores, targets) == {name: pytest.approx(value) for name, value in expected.items()} and expected["n"] == 5


def held_out(name, captions):
    """A set whose row i has these captions; of its images only their number is looked at."""
    return EncodedSet(SimpleNamespace(name=name), torch.empty(len(captions), 0), torch.empty(0), torch.empty(0), captions, {}, 0, list(range(len(captions))))


def pairs_of(images, texts):
    """``Pairs`` of images with texts by name."""
    return [
        Pairs(late_similarities(each, tokens), late_similarities(tokens, each).T, {text: number for number, text in enumerate(names)}, torch.arange(len(each.rows)))
        for each, (names, tokens) in zip(images, texts, strict=True)
    ]


def figures_of(images, texts):
    """Of pairs that stand in the same order."""
    names = [str(number) for number in range(len(texts.rows))]
    own = held_out("own", [[name] for name in names])
    return late_retrieval_figures([own], own, {"own": pairs_of([images], [(names, texts)])[0]})


def test_retrieval_asks_both_matrices():
    """F2's matrices: by S^I both images find their text, by S^T the second text's image has 0.5987 against 0.3333."""
    figures, each = figures_of(IMAGES, TEXTS), torch.arange(2)
    assert figures["image_to_text/R@1"] == figures["text_to_image/R@1"] == 1
    swapped = Tokens(TEXTS.rows.flip(0), TEXTS.mask.flip(0))
    wrong = figures_of(IMAGES, swapped)
    by_hand = {"image_to_text/R@1": late_similarities(IMAGES, swapped), "text_to_image/R@1": late_similarities(swapped, IMAGES)}
    assert {name: wrong[name] for name in by_hand} == {name: (found.argmax(1) == each).double().mean().item() for name, found in by_hand.items()}


def test_retrieval_directions_differ():
    """A case in which the transposed matrix would give another figure."""
    differing, each = 0, torch.arange(5)
    for seed in range(30):
        images, texts = (Tokens(unit_rows(5, width, 4, seed=start + seed), torch.ones(5, width, dtype=torch.bool)) for start, width in ((0, 3), (100, 2)))
        figures, of_images = figures_of(images, texts), late_similarities(images, texts)
        assert figures["image_to_text/R@1"] == pytest.approx((of_images.argmax(1) == each).double().mean().item())
        assert figures["text_to_image/R@1"] == pytest.approx((late_similarities(texts, images).argmax(1) == each).double().mean().item())
        differing += figures["text_to_image/R@1"] != (of_images.argmax(0) == each).double().mean().item()
    assert differing


def test_several_captions_and_galleries_as_with_embeddings():
    """One token each; a text that two images share, and queries of either set among both."""
    rows, texts = unit_rows(4, 8), unit_rows(6, 8, seed=2)
    first, second = held_out("first", [["0", "1"], ["2"]]), held_out("second", [["3", "0"], ["4", "5"]])
    names, caption_text, caption_image = [str(number) for number in range(6)], torch.tensor([0, 1, 2, 3, 0, 4, 5]), torch.tensor([0, 0, 1, 2, 2, 3, 3])
    order = [5, 3, 1, 0, 2, 4]  # each set has the texts in an order of its own
    found = pairs_of([single(rows[:2]), single(rows[2:])], [(names, single(texts)), ([names[number] for number in order], single(texts[order]))])
    for asking, queries in ((first, torch.tensor([0, 1])), (second, torch.tensor([2, 3]))):
        expected = retrieval_figures(rows, texts, caption_text, caption_image, queries)
        figures = late_retrieval_figures([first, second], asking, dict(zip(("first", "second"), found, strict=True)))
        assert figures == {name: pytest.approx(value) for name, value in expected.items()}


def test_questions_of_texts_have_a_column_each():
    asked = questions_of_texts(["a long text", "b", "a", "b"])
    assert asked.texts == ["a", "b", "a long text"] and asked.columns.tolist() == [0, 1, 2] and asked.both
