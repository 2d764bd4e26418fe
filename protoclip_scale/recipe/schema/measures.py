"""Figures that evaluation computes from embeddings when it is asked to."""

from typing import Literal

from pydantic import Field, field_validator

from protoclip_scale.recipe.schema.section import Positive, Section


class Probe(Section):
    """The linear probe: a classifier on frozen image features, fitted on the rows of `evaluation.probe_train` (methods 7.3)."""

    method: Literal["lbfgs", "protoclip_sgd", "slip_sgd"] = Field(
        "lbfgs",
        description="lbfgs: logistic regression to its optimum, L2 chosen on a held-out third of the training rows. protoclip_sgd, slip_sgd: SGD with the constants of that paper's code.",
    )
    variant: Literal["paper", "reference"] = Field(
        "paper",
        description="reference: with the deviations of the published code (the best epoch on the test rows, no shuffling, a fixed C, a learning rate divided by the GPUs), to compare with its tables.",
    )
    features: Literal["embedding", "projected", "tower"] = Field(
        "embedding", description="embedding: unit rows. projected: the same before they are scaled to unit length. tower: the image tower's, before the projection (not for exports)."
    )


class FewShot(Section):
    """Logistic regression on a few rows of each class of `evaluation.probe_train`. Costs shots x draws small fits for each class column."""

    shots: tuple[Positive, ...] = Field((1, 2, 4, 8, 16), description="Rows of each class; a class that has fewer gives what it has.")
    draws: int = Field(5, ge=2, description="Draws of rows; the mean over them is the figure, their standard deviation its spread.")
    c: float = Field(10.0, gt=0, description="Inverse strength of the L2 penalty on unit embeddings: so few rows leave none to choose it on.")
    seed: int = Field(0, ge=0, description="Draws are f(seed, draw, row).")

    @field_validator("shots")
    @classmethod
    def _ascending(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if list(shots) != sorted(set(shots)) or not shots:
            raise ValueError(f"evaluation.few_shot.shots {list(shots)} do not ascend; write for instance [1, 2, 4, 8, 16]")
        return shots


class NearestNeighbours(Section):
    """k-NN on unit embeddings: the k nearest rows of `evaluation.probe_train` vote with weight exp(cosine / temperature). Costs a product of both sets."""

    k: Positive = Field(20, description="Neighbours that vote.")
    temperature: float = Field(0.07, gt=0, description="The lower, the more the nearest ones count.")


class Diagnostics(Section):
    """Effective rank and self-similarity of both modalities, and k-means of the image embeddings against each class column, with as many clusters as classes.

    Costs an SVD of each modality's rows, and restarts x iterations searches for each class column, shared out over ranks.
    """

    iterations: Positive = Field(100, description="k-means iterations at most.")
    restarts: Positive = Field(5, description="k-means starts; the one with the best objective is kept.")
