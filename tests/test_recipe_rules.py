"""Contradictions between keys: one line that names both and the fix, and the fix works."""

import contextlib

import pytest

from protoclip_scale.errors import UserError
from protoclip_scale.recipe import load_recipe, rules
from protoclip_scale.recipe.rules import contradictions

SMALL = """
data: {sources: [{files: train-*.parquet}], plan: {global_batch: 16, episode_size: 64}}
model: {image: {name: resnet10t, size: 32}}
objectives: {clip: , prototype: }
prototypes: {clusters: 8}
optim: {lr: 0.001}
schedule: {total: 5 episodes, warmup_steps: 2}
"""

# overrides that contradict; what the line must hold; overrides that follow its advice
CASES = {
    "clusters": (["prototypes.clusters=65"], ["prototypes.clusters 65", "larger than an episode", "data.plan.episode_size 64", "at most 64"], ["prototypes.clusters=64"]),
    "clusters of a rounded episode": (["data.plan.episode_size=79", "prototypes.clusters=70"], ["79 is 64 rows in whole batches"], ["prototypes.clusters=64"]),
    "nothing to mask with": (["objectives.mlm={}"], ["objectives.mlm masks tokens", "model.text.mask_token is false"], ["model.text.mask_token=true"]),
    "uncut batches": (["run.allow_batchnorm_microbatches=true"], ["run.allow_batchnorm_microbatches true has no effect", "optim.microbatch null"], ["optim.microbatch=4"]),
    "all kept": (["run.keep_every_steps=4"], ["run.keep_every_steps 4 has no effect", "run.keep_checkpoints 0"], ["run.keep_checkpoints=1"]),
    "steps never saved": (
        ["run.keep_checkpoints=1", "run.keep_every_steps=6", "run.checkpoint_steps=4"],
        ["run.keep_every_steps 6", "run.checkpoint_steps 4", "4 steps of an episode"],
        ["run.checkpoint_steps=3"],
    ),
    "no clustering": (["prototypes=null"], ["objectives.prototype needs clusters", "prototypes is missing", "add a section prototypes"], ["prototypes={clusters: 6}"]),
    "idle clustering": (["objectives.prototype.weight=0"], ["prototypes.clusters 8 has no effect", "objectives", "set prototypes to null"], ["prototypes=null"]),
    "nothing trains": (["objectives.clip.weight=0", "objectives.prototype.weight=0"], ["objectives", "all weights are 0"], ["objectives.clip.weight=1", "prototypes=null"]),
    "warm-up of nothing": (["objectives.clip.weight=0"], ["episodes.warmup 1", "objectives names none", "set episodes.warmup to 0"], ["episodes.warmup=0"]),
    "ending of nothing": (
        ["objectives.clip.weight=0", "episodes.warmup=0", "episodes.lit.start=4"],
        ["episodes.lit.start 4", "add objectives.clip"],
        ["objectives.clip.weight=1"],
    ),
    "endless lit": (["episodes.lit.start=6"], ["episodes.lit.start 6", "schedule.total '5 episodes'", "at most 5"], ["episodes.lit.start=5"]),
    "lit in steps": (["schedule.total=13 steps", "episodes.lit.start=5"], ["episodes.lit.start 5", "is 4 episodes"], ["episodes.lit.start=4"]),
    "lit without prototypes": (["episodes.lit.start=2"], ["episodes.lit.start 2", "episodes.warmup 1", "3 or later"], ["episodes.lit.start=3"]),
    "all warm-up": (["episodes.warmup=5"], ["episodes.warmup 5", "schedule.total '5 episodes'", "shorten"], ["episodes.warmup=4"]),
    "long warm-up": (["schedule.warmup_steps=20"], ["schedule.warmup_steps 20", "20 steps of schedule.total", "shorten"], ["schedule.warmup_steps=19"]),
    "warm-up into lit": (["schedule.warmup_steps=8", "episodes.lit.start=3"], ["schedule.warmup_steps 8", "episodes.lit.start 3"], ["schedule.warmup_steps=7"]),
    "warm-up of epochs": (
        ["schedule.total=2 epochs", "data.plan.epoch_rows=160", "schedule.warmup_steps=20"],
        ["schedule.warmup_steps 20", "20 steps of schedule.total '2 epochs'"],
        ["schedule.total=3 epochs"],
    ),
    "no length": (["schedule.total=0 episodes"], ["schedule.total '0 episodes'", "make it longer"], ["schedule.total=5 episodes"]),
    "short epoch": (["data.plan.epoch_rows=50"], ["data.plan.episode_size 64", "data.plan.epoch_rows 50"], ["data.plan.epoch_rows=64"]),
    "neighbours of texts that nothing trains": (
        ["objectives={neighbour: {}, prototype: {}, simsiam: {}}"],
        ["objectives.neighbour", "add objectives.clip or objectives.multiview"],
        ["objectives.clip={}"],
    ),
    "norm groups of a head": (
        ["objectives.simsiam={norm_groups: 3}"],
        ["objectives.simsiam.norm_groups 3", "data.plan.lanes 8"],
        ["objectives.simsiam={norm_groups: 4}"],
    ),
    "a temperature of its own": (
        ["objectives.siglip={logit_scale: {minimum: 3}}"],
        ["objectives.siglip.logit_scale.init 2.303 lies outside", "objectives.siglip.logit_scale.minimum 3"],
        ["objectives.siglip={logit_scale: {minimum: 3, init: 3}}"],
    ),
    "norm groups": (["model.norm_groups=3"], ["model.norm_groups 3", "data.plan.lanes 8", "one of 1, 2, 4, 8"], ["model.norm_groups=4"]),
    "batch of lanes": (["data.plan.global_batch=20"], ["data.plan.global_batch 20", "data.plan.lanes 8", "use 16"], ["data.plan.global_batch=16"]),
    "episode of a batch": (["data.plan.episode_size=8"], ["data.plan.episode_size 8", "data.plan.global_batch 16"], ["data.plan.episode_size=16"]),
    "pretrained clip": (["model.text.pretrained=true"], ["model.text.pretrained true", "model.text.name clip"], ["model.text.pretrained=false"]),
    "two origins": (["model.image.pretrained=true", "model.init_from=runs/a"], ["model.image.pretrained true", "model.init_from runs/a"], ["model.init_from=null"]),
    "frozen twice": (["model.frozen=[text_tower, text_tower]"], ["model.frozen names text_tower twice"], ["model.frozen=[text_tower]"]),
    "part of a frozen tower": (["model.frozen=[patch_embedding, image_tower]"], ["model.frozen", "patch_embedding has no effect beside image_tower"], ["model.frozen=[image_tower]"]),
    "locked and frozen": (
        ["model.frozen=[image_tower]", "episodes.lit.start=3"],
        ["episodes.lit.start 3", "model.frozen image_tower does from the first step"],
        ["model.frozen=[]"],
    ),
    "nothing left of either side": (
        ["model.frozen=[text_tower]", "episodes.lit.start=3"],
        ["episodes.lit.start 3", "model.frozen text_tower"],
        ["episodes.lit=null"],
    ),
    "rates of a frozen tower": (
        ["model.frozen=[image_tower]", "optim.layer_decay={image: 0.5, text: 0.9}"],
        ["optim.layer_decay.image 0.5 has no effect", "model.frozen image_tower"],
        ["optim.layer_decay.image=1"],
    ),
    "final above peak": (["schedule.final_lr=1"], ["schedule.final_lr 1.0", "optim.lr 0.001"], ["schedule.final_lr=0"]),
    "gallery": (
        ["evaluation.sets=[{name: seen, files: a.parquet}]", "evaluation.gallery.all=[sen]"],
        ["evaluation.gallery.all names sen", "evaluation.sets", "did you mean seen?"],
        ["evaluation.gallery.all=[seen]"],
    ),
    "same set twice": (
        ["evaluation.sets=[{name: a, files: a.parquet}, {name: a, files: b.parquet}]"],
        ["evaluation.sets names a twice"],
        ["evaluation.sets.1.name=b"],
    ),
    "idle probe": (
        ["evaluation.sets=[{name: a, files: a.parquet}]", "evaluation.probe_train={name: t, files: t.parquet, classify: [coarse]}"],
        ["evaluation.probe_train.classify", "evaluation.sets"],
        ["evaluation.sets.0.classify=[coarse]"],
    ),
    "scratch braces": (["run.scratch_dir=/tmp/{user}"], ["run.scratch_dir '/tmp/{user}'", "{dir} and {name}"], ["run.scratch_dir=/tmp/{name}"]),
    "nothing recorded": (["prototypes.refresh=online", "episodes.warmup=0"], ["prototypes.refresh online", "episodes.warmup is 0"], ["episodes.warmup=1"]),
    "teacher without extraction": (
        ["prototypes.refresh=recorded", "objectives.teacher={features: here}"],
        ["objectives.teacher.refresh episode", "prototypes.refresh episode extracts (found recorded)"],
        ["objectives.teacher.refresh=once"],
    ),
    "warm start of nothing": (
        ["objectives={clip: null, teacher: {features: here, refresh: once}}", "prototypes.warm_start=true"],
        ["prototypes.warm_start true", "objectives.teacher.refresh once"],
        ["prototypes.warm_start=null"],
    ),
    "labels of scaled centroids": (
        ["prototypes.refresh=online", "prototypes.normalize_centroids=true"],
        ["prototypes.normalize_centroids true", "prototypes.refresh online"],
        ["prototypes.normalize_centroids=false", "prototypes.spherical=true"],
    ),
    "precision of another engine": (["prototypes.distances=bf16"], ["prototypes.distances bf16", "prototypes.engine faiss"], ["prototypes.engine=torch"]),
    "profiled steps after the end": (["run.profile.steps=[9000, 9001]"], ["run.profile.steps [9000, 9001]", "schedule.total"], ["run.profile=null"]),
    "temperature of hard targets": (
        ["objectives.prototype.targets=hard", "objectives.prototype.temperature=0.1"],
        ["objectives.prototype.temperature", "objectives.prototype.targets hard"],
        ["objectives.prototype.targets=soft"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_contradiction_names_both_keys_and_the_fix_works(tmp_path, case):
    overrides, parts, fix = CASES[case]
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    recipe = load_recipe(path, [*overrides, *fix])
    assert list(contradictions(recipe)) == []


def test_every_rule_has_a_case(tmp_path, monkeypatch):
    """Each rule is the one that speaks in a case above, so none is dead."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    spoke = set()

    def listening(rule):
        def listened(recipe):
            for line in rule(recipe):
                spoke.add(rule)
                yield line

        return listened

    original = rules.RULES
    monkeypatch.setattr(rules, "RULES", tuple(map(listening, original)))
    load_recipe(path)
    assert not spoke
    for overrides, _, _ in CASES.values():
        with contextlib.suppress(UserError):
            load_recipe(path, overrides)
    assert spoke == set(original)
