"""Extraction by several processes equals extraction by one, after kills at every event and with other numbers of processes."""

import os
from pathlib import Path

import numpy as np
import pytest

from protoclip_scale.data.index import build_index
from protoclip_scale.prototypes import teacher_work
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.prototypes.teacher import open_teacher
from protoclip_scale.prototypes.teacher_pca import Projection
from tests import support
from tests.support import CORPUS, RECIPES, launch
from tests.teachers import HashEncoder, data_of, extracted, folder_bytes, own_captions

FILES = ("train-000*[0-3]-of-00010.parquet", "val-*.parquet")
SETTINGS = {"dim": 4, "pca_rows": 900}  # less than all rows: some are encoded for the PCA, the others later
# (processes, event) in the order of the extraction; each goes on from the one before.
KILLS = (
    (2, "teacher.unit:3@1"),  # encoding the sample
    (3, "teacher.unit:1@2"),
    (2, "teacher.pca:1@0"),  # PCA found, nothing projected yet
    (2, "teacher.unit:9@1"),  # projecting the sample, encoding the others
    (1, "teacher.copied:2@0"),  # making the parts of the sources
    (1, "teacher.sealed:1@0"),  # done, the unfinished store still there
)


class CountingEncoder(HashEncoder):
    """Writes down how many rows it was given."""

    def __init__(self, count_file: Path):
        super().__init__()
        self.count_file = count_file

    def encode(self, rows) -> np.ndarray:
        with open(self.count_file, "a", encoding="utf-8") as file:
            file.write(f"{len(rows)}\n")
        return super().encode(rows)


def _extract(rank: int, world: int, folder: str) -> bool:
    from protoclip_scale.engine import strategy
    from protoclip_scale.engine.faults import event

    teacher_work.MIN_GROUP_ROWS = 100  # a share of several groups for each process
    accelerator = strategy.start(5)
    assert accelerator.num_processes == world
    extracted(data_of(CORPUS, *FILES), Path(folder), CountingEncoder(Path(f"{folder}.{os.getpid()}.count")), event=event, **SETTINGS)
    accelerator.end_training()
    return True


def processes(world: int, folder: Path, env: dict[str, str] | None = None) -> list[int]:
    """Exit codes of so many processes that extract into a folder."""
    results = [str(folder.parent / f"rank{rank}.pt") for rank in range(world)]
    return support._run(support._call, world, env or {}, [(path, _extract, rank, world, (str(folder),)) for rank, path in enumerate(results)])


def encoded_rows(folder: Path) -> int:
    return sum(int(line) for path in folder.parent.glob(f"{folder.name}.*.count") for line in path.read_text().splitlines())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """By one process, in this one."""
    folder = tmp_path_factory.mktemp("alone") / "teacher"
    extracted(data_of(CORPUS, *FILES), folder, **SETTINGS)
    return folder


def test_every_row_has_the_features_of_its_own_caption(alone):
    """In a source of several groups; whether a row was encoded for the PCA or later does not show."""
    captions = own_captions(data_of(CORPUS, *FILES))
    row_ids = np.array(list(captions))
    teacher = open_teacher(alone, build_index(data_of(CORPUS, *FILES)))
    assert teacher.info["pca_rows"] == 900 < len(row_ids) and teacher.dim == 4
    twin = Projection.load(alone / "pca.safetensors")(HashEncoder().captions(list(captions.values())))
    np.testing.assert_allclose(teacher.rows(row_ids), twin, atol=1e-3)
    assert np.median(np.abs(np.roll(twin, 1, axis=0) - twin).max(axis=1)) > 0.1, "neighbours differ"


def test_killed_at_every_event_and_continued_by_other_numbers_of_processes(tmp_path, alone):
    folder = tmp_path / "teacher"
    for world, event in KILLS:
        codes = processes(world, folder, {"PROTOCLIP_KILL_AT": event})
        assert codes[int(event[-1])] == -9, f"{event} never fired: {codes} {[path.read_text() for path in tmp_path.glob('rank*.txt')]}"
    assert processes(3, folder) == [0, 0, 0]
    assert folder_bytes(folder) == folder_bytes(alone)
    assert not folder.with_name("teacher.partial").exists()
    rows = FeatureStore.open(folder).num_rows
    assert rows <= encoded_rows(folder) <= rows + 64 * 2 * len(KILLS), "what was on disk was not encoded again"


@pytest.mark.slow
def test_the_line_that_users_type_in_two_processes_equals_one(tmp_path):
    """On real features: all-MiniLM over 1,000 rows, through accelerate."""
    where = ("--recipe", RECIPES / "demo.yaml", "--set", "data.sources=[{files: 'train-0000[01]-of-00010.parquet'}]", "--model", "minilm", "--dim", "16", "--pca-rows", "500")
    for ranks in (1, 2):
        done = launch(*where, "--out", tmp_path / f"{ranks}", "--npy-out", tmp_path / f"{ranks}.npy", "--expect-ranks", ranks, ranks=ranks, script="tools/extract_teacher.py")
        assert done.returncode == 0, done.stderr
        assert "rows of 16 features" in done.stdout
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "2")
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "2.npy").read_bytes()
    done = launch(*where, "--out", tmp_path / "3", "--expect-ranks", 2, script="tools/extract_teacher.py")
    assert done.returncode == 1 and "--expect-ranks 2, but 1 ranks run" in done.stderr
