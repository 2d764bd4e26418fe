"""FILIP's loss: late interaction between the tokens of images and texts of the global batch (methods 4.1; Yao et al. 2021, arXiv 2111.07783)."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional as F

from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.data.views import Views
from protoclip_scale.errors import UserError
from protoclip_scale.models.heads import Head, Widths, temperature
from protoclip_scale.objectives.base import Objective, Targets
from protoclip_scale.objectives.shared.late_interaction import Tokens, late_cross_entropy, present
from protoclip_scale.objectives.shared.pairs import group_size, main_text, two_views
from protoclip_scale.objectives.shared.selection import highest_scores, keep_best, kept_tokens, own_scores
from protoclip_scale.recipe.schema import LogitScale, Model, ObjectiveSettings, Recipe
from protoclip_scale.recipe.schema.section import Positive


class Settings(ObjectiveSettings):
    """Late interaction between image and text tokens, with heads and a temperature of its own. Padding never counts."""

    dim: Positive = Field(256, description="Width of the token features.")
    special_tokens: bool = Field(True, description="Whether a text's start and end tokens count.")
    selection: Literal["paper", "reference"] = Field(
        "paper",
        description="Which tokens of a sample are gathered. paper: those with the highest similarity to any token of the texts (images) of their group of rows; "
        "reference: to their own partner, summed, as in the published code.",
    )
    keep: float = Field(0.25, gt=0, le=1, description="Share of a sample's places for tokens that is gathered, as published; 1 gathers all, without a selection.")
    keep_tokens: Positive | None = Field(None, description="So many tokens instead of a share; the published code has 16.")
    groups: Positive = Field(1, description="Groups of lanes within which the paper's selection looks, as published those of one GPU each; a multiple of the number of ranks.")
    products: Literal["fp32", "bf16"] = Field("fp32", description="Precision in which tokens are gathered and multiplied; their mean and the softmax are fp32.")
    logit_scale: LogitScale | None = Field(None, description="Start and bounds of its temperature; null takes those of model.logit_scale.")
    masked_text: bool = Field(False, description="The text masked for objectives.mlm stands for the main one, as in the published code: one text pass less.")
    further_views: bool = Field(False, description="The mean over two views of the images and two of the texts, as objectives.multiview has them, instead of the main pair alone.")

    @model_validator(mode="after")
    def _settings_have_an_effect(self):
        if self.keep_tokens is not None and self.keep != 0.25:
            raise ValueError(f"objectives.filip.keep {self.keep} has no effect with objectives.filip.keep_tokens {self.keep_tokens}; remove one of them")
        if self.selection != "paper" and self.keeps_all:
            raise ValueError(f"objectives.filip.selection {self.selection} has no effect with objectives.filip.keep 1, which gathers all tokens; remove one of them")
        if self.groups > 1 and not self.selects_in_groups:
            raise ValueError(f"objectives.filip.groups {self.groups} has no effect without objectives.filip.selection paper; remove it")
        return self

    @property
    def keeps_all(self) -> bool:
        return self.keep == 1 and self.keep_tokens is None

    @property
    def selects_in_groups(self) -> bool:
        return self.selection == "paper" and not self.keeps_all

    def kept(self, num_tokens: int) -> int:
        """How many of a sample's places are gathered."""
        return kept_tokens(self.keep, num_tokens) if self.keep_tokens is None else min(self.keep_tokens, num_tokens)


def filip_loss(images: Tokens, texts: Tokens, image_keys: Tokens, text_keys: Tokens, scale: torch.Tensor, columns_B: torch.Tensor) -> torch.Tensor:
    """(CE(s S^I, y) + CE(s S^T, y)) / 2 over the local rows B and the gathered columns N (equation 6 of the paper, with means over the tokens that count).

    S^I(i, j) = 1/n_i sum_k max_r V_ik Z_jr  with the tokens of all texts j as keys, S^T(j, i) = 1/|M_j| sum_r max_k V_ik Z_jr  with those of all images: two matrices, not each
    other's transposes. ``images``, ``texts``: local queries [B, T, D]; ``image_keys``, ``text_keys``: of all rows [N, K, D]. See ``late_cross_entropy`` for memory and cost.
    """
    return 0.5 * (late_cross_entropy(images, text_keys, scale, columns_B) + late_cross_entropy(texts, image_keys, scale, columns_B))


class ImageTokens(nn.Module):
    """Patch or map tokens [b, T, width] -> [b, T - prefix, dim], unit rows; class and register tokens are left out."""

    def __init__(self, width: int, dim: int, prefix: int):
        super().__init__()
        self.linear, self.prefix = nn.Linear(width, dim), prefix

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.linear(tokens[:, self.prefix :]), dim=-1)


class TextTokens(nn.Module):
    """Token states [b, T, width] -> [b, context, dim]: unit rows where a token counts, rows of zeros elsewhere. ``added``: how many tokens stand before and behind each text's own,
    which count if ``special_tokens``, or there are no others."""

    def __init__(self, width: int, dim: int, context: int, special_tokens: bool, added: tuple[int, int] = (1, 1)):
        super().__init__()
        self.linear, self.context, self.special_tokens, self.added = nn.Linear(width, dim), context, special_tokens, added

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # padding is replaced before it is multiplied: what stands there, NaN included, has no gradient
        rows = F.normalize(self.linear(tokens.masked_fill(~mask[..., None], 0)), dim=-1)
        if not self.special_tokens:
            mask = _without_specials(mask, *self.added)
        return F.pad(rows.masked_fill(~mask[..., None], 0), (0, 0, 0, self.context - rows.shape[1]))


def token_heads(dim: int, special_tokens: bool) -> dict[str, Head]:
    """What makes an image's and a text's tokens, by kind."""
    return {
        "filip_image": Head(("image_tokens",), lambda widths, model: ImageTokens(widths.image_tokens, dim, widths.image_prefix_tokens), in_parts=True),
        "filip_text": Head(("text_tokens",), lambda widths, model: _text_tokens(widths, model, dim, special_tokens), in_parts=True),
    }


def _text_tokens(widths: Widths, model: Model, dim: int, special_tokens: bool) -> TextTokens:
    added = () if special_tokens else (tokenizer_for(model.text).added,)  # it need not be loaded where nobody asks
    return TextTokens(widths.text_tokens, dim, widths.context_length, special_tokens, *added)


def _without_specials(mask_BT: torch.Tensor, before: int, behind: int) -> torch.Tensor:
    lengths, places = mask_BT.sum(1, keepdim=True), torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return torch.where(lengths > before + behind, (places >= before) & (places < lengths - behind), mask_BT)


class LateInteraction(Objective):
    """Active in every episode."""

    token_kinds = ("filip_image", "filip_text")
    finds_partners = True

    def __init__(self, settings: Settings, recipe: Recipe):
        super().__init__(settings, recipe)
        text = main_text(settings.masked_text).replace("text", "filip_text")
        self._pairs = [("filip_image", text)]
        if settings.further_views:
            self._pairs = [(image, words) for image in ("filip_image", "filip_image@second") for words in (text, "filip_text@eda")]
        self.needs = frozenset({"filip_scale"}).union(*self._pairs)
        self._key_names = self._pairs if settings.keeps_all else [(f"filip_image_keys_{number}", f"filip_text_keys_{number}") for number in range(len(self._pairs))]
        self.gathers = tuple(dict.fromkeys(name for names in self._key_names for name in names))
        masked = ("masked",) if settings.masked_text else ()
        self.views = two_views(recipe, settings.masked_text) if settings.further_views else Views(masked=masked)

    def heads(self) -> dict[str, Head]:
        return token_heads(self.settings.dim, self.settings.special_tokens) | {"filip_scale": temperature(settings=self.settings.logit_scale)}

    def check_ranks(self, world: int) -> None:
        """A group of rows whose tokens are compared lies on one rank."""
        settings = self.settings
        if settings.selects_in_groups and settings.groups % world:
            raise UserError(
                f"objectives.filip.groups {settings.groups}: the tokens of a group are chosen on one rank, and these are {world}; set it to a multiple of {world} "
                "(and keep it when their number changes), or objectives.filip.selection to reference"
            )

    def _tokens(self, rows_BTD: torch.Tensor) -> Tokens:
        return present(rows_BTD.bfloat16() if self.settings.products == "bf16" else rows_BTD)

    def derived(self, features: dict[str, torch.Tensor], targets: Targets) -> dict[str, torch.Tensor]:
        """Of each pair of views the tokens [B, K, D] that are gathered."""
        if self.settings.keeps_all:
            return {}
        derived = {}
        for pair, key_names in zip(self._pairs, self._key_names, strict=True):
            images, texts = (self._tokens(features[name]) for name in pair)
            scores = own_scores(images, texts) if self.settings.selection == "reference" else self._highest_scores(images, texts, targets)
            for name, tokens, each in zip(key_names, (images, texts), scores, strict=True):
                derived[name] = keep_best(tokens, each, self.settings.kept(tokens.rows.shape[1]))
        return derived

    def _highest_scores(self, images: Tokens, texts: Tokens, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        size = group_size(targets.num_columns, self.settings.groups, "filip")
        scores = [highest_scores(*each) for each in zip(images.split(size), texts.split(size), strict=True)]
        return torch.cat([of_images for of_images, _ in scores]), torch.cat([of_texts for _, of_texts in scores])

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        terms = []
        for pair, key_names in zip(self._pairs, self._key_names, strict=True):
            queries = [self._tokens(features[name]) for name in pair]
            keys = [self._tokens(gathered[name]) for name in key_names]
            terms.append(filip_loss(*queries, *keys, features["filip_scale"], targets.columns_B))
        return torch.stack(terms).mean()

    def _key_sizes(self, sizes: dict[str, int]) -> tuple[int, int]:
        """Numbers of a row's gathered tokens, of an image and of a text."""
        dim = self.settings.dim
        return tuple(dim * self.settings.kept(sizes[kind] // dim) for kind in ("filip_image", "filip_text"))

    def derived_sizes(self, sizes: dict[str, int]) -> dict[str, int]:
        if self.settings.keeps_all:
            return {}
        return {name: size for names in self._key_names for name, size in zip(names, self._key_sizes(sizes), strict=True)}

    def loss_products(self, batch: int, sizes: dict[str, int]) -> int:
        """Each of a row's tokens meets the gathered tokens of the other side; the paper's selection compares all tokens within a group of rows."""
        dim, (image_keys, text_keys) = self.settings.dim, self._key_sizes(sizes)
        contrast = batch * (sizes["filip_image"] * text_keys + sizes["filip_text"] * image_keys) // dim
        selection = batch // self.settings.groups * sizes["filip_image"] * sizes["filip_text"] // dim if self.settings.selects_in_groups else 0
        return len(self._pairs) * (contrast + selection)


build = LateInteraction
