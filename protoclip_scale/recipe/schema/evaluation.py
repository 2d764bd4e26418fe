"""What is measured during and after training."""

from pydantic import Field

from protoclip_scale.recipe.schema.measures import Diagnostics, FewShot, NearestNeighbours, Probe
from protoclip_scale.recipe.schema.section import Positive, Section
from protoclip_scale.recipe.schema.task import Task


class EvaluationSet(Task):
    """Held-out rows, and what is asked of them."""

    subset: Positive | None = Field(None, description="So many rows, chosen by a hash of their places in the files: the same in every run and on any number of ranks. null takes all.")
    captions_per_image: Positive | None = Field(None, description="At most so many captions of a row, the first ones (COCO's Karpathy split is tested with 5); null takes all.")


class Evaluation(Section):
    """What is measured during and after training."""

    every_episodes: int = Field(1, ge=0, description="Evaluate after every n-th episode and at the end; 0 only at the end.")
    every_steps: int = Field(0, ge=0, description="Evaluate after every n-th step, too, inside of episodes; 0 never. Give the sets a `subset`: training waits.")
    sets: tuple[EvaluationSet, ...] = Field((), description="The held-out sets.")
    gallery: dict[str, tuple[str, ...]] = Field({}, description="Further retrieval tests: a name to the sets whose images and captions are pooled.")
    probe_train: EvaluationSet | None = Field(None, description="Labelled rows that the linear probe, few_shot and knn learn from; null runs none of them.")
    probe: Probe = Field(Probe(), description="The linear probe.")
    few_shot: FewShot | None = Field(None, description="Probes on a few rows of each class; null runs none.")
    knn: NearestNeighbours | None = Field(None, description="Nearest neighbours among probe_train; null runs none.")
    diagnostics: Diagnostics | None = Field(None, description="More about how embeddings lie in space; null computes none.")
    batch: Positive = Field(256, description="Images or captions encoded at once, per rank.")
