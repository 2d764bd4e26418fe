"""Copies of a run's checkpoints in another place: a folder or a URL that fsspec knows, laid out like a run directory.

A copy is complete when its manifest is there, which is put last. ``attempts/`` says whose copies they are, and whether a newer attempt has come.
"""

import json
import posixpath
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from protoclip_scale import standing
from protoclip_scale.data.sources.filesystems import EXTRAS, is_url, open_filesystem, protocol_of, shown
from protoclip_scale.data.sources.retry import retry
from protoclip_scale.engine.checkpoint import manifest as manifests
from protoclip_scale.engine.checkpoint.finding import is_checkpoint, step_of
from protoclip_scale.engine.checkpoint.retention import remove
from protoclip_scale.errors import UserError

RUN_FILES = ("recipe.yaml", "sources.json", "metrics.jsonl", "baseline.json", "trackers.json")  # small ones that go with every checkpoint
T = TypeVar("T")


class Copies:
    """The copies at ``url``. Methods talk to the place once, and raise whatever its file system raises; ``patiently`` tries again.

    ``retry_seconds``: for how long. Raises UserError for a URL of an unknown protocol, or one whose package is not installed.
    """

    def __init__(self, url: str, retry_seconds: float):
        url = url if is_url(url) else str(Path(url).expanduser().absolute())
        self.shown, self._seconds = shown(url), retry_seconds
        self._filesystem, self._root = open_filesystem(url)
        self._makes_folders = protocol_of(url) not in EXTRAS  # object stores have none

    def patiently(self, doing: str, action: Callable[[], T]) -> T:
        """``action()``, tried again for a while where waiting may help; UserError in the end."""
        return retry(action, self._seconds, doing, f"run.copy_to {self.shown}", remote=True)

    def _path(self, *parts: str) -> str:
        return posixpath.join(self._root, *parts)

    def put_bytes(self, name: str, content: bytes) -> None:
        path = self._path(name)
        if self._makes_folders:
            self._filesystem.makedirs(posixpath.dirname(path), exist_ok=True)
        self._filesystem.pipe_file(path, content)

    def get_bytes(self, name: str) -> bytes | None:
        """A small file's content; None if there is none."""
        self._filesystem.invalidate_cache()
        try:
            return self._filesystem.cat_file(self._path(name))
        except FileNotFoundError:
            return None

    def put(self, folder: Path) -> None:
        """Copy the files of a published checkpoint, without its manifest: it is not complete yet. What lay there under its name is not complete any more."""
        if self._exists(self._path("checkpoints", folder.name, manifests.NAME)):
            self._filesystem.rm_file(self._path("checkpoints", folder.name, manifests.NAME))
        facts = json.loads((folder / manifests.NAME).read_text(encoding="utf-8"))
        if self._makes_folders:
            self._filesystem.makedirs(self._path("checkpoints", folder.name), exist_ok=True)
        for name in _files(facts):
            self._filesystem.put_file(str(folder / name), self._path("checkpoints", folder.name, name))

    def complete(self, folder: Path) -> None:
        """Make a copy count, once all its files are there."""
        self.put_bytes(f"checkpoints/{folder.name}/{manifests.NAME}", (folder / manifests.NAME).read_bytes())

    def holds(self, folder: Path) -> bool:
        """Whether this very checkpoint is there, complete."""
        return self.get_bytes(f"checkpoints/{folder.name}/{manifests.NAME}") == (folder / manifests.NAME).read_bytes()

    def names(self) -> list[str]:
        """Complete copies, prototypes beside checkpoints too, oldest first."""
        self._filesystem.invalidate_cache()
        paths = self._filesystem.glob(self._path("checkpoints", "step-*", manifests.NAME))
        return sorted(posixpath.basename(posixpath.dirname(path)) for path in paths)

    def steps(self) -> list[int]:
        """Of complete checkpoints, ascending."""
        return [step_of(name) for name in self.names() if is_checkpoint(name)]

    def get(self, name: str, run_dir: Path) -> None:
        """Bring a copy into a run directory and publish it there once it is known to be sound. UserError if it is not."""
        writing, final = run_dir / "checkpoints" / f".writing-0000-{name}", run_dir / "checkpoints" / name
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        try:
            content = self.patiently(f"reading {name}", lambda: self.get_bytes(f"checkpoints/{name}/{manifests.NAME}"))
            (writing / manifests.NAME).write_bytes(content or b"")
            for file in _files(manifests.facts(writing)):
                self.patiently(f"reading {name}/{file}", lambda file=file: self._get(f"checkpoints/{name}/{file}", writing / file))
                standing.got_on()
            manifests.read_manifest(writing)
            remove(final)
            writing.rename(final)
        except UserError as error:
            raise UserError(str(error).replace(str(writing), f"{self.shown}/checkpoints/{name}")) from None
        finally:
            shutil.rmtree(writing, ignore_errors=True)

    def set_aside(self, after: int, attempt: int) -> None:
        """Copies of steps after ``after`` count no longer: their manifests get another name. Newest first, so that an interruption leaves no gap."""
        for name in reversed(self.names()):
            if step_of(name) > after:
                path = self._path("checkpoints", name, manifests.NAME)
                self._filesystem.mv(path, self._path("checkpoints", name, f"discarded-{attempt:04d}-{manifests.NAME}"))

    def remove(self, step: int) -> None:
        """Delete a checkpoint's copy and that of the prototypes beside it; it stops being complete first."""
        for name in self.names():
            if step_of(name) == step:
                self._filesystem.rm_file(self._path("checkpoints", name, manifests.NAME))
                self._filesystem.rm(self._path("checkpoints", name), recursive=True)

    # -- whose they are

    def announce(self, attempt: int, run_id: str) -> None:
        self.put_bytes(f"attempts/{attempt:04d}", json.dumps({"run_id": run_id}).encode())

    def newest_attempt(self) -> int:
        """0 if the place holds no run's copies."""
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.ls(self._path("attempts"), detail=False)
        except FileNotFoundError:
            return 0
        numbers = [posixpath.basename(path.rstrip("/")) for path in found]
        return max((int(number) for number in numbers if number.isdigit()), default=0)

    def run_id(self) -> str | None:
        newest = self.newest_attempt()
        return json.loads(self.get_bytes(f"attempts/{newest:04d}") or b"{}").get("run_id") if newest else None

    def _get(self, name: str, path: Path) -> None:
        self._filesystem.get_file(self._path(name), str(path))

    def _exists(self, path: str) -> bool:
        self._filesystem.invalidate_cache()
        return self._filesystem.exists(path)


def _files(facts: dict[str, Any]) -> list[str]:
    """All files that a manifest names; none for an empty one."""
    return [*facts.get("files", ()), *(facts[key]["name"] for key in manifests.WHOLE if facts.get(key))]
