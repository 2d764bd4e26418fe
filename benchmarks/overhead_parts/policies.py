"""What is compared: one recipe, and how each policy differs from it. A new policy is one line of ``POLICIES``."""

from dataclasses import dataclass

LANES, BATCH, STEPS_PER_EPISODE, CLUSTERS = 4, 128, 79, 1000
EPISODE_ROWS = BATCH * STEPS_PER_EPISODE

# Settings as in our trial (docs/results.md): 32 px, batches of 128, episodes of 10,112 rows, AdamW 1e-3. No loader processes: all work is in one process
# and thread, so that processor time tells what a phase costs. Nothing is drawn, and figures about clusters are left out.
BASE = {
    "data": {
        "sources": [{"name": "train_corpus", "files": "train-*.parquet"}],
        "plan": {"episode_size": EPISODE_ROWS, "lanes": LANES, "global_batch": BATCH},
        "augmentation": "clip",
        "workers": 0,
    },
    "model": {
        "embed_dim": 256,
        "image": {"name": "test_resnet", "size": 32},
        "text": {"context_length": 24, "width": 128, "heads": 2, "layers": 2},
    },
    "objectives": {"clip": {}},
    "optim": {"lr": 1e-3, "weight_decay": 0.1, "max_norm": 10, "precision": "bf16"},
    "schedule": {"warmup_steps": 100},
    "evaluation": {"every_episodes": 0},
    "run": {"export": None, "keep_checkpoints": 1, "log_steps": 100},
}


@dataclass(frozen=True)
class Policy:
    """``changes``: dotted overrides of the base recipe, as ``--set`` takes them. ``samples``: factor on the run's length. ``teacher``: whose features it needs."""

    changes: tuple[str, ...] = ()
    samples: float = 1.0
    teacher: str | None = None

    def __add__(self, other: "Policy") -> "Policy":
        return Policy(self.changes + other.changes, self.samples * other.samples, other.teacher or self.teacher)


def _settings(*changes: str) -> Policy:
    return Policy(changes)


def _teacher(name: str, weight: float = 0.3) -> Policy:
    return Policy((f"objectives.teacher={{weight: {weight}, features: TEACHER}}",), teacher=name)


CLUSTERED = _settings(
    "model.prototype_heads={dim: 128, hidden_dim: 512}",
    "episodes.warmup=1",
    f"prototypes={{clusters: {CLUSTERS}, iterations: 10, restarts: 1, pictures: 0, quality_rows: 0}}",
)
PROTOTYPES = CLUSTERED + _settings("objectives.prototype={weight: 1, targets: soft, temperature: 0.01}")
HARD = CLUSTERED + _settings("objectives.prototype={weight: 1, targets: hard}")
TEXT, IMAGE = _teacher("text"), _teacher("image")
RECORDED, ONLINE = _settings("prototypes.refresh=recorded"), _settings("prototypes.refresh=online")
ONCE = _settings("objectives.teacher.refresh=once")

POLICIES: dict[str, Policy] = {
    "clip": Policy(),
    "clip_longer": Policy(samples=4 / 3),
    "protoclip": PROTOTYPES,  # the paper's refresh, `episode`
    "protoclip_20x3": PROTOTYPES + _settings("prototypes.iterations=20", "prototypes.restarts=3"),  # the paper's k-means
    "protoclip_hard": HARD,
    "protoclip_recorded": PROTOTYPES + RECORDED,
    "protoclip_online": PROTOTYPES + ONLINE,
    "protoclip_teacher": PROTOTYPES + TEXT,
    "protoclip_recorded_teacher": PROTOTYPES + TEXT + RECORDED + ONCE,
    "protoclip_online_teacher": PROTOTYPES + TEXT + ONLINE + ONCE,
    "teacher": CLUSTERED + TEXT,
    "teacher_recorded": CLUSTERED + TEXT + RECORDED + ONCE,
    "teacher_once": CLUSTERED + TEXT + ONLINE + ONCE,
    "protoclip_image_teacher": PROTOTYPES + IMAGE,
    "image_teacher_once": CLUSTERED + IMAGE + ONLINE + ONCE,
}

# Teacher -> arguments of tools/extract_teacher.py
TEACHERS = {"text": ("--model", "minilm"), "image": ("--image-model", "efficientnet_lite0")}
