"""Whatever outlives a process says its version: an older one loads or is made anew, another one is refused in one line (docs/launching.md)."""

import json
from pathlib import Path

import pytest

from protoclip_scale.data import spool as spools
from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan
from protoclip_scale.data.sources import scans
from protoclip_scale.data.spool import Spool
from protoclip_scale.engine.run_folder import check_sources, pinned
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes import recording
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.prototypes.teacher import open_teacher
from protoclip_scale.prototypes.teacher_clusters import cluster_teacher, open_teacher_clusters
from protoclip_scale.recipe import dump, load_recipe, schema
from tests.support import CORPUS, RECIPES, TINY
from tests.teachers import data_of, extracted

FILE = "train-00000-of-00010.parquet"
DATA = schema.Data(root=str(CORPUS), sources=[{"files": FILE}], plan={"episode_size": 256, "lanes": 4, "global_batch": 64})


def changed(path: Path, **facts) -> None:
    """A JSON file with other values."""
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_recipes(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = dump(load_recipe(RECIPES / "demo_clip.yaml", TINY))
    assert text.startswith("schema: 1\n")
    path.write_text(text.replace("schema: 1\n", ""))  # of releases that did not write one
    assert load_recipe(path)
    path.write_text(text.replace("schema: 1\n", "schema: 2\n"))
    with pytest.raises(UserError, match="recipe.yaml: schema: found 2, this release reads recipes of schema 1; use the release that wrote it"):
        load_recipe(path)


def test_what_a_run_knows_of_its_sources(tmp_path):
    readers, path = open_readers(DATA), tmp_path / "sources.json"
    check_sources(tmp_path, readers, None)
    assert json.loads(path.read_text())["schema"] == 1
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "schema"}))  # of releases before
    check_sources(tmp_path, readers, None)
    changed(path, schema=2)
    for look in (lambda: check_sources(tmp_path, readers, None), lambda: pinned(DATA, tmp_path)):
        with pytest.raises(UserError, match="sources.json: its format is version 2, this release reads version 1; go on with the release that wrote it"):
            look()


def test_a_spool_of_another_version_is_filled_again(tmp_path, monkeypatch):
    readers = open_readers(DATA)
    episode, spool = Plan(index_of(readers), DATA.plan).episode(0), Spool(tmp_path, "run")
    spool.fill(episode, 0, range(4), readers)
    assert all(spool.is_complete(episode, lane) for lane in range(4))
    monkeypatch.setattr(spools, "SCHEMA", "2")
    assert not any(spool.is_complete(episode, lane) for lane in range(4))
    spool.fill(episode, 0, range(4), readers)
    assert all(spool.is_complete(episode, lane) for lane in range(4))


def test_cached_scans_of_another_version_are_not_taken(monkeypatch):
    source, limits = DATA.sources[0], scans.SourceLimits()
    before = scans.ScanCache(source, str(CORPUS), limits).path
    monkeypatch.setattr(scans, "VERSION", 2)
    assert scans.ScanCache(source, str(CORPUS), limits).path != before


def test_stores_of_recorded_features(tmp_path):
    store = recording.create(tmp_path, 3, 4, 1, 2, {})
    store.writer(0).close()
    store.seal(allow_missing=True)
    changed(store.folder / "manifest.json", schema_version=2)
    with pytest.raises(UserError, match="schema version 2, not 1"):
        recording.open_recorded(tmp_path, 3)
    changed(store.folder / "layout.json", schema_version=2)
    with pytest.raises(UserError, match="it was begun with other schema_version .there .*2.*; remove that folder or choose another"):
        recording.create(tmp_path, 3, 4, 1, 2, {})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> FeatureStore:
    return extracted(data_of(CORPUS, FILE), tmp_path_factory.mktemp("teacher") / "features", dim=0)


def test_a_teacher_s_store_and_its_clusters(teacher, tmp_path):
    index = index_of(open_readers(data_of(CORPUS, FILE)))
    about = open_teacher(teacher.folder, index), index, schema.Prototypes(clusters=4, iterations=2), (0, 2)
    folder = tmp_path / "clusters"
    cluster_teacher(folder, *about, range(4), 4)
    assert open_teacher_clusters(folder, *about) is not None
    changed(next(folder.glob("*.json")), schema_version=2)
    assert open_teacher_clusters(folder, *about) is None  # clustered again
    changed(teacher.folder / "manifest.json", schema_version=2)
    with pytest.raises(UserError, match="schema version 2, not 1; make it again"):
        open_teacher(teacher.folder, index)
    changed(teacher.folder / "manifest.json", schema_version=1)
