"""A run's figures in TensorBoard, W&B, Trackio and MLflow, through Accelerate's trackers. metrics.jsonl stays the truth: they are sent what it holds."""

from protoclip_scale.engine.trackers.following import STOPPED_SECONDS, Trackers
from protoclip_scale.engine.trackers.kinds import missing

__all__ = ["STOPPED_SECONDS", "Trackers", "missing"]
