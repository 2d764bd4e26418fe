"""Towers, projections and heads."""

import math
from typing import Literal

from pydantic import Field, model_validator

from protoclip_scale.recipe.schema.section import Positive, Section

LN_100 = math.log(100)


class ImageTower(Section):
    """The image encoder, a timm model."""

    name: str = Field(description="Any timm model, for instance resnet50_clip or vit_base_patch32_clip_224.")
    pretrained: bool = Field(False, description="Start from timm's published weights.")
    size: Positive = Field(224, description="Side of the square input, in pixels.")
    normalization: Literal["clip", "imagenet"] = Field("clip", description="Channel means and deviations; they travel with the export.")
    grad_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory.")
    drop_path: float = Field(0, ge=0, lt=1, description="Stochastic depth: the share of rows for which the last block is left out in training, less for those before it, for timm models that have it. Drawn by row, so that neither ranks nor micro-batches change it.")


class TextTower(Section):
    """The text encoder: CLIP's transformer, or any transformers encoder."""

    name: str = Field("clip", description="clip, or the name or folder of a transformers text encoder, which brings its own tokenizer, pooling and length.")
    pretrained: bool = Field(False, description="For a transformers encoder: start from its published weights.")
    context_length: Positive = Field(77, description="Tokens per caption, start and end included; longer ones are cut, the end token kept.")
    width: Positive = Field(512, description="Width of CLIP's text transformer.")
    heads: Positive = Field(8, description="Attention heads of CLIP's text transformer.")
    layers: Positive = Field(12, description="Layers of CLIP's text transformer.")
    activation: Literal["gelu", "quick_gelu"] = Field("gelu", description="Activation of CLIP's text transformer; the original used quick_gelu.")
    causal: bool = Field(True, description="CLIP's text transformer: each token sees those before it, as in CLIP. false: it sees all of the caption's, which no layout of an export holds. Other encoders have their own attention.")
    mask_token: bool = Field(False, description="A mask token, which masked language modelling needs: one more row in CLIP's table of tokens (exports leave it out); another encoder must bring its own.")
    grad_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory.")

    @model_validator(mode="after")
    def _divisible(self):
        if self.name != "clip" and not self.causal:
            raise ValueError(f"model.text.causal false has no effect with model.text.name {self.name}, which brings its own attention; remove it")
        if self.name == "clip" and self.width % self.heads:
            raise ValueError(f"model.text.width {self.width} is not a multiple of model.text.heads {self.heads}")
        return self


class PrototypeHeads(Section):
    """The MLPs that map both towers' outputs into the space of the prototypes (methods 6.1)."""

    dim: Positive = Field(128, description="Width of the prototype space.")
    hidden_dim: Positive = Field(2048, description="Width of the hidden layers.")
    hidden_layers: int = Field(1, ge=0, description="Hidden layers, each with batch norm and ReLU; 0 is one linear map.")


class LogitScale(Section):
    """A learned inverse temperature, as a logarithm; bounded in the forward pass."""

    init: float = Field(math.log(1 / 0.07), description="Initial value of the logarithm.")
    minimum: float = Field(0.0, description="Lower bound of the logarithm.")
    maximum: float = Field(LN_100, description="Upper bound of the logarithm; ln 100.")

    @model_validator(mode="after")
    def _ordered(self):
        if not self.minimum <= self.init <= self.maximum:
            raise ValueError(f"{{section}}.init {self.init:.4g} lies outside {{section}}.minimum {self.minimum:.4g} and {{section}}.maximum {self.maximum:.4g}")
        return self


class Model(Section):
    """Towers, projections and heads."""

    embed_dim: Positive = Field(512, description="Width of the shared embedding.")
    image: ImageTower = Field(description="The image encoder.")
    text: TextTower = Field(TextTower(), description="The text encoder.")
    prototype_heads: PrototypeHeads = Field(PrototypeHeads(), description="Heads used by the objectives prototype and teacher.")
    logit_scale: LogitScale = Field(LogitScale(), description="Start and bounds of the temperatures of CLIP's loss and of prototypes, and of an objective's own that has no section for it.")
    norm_groups: Positive = Field(1, description="Batch-norm statistics are taken over this many equal groups of lanes; 1 is the whole global batch.")
    frozen: tuple[Literal["patch_embedding", "image_tower", "text_tower", "token_embedding"], ...] = Field((), description="Parts that keep the weights they start with. image_tower, text_tower: whole towers, batch norm's statistics too; their projections train. patch_embedding: the first convolution of a vision transformer. token_embedding: the text tower's table of tokens.")
    init_from: str | None = Field(None, description="Start from the weights of a run directory (the averaged ones, if it has any), an export, an open_clip tag (open_clip:NAME/TAG) or a transformers CLIP; the optimiser starts fresh.")
