"""Zero-shot classification (methods 7.1)."""

import pytest
import torch
import torch.nn.functional as F

from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.zero_shot import class_embeddings, class_names, prompts, targets_of, zero_shot_figures

CLASSES = ["dog"] * 6 + ["cat"] * 3 + ["", "ant"]


def test_accuracy_class_mean_and_constant_by_hand():
    names = class_names(CLASSES)
    assert names == ["ant", "cat", "dog"]
    answers = ["dog"] * 5 + ["cat"] + ["cat", "ant", "ant"] + ["ant", "ant"]
    images = torch.eye(3)[[names.index(answer) for answer in answers]]
    figures = zero_shot_figures(images, torch.eye(3), targets_of(CLASSES, names))
    assert figures["top1"] == pytest.approx(7 / 10)
    assert figures["class_mean"] == pytest.approx((5 / 6 + 1 / 3 + 1) / 3)
    assert figures["constant"] == pytest.approx(6 / 10)
    assert (figures["classes"], figures["n"]) == (3, 10)


@pytest.mark.parametrize("collapsed", ["both", "images", "texts"])
def test_a_collapsed_model_does_not_exceed_the_constant_answer(collapsed):
    generator = torch.Generator().manual_seed(0)
    names = class_names(CLASSES)
    images, texts = (F.normalize(torch.randn(n, 32, generator=generator), dim=1) for n in (len(CLASSES), 3))
    if collapsed in ("both", "images"):
        images = F.normalize(images[:1] * torch.linspace(0.5, 2, len(CLASSES))[:, None], dim=1)
    if collapsed in ("both", "texts"):
        texts = F.normalize(texts[:1] * torch.tensor([[0.7], [1.0], [1.3]]), dim=1)
    figures = zero_shot_figures(images, texts, targets_of(CLASSES, names))
    assert figures["top1"] <= figures["constant"] + 1e-12
    assert figures["class_mean"] == pytest.approx(1 / 3)


def test_class_embeddings_normalise_before_and_after_the_mean():
    vectors = {"a cat": torch.tensor([3.0, 0, 0]), "cat!": torch.tensor([0, 0.5, 0]), "a dog": torch.tensor([0, 0, 1.0]), "dog!": torch.tensor([0, 0, 9.0])}
    rows = class_embeddings(["cat", "dog"], ("a {}", "{}!"), lambda texts: torch.stack([vectors[text] for text in texts]))
    expected = torch.tensor([[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]])
    torch.testing.assert_close(rows, expected)


def test_a_template_without_a_place_is_refused_and_braces_in_names_are_safe():
    assert prompts("{x}", ("a photo of a {}.",)) == ["a photo of a {x}."]
    assert prompts("cat", ("{}", "a {}"), {"cat": ("cat", "kitten")}) == ["cat", "a cat", "kitten", "a kitten"]
    assert prompts("dog", ("{}",), {"cat": ("kitten",)}) == ["dog"]
    with pytest.raises(UserError, match="a photo.*write {}"):
        prompts("cat", ("a photo",))
