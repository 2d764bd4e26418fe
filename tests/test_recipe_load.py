"""Recipes from files and overrides: merging, paths, one-line errors, the resolved text, what a resume may change."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protoclip_scale.errors import UserError
from protoclip_scale.recipe import Recipe, diff, dump, load_recipe
from protoclip_scale.recipe.layers import Origin, flat, merge
from protoclip_scale.recipe.names import nearest
from protoclip_scale.recipe.problems import all_keys

SMALL = {
    "data": {"sources": [{"files": "train-*.parquet"}], "plan": {"global_batch": 16, "episode_size": 64}},
    "model": {"image": {"name": "resnet10t", "size": 32}},
    "objectives": {"clip": {}, "prototype": {}},
    "prototypes": {"clusters": 8},
    "optim": {"lr": 0.001},
    "schedule": {"total": "5 episodes", "warmup_steps": 2},
}


def written(folder: Path, name: str, tree: object) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return written(tmp_path, "small.yaml", SMALL)


def one_line_error(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_defaults_names_and_objectives(small: Path):
    recipe = load_recipe(small)
    assert recipe.name == "small"
    assert recipe.optim.betas == (0.9, 0.98)
    assert recipe.objectives["prototype"].back_translation is True
    assert list(recipe.objectives) == ["clip", "prototype"]


def test_extends_merges_in_order_and_name_is_not_inherited(tmp_path: Path, small: Path):
    written(tmp_path, "deep/other.yaml", {"optim": {"lr": 0.002, "weight_decay": 0.3}, "data": {"sources": [{"files": "b.parquet"}]}})
    child = written(tmp_path, "deep/child.yaml", {"extends": ["../small.yaml", "other.yaml"], "optim": {"weight_decay": 0.4}})
    recipe = load_recipe(child)
    assert recipe.name == "child"
    assert (recipe.optim.lr, recipe.optim.weight_decay) == (0.002, 0.4)
    assert [source.files for source in recipe.data.sources] == ["b.parquet"]  # lists replace
    assert recipe.data.plan.global_batch == 16


def test_extends_cycle_missing_parent_and_wrong_type(tmp_path: Path):
    written(tmp_path, "a.yaml", {"extends": "b.yaml"})
    written(tmp_path, "b.yaml", {"extends": ["a.yaml"]})
    assert "a cycle, a.yaml -> b.yaml -> a.yaml" in one_line_error(tmp_path / "a.yaml")
    orphan = written(tmp_path, "orphan.yaml", {"extends": "bb.yaml"})
    message = one_line_error(orphan)
    assert "orphan.yaml: extends:" in message and "did you mean b.yaml?" in message
    assert "extends: found 3" in one_line_error(written(tmp_path, "typed.yaml", {"extends": 3}))


leaves = st.one_of(st.integers(), st.lists(st.integers(), max_size=2))
trees = st.dictionaries(st.sampled_from("abc"), st.recursive(leaves, lambda below: st.dictionaries(st.sampled_from("abc"), below, min_size=1, max_size=3), max_leaves=6))


@settings(max_examples=100, deadline=None)
@given(st.lists(trees, max_size=4))
def test_merge_equals_slow_twin(layers: list[dict]):
    """Twin: a later layer's dotted key removes what lies above and below it."""
    merged, origins = {}, {}
    expected: dict[str, object] = {}
    for number, layer in enumerate(layers):
        merge(merged, yaml.safe_load(yaml.safe_dump(layer)), origins, Origin(str(number), Path()))
        for key, value in flat(layer).items():
            stale = [old for old in expected if old == key or old.startswith(key + ".") or key.startswith(old + ".")]
            expected = {old: kept for old, kept in expected.items() if old not in stale} | {key: value}
    assert flat(merged) == expected


def test_overrides_reach_sections_lists_and_null_sections(small: Path):
    recipe = load_recipe(
        small, ["optim.lr=2e-3", "data.sources.0.files=[a.parquet, b.parquet]", "episodes.lit.start=4", "objectives.prototype.targets=hard", "run.trace_rows=true"]
    )
    assert recipe.optim.lr == 0.002
    assert recipe.data.sources[0].files == ("a.parquet", "b.parquet")
    assert recipe.episodes.lit.start == 4
    assert recipe.objectives["prototype"].targets == "hard"
    assert recipe.run.trace_rows is True
    assert load_recipe(small, ["data.sources.0.files=*.parquet"]).data.sources[0].files == "*.parquet"  # not a YAML alias
    replaced = load_recipe(small, ["objectives={clip: {weight: 2}}", "prototypes=null"])  # a section is replaced whole
    assert list(replaced.objectives) == ["clip"] and replaced.prototypes is None


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=3", ["--set: optim.lrr is not a key", "did you mean lr?"]),
        ("data.plan.episodesize=3", ["data.plan.episodesize", "did you mean episode_size?"]),
        ("data.sources.0.columns.imag=x", ["data.sources.0.columns.imag", "did you mean image?"]),
        ("objectives.prototype.temprature=1", ["objectives.prototype.temprature", "did you mean temperature?"]),
        ("objectives.protype={}", ["objectives.protype is not an objective", "did you mean prototype?"]),
        ("lr=3", ["lr is not a key", "did you mean optim.lr?"]),
        ("zebra=3", ["zebra is not a key; one of: data, episodes"]),
        ("optim.lr=abc", ["optim.lr: found 'abc'", "valid number", "Peak learning rate"]),
        ("model.image.size=0", ["model.image.size: found 0", "greater than 0"]),
        ("optim.precision=bf61", ["optim.precision: found 'bf61'", "'fp32', 'bf16' or 'fp16'", "did you mean bf16?"]),
        ("optim=3", ["optim: found 3", "must be a section"]),
        ("data.sources=[]", ["data.sources: found []", "at least one entry"]),
        ("data.sources.0.files=[3]", ["data.sources.0.files"]),
        ("schedule.total=3 parsecs", ["schedule.total is '3 parsecs'", "100 episodes"]),
        ("episodes.lit={}", ["episodes.lit.start is missing", "First locked episode"]),
        ("objectives.teacher=", ["objectives.teacher.features is missing"]),
        ("objectives.clip=[3]", ["objectives.clip: found [3]", "must be a section"]),
        ("data.sources.3.files=a", ["data.sources.3", "0 to 0"]),
        ("optim.lr.x=3", ["optim.lr: holds"]),
        ("data.root", ["write section.key=value"]),
        ("=3", ["write section.key=value"]),
        ("optim.betas=[0.9", ["optim.betas: found '[0.9'", "must be a list"]),
    ],
)
def test_one_line_per_mistake(small: Path, override: str, parts: list[str]):
    message = one_line_error(small, override)
    for part in parts:
        assert part in message


values = st.one_of(st.none(), st.booleans(), st.integers(-2, 100), st.sampled_from(["", "x", "clip", "{}", "{root}", "[", "*", "../a"]), st.just([]), st.just([1, "a"]), st.just({"a": 1}))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(sorted(all_keys(Recipe)) + ["objectives.prototype", "objectives.teacher.features", "objectives.clip.weight", "a.b"]), values), min_size=1, max_size=2))
def test_any_override_loads_or_is_refused_with_one_line(small: Path, changes: list[tuple[str, object]]):
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix(chr(10)).removesuffix(chr(10) + '...')}" for key, value in changes]
    try:
        recipe = load_recipe(small, overrides)
    except UserError as error:
        assert "\n" not in str(error) and str(error).split(":")[0] in (str(small), "--set", *(f"--set {override.split(':')[0]}" for override in overrides))
    else:
        assert load_recipe(written(small.parent, "small/small.yaml", dump(recipe))) == recipe


def test_errors_name_the_file_that_says_it(tmp_path: Path, small: Path):
    written(tmp_path, "bad_base.yaml", {"optim": {"lr": "fast"}})
    child = written(tmp_path, "child.yaml", {"extends": ["small.yaml", "bad_base.yaml"], "optim": {"eps": 1e-7}})
    assert one_line_error(child).startswith(f"{tmp_path}/bad_base.yaml: optim.lr: found 'fast'")
    assert one_line_error(child, "optim.lr=0.1", "optim.epss=3").startswith("--set: optim.epss")


def test_unreadable_files(tmp_path: Path, small: Path):
    assert "did you mean small.yaml?" in one_line_error(tmp_path / "smal.yaml")
    assert "line 2" in one_line_error(written(tmp_path, "broken.yaml", "a: 1\nb: ]\n"))
    assert "the key 'lr' is written twice" in one_line_error(written(tmp_path, "twice.yaml", "optim:\n  lr: 1\n  lr: 2\n"))
    assert "found list" in one_line_error(written(tmp_path, "list.yaml", "- 1\n"))
    assert "cannot be read" in one_line_error(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read" in one_line_error(tmp_path / "binary.yaml")
    assert "not readable as YAML" in one_line_error(written(tmp_path, "code.yaml", "a: !!python/object/apply:os.getcwd []\n"))


def test_paths_start_from_the_file_that_says_them(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_recipe(small).data.root == str(tmp_path)  # the default
    written(tmp_path, "base/with_root.yaml", {"data": {"root": "../corpus"}, "objectives": {"teacher": {"features": "teacher"}}})
    child = written(tmp_path, "sub/child.yaml", {"extends": ["../small.yaml", "../base/with_root.yaml"], "model": {"init_from": "./start"}})
    recipe = load_recipe(child)
    assert recipe.data.root == str(tmp_path / "corpus")
    assert recipe.objectives["teacher"].features == str(tmp_path / "base" / "teacher")
    assert recipe.model.init_from == str(tmp_path / "sub" / "start")
    monkeypatch.chdir(tmp_path / "sub")
    recipe = load_recipe(child, ["data.root=here", "objectives.teacher.features={root}/t", "model.init_from=open_clip:RN50/openai"])
    assert recipe.data.root == str(tmp_path / "sub" / "here")
    assert recipe.objectives["teacher"].features == str(tmp_path / "sub" / "here" / "t")
    assert recipe.model.init_from == "open_clip:RN50/openai"
    remote = load_recipe(child, ["data.root=s3://bucket/set", "objectives.teacher.features={root}/t"])
    assert (remote.data.root, remote.objectives["teacher"].features) == ("s3://bucket/set", "s3://bucket/set/t")
    assert load_recipe(child, ["data.root=/absolute"]).data.root == "/absolute"
    assert load_recipe(child, ["data.root=~/x"]).data.root == os.path.expanduser("~/x")


def test_dump_writes_every_default_and_reads_back(tmp_path: Path, small: Path):
    recipe = load_recipe(small, ["episodes.lit.start=4", "evaluation.sets=[{name: a, files: e.parquet, exclude: {coarse: [flag]}}]", "notes=Füße"])
    text = dump(recipe)
    assert "betas:" in text and "nonfinite_skips: 10" in text and "back_translation: true" in text and "Füße" in text
    assert load_recipe(written(tmp_path, "elsewhere/resolved.yaml", text)) == recipe
    assert dump(load_recipe(tmp_path / "elsewhere" / "resolved.yaml")) == text


@pytest.mark.parametrize(
    ("secret", "override"),
    [
        ("hunter2", "data.root=https://me:hunter2@host/data"),
        ("abc123", "data.root=https://host/data?X-Amz-Signature=abc123&part=1"),
        ("hf_abcdefghijklmnop1234", "data.root=https://host/hf_abcdefghijklmnop1234/data"),
        ("s3cret", "data.sources.0.files=https://host/a.parquet?token=s3cret"),
    ],
)
def test_dump_redacts_secrets_and_a_resume_does_not_mind(small: Path, tmp_path: Path, secret: str, override: str):
    recipe = load_recipe(small, [override])
    text = dump(recipe)
    assert secret not in text and "***" in text
    assert not diff(load_recipe(written(tmp_path, "small_again.yaml", text.replace("small_again", "small"))), recipe)


def test_diff_tells_what_may_not_change(small: Path):
    old = load_recipe(small)
    new = load_recipe(small, ["optim.lr=0.002", "run.log_steps=3", "evaluation.batch=8", "data.workers=0", "schedule.total=9 episodes", "episodes.lit.start=4"])
    assert diff(old, new) == ["episodes.lit: null -> {start: 4, variant: paper, lr: null}", "optim.lr: 0.001 -> 0.002", "schedule.total: 5 episodes -> 9 episodes"]
    assert "schedule.total: 5 episodes -> 9 episodes" not in diff(old, new, extend=True)
    assert diff(old, load_recipe(small)) == []


def test_nearest():
    assert nearest("clipp", ["clip", "teacher"]) == ", did you mean clip?"
    assert nearest("zzz", ["b", "a"]) == "; one of: a, b"
