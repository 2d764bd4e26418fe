"""One run for each policy and seed, each a process of its own, kept in the work folder when it is finished."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from overhead_parts.corpus import Corpus
from overhead_parts.policies import BASE, EPISODE_ROWS, POLICIES, TEACHERS, Policy
from protoclip_scale.engine.run_log import git_commit
from protoclip_scale.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
NOT_TRAINING = ("evaluate",)  # the same for every policy, and none of its business


@dataclass(frozen=True)
class Result:
    """One finished run. ``phases``: processor seconds by phase, evaluation left out; ``recalls``: mean recall of each held-out set in per cent; ``settings``: how its
    recipe differed from the base; ``commit``: of the code."""

    policy: str
    seed: int
    samples: int
    phases: dict[str, float]
    recalls: dict[str, float]
    wall_seconds: float
    peak_mb: float
    settings: list[str]
    commit: str | None

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def ret4(self) -> float:
        return statistics.mean(self.recalls.values())


@dataclass(frozen=True)
class Bench:
    """The work folder. ``samples`` and ``threads`` are part of a run's name: runs that differ in them are kept apart."""

    folder: Path
    corpus: Corpus
    samples: int
    threads: int
    extra: tuple[str, ...] = ()

    def place(self, policy: str, seed: int) -> Path:
        return self.folder / "runs" / f"{self.samples}-samples-{self.threads}-threads" / f"{policy}-{seed}"

    def finished(self, policy: str, seed: int) -> Result | None:
        """UserError if it was another run than this one would be."""
        path = self.place(policy, seed) / "result.json"
        if not path.exists():
            return None
        result = Result(**json.loads(path.read_text()))
        if result.settings != self.overrides(POLICIES[policy], seed):
            raise UserError(f"{path} is of a run with other settings ({'; '.join(sorted(set(result.settings) ^ set(self.overrides(POLICIES[policy], seed))))}); remove it, or use another --folder")
        return result

    def recipe(self) -> Path:
        """The base recipe, written into the work folder."""
        path = self.folder / "base.yaml"
        base = BASE | {"name": "overhead", "data": BASE["data"] | {"root": str(self.corpus.folder)}}
        base["schedule"] = base["schedule"] | {"total": "1 episode", "warmup_steps": 0}
        base["evaluation"] = base["evaluation"] | {"sets": self.corpus.held_out()}
        path.write_text(yaml.safe_dump(base, sort_keys=False))
        return path

    def teacher(self, name: str) -> Path:
        """The store of a teacher's features; made on first use."""
        out = self.folder / f"teacher-{name}"
        if not (out / "manifest.json").exists():
            command = ["tools/extract_teacher.py", "--recipe", str(self.recipe()), *TEACHERS[name], "--out", str(out)]
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return out

    def overrides(self, policy: Policy, seed: int) -> list[str]:
        """Dotted overrides of the base recipe: the policy's changes, its length and the seeds, which alone differ between the runs of a policy."""
        episodes = max(1, round(self.samples * policy.samples / EPISODE_ROWS))
        features = str(self.teacher(policy.teacher)) if policy.teacher else ""
        return [
            f"schedule.total={episodes} episodes",
            f"schedule.warmup_steps={BASE['schedule']['warmup_steps'] if episodes > 2 else 0}",
            f"data.plan.seed={seed}",
            f"run.seed={seed}",
            f"run.threads={self.threads}",
            *(change.replace("TEACHER", features) for change in policy.changes),
            *self.extra,
        ]

    def run(self, name: str, seed: int) -> Result:
        """Train, unless it is done. A run that was interrupted is begun anew, since its seconds are lost. UserError with the run's own line if it fails."""
        if result := self.finished(name, seed):
            return result
        place = self.place(name, seed)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        settings = [argument for override in self.overrides(POLICIES[name], seed) for argument in ("--set", override)]
        command = [str(ROOT / "benchmarks" / "overhead_parts" / "measured.py"), str(place / "seconds.json"), "--recipe", str(self.recipe()), "--run-dir", str(place / "run")]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.threads))
        with (place / "output.txt").open("w") as output:
            code = subprocess.run([sys.executable, *command, *settings], cwd=ROOT, env=os.environ | threads, stdout=output, stderr=subprocess.STDOUT).returncode
        if code:
            last = (place / "output.txt").read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"policy {name}, seed {seed} ended with code {code} ({''.join(last)[:300]}); see {place / 'output.txt'}")
        result = self._result(name, seed, place)
        (place / "result.json").write_text(json.dumps(vars(result), indent=1))
        shutil.rmtree(place / "run" / "checkpoints", ignore_errors=True)
        return result

    def _result(self, name: str, seed: int, place: Path) -> Result:
        measured = json.loads((place / "seconds.json").read_text())
        lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
        evaluation = [line for line in lines if line["kind"] == "eval"][-1]
        return Result(
            policy=name,
            seed=seed,
            samples=evaluation["samples"],
            phases={phase: seconds for phase, seconds in measured["phases"].items() if phase not in NOT_TRAINING},
            recalls={held_out: 100 * evaluation[f"{held_out}/retrieval/mean_recall"] for held_out in self.corpus.sets},
            wall_seconds=measured["wall_seconds"],
            peak_mb=measured["peak_mb"],
            settings=self.overrides(POLICIES[name], seed),
            commit=git_commit(),
        )
