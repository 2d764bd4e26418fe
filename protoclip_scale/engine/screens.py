"""The facts on the first and the last screen of a run."""

import json
import os
from pathlib import Path
from typing import Any

from protoclip_scale import collectives
from protoclip_scale.data.quarantine import read_quarantine, summary
from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.pictures import newest_pictures
from protoclip_scale.engine.strategy import Strategy
from protoclip_scale.report.html import NAME


def shown(path: Path) -> str:
    """A path as a user would type it from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def start_facts(run: RunContext, strategy: Strategy, resumed: Path | None) -> dict[str, Any]:
    """What will be run."""
    recipe = run.recipe
    return {
        "name": recipe.name,
        "ranks": collectives.world_size(),
        "hosts": collectives.world_size() // collectives.local_world_size(),
        "device": str(run.device),
        "strategy": strategy.title,
        "precision": recipe.optim.precision,
        "image_tower": f"{recipe.model.image.name} at {recipe.model.image.size} px",
        "text_tower": recipe.model.text.name,
        "parameters": strategy.num_parameters(),
        "rows": {name: run.index.source_rows(i) for i, name in enumerate(run.index.source_names)},
        "total_steps": run.schedule.total_steps,
        "steps_per_episode": run.plan.steps_per_episode,
        "episodes": run.schedule.num_episodes,
        "global_batch": recipe.data.plan.global_batch,
        "objectives": {name: settings.weight for name, settings in recipe.objectives.items()},
        "run_dir": shown(run.folder),
        "resuming_from": shown(resumed) if resumed else None,
    }


def last_facts(run: RunContext, memory_gb: float, memory_after_imports_gb: float, seconds: float, export: Path | None) -> dict[str, Any]:
    """What came out, where it lies, and what it cost; for rank 0."""
    baseline = run.folder / "baseline.json"
    quarantine = run.folder / "quarantine"
    listed = read_quarantine(quarantine)
    newest = checkpoint.list_checkpoints(run.folder)
    pictures = [*newest_pictures(run.folder), run.folder / "pictures" / "console.svg"]
    return {
        "evaluation": run.log.last("eval") or {},
        "baseline": json.loads(baseline.read_text()) if baseline.exists() else {},
        "expected": run.recipe.expected,
        "phase_shares": run.clock.shares(),
        "seconds": seconds,
        "steps": run.schedule.total_steps,
        "samples": run.schedule.total_steps * run.recipe.data.plan.global_batch,
        "samples_per_second": run.samples_per_second(),
        "memory_gb": memory_gb,
        "run_dir": shown(run.folder),
        "checkpoint": shown(newest[-1]) if newest else None,
        "export": shown(export) if export else None,
        "export_command": None if export else f"python launch/export.py --run {shown(run.folder)} --layout open_clip --out DIR",
        "report": shown(run.folder / NAME) if run.recipe.run.report else None,
        "pictures": [shown(path) for path in pictures if path.exists()],
        "notes": [
            *(["evaluated and exported are the averaged weights (optim.ema)"] if run.recipe.optim.ema else []),
            f"{memory_gb - memory_after_imports_gb:.2f} GB of the peak memory are above what imports take",
            *([f"{summary(listed)} could not be used and were replaced; listed in {shown(quarantine)}"] if listed else []),
        ],
    }
