"""The suites of the package: what they hold is pinned, and what a set inherits from its task."""

import importlib.resources

import open_clip
import pytest
import yaml

from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.suites import chosen, suite_of, suite_of_file, with_prompts
from protoclip_scale.evaluation.tasks import SHIPPED, suite_names, synsets, task_keys, task_names, with_task
from protoclip_scale.evaluation.zero_shot import prompts
from protoclip_scale.preparation.held_out.schema import preparation_of
from protoclip_scale.recipe.schema import EvaluationSet
from tests.support import ROOT

SIZES = {  # set: (classes, templates), from OpenAI's prompts page, SLIP's files and open_clip
    "aircraft": (100, 2),
    "birdsnap": (491, 1),
    "caltech101": (102, 34),
    "cars": (196, 8),
    "cifar10": (10, 18),
    "cifar100": (100, 18),
    "clevr_counts": (8, 1),
    "country211": (211, 5),
    "cub200": (200, 1),
    "dtd": (47, 8),
    "eurosat": (10, 3),
    "fer2013": (7, 6),
    "flowers": (102, 1),
    "food101": (101, 1),
    "gtsrb": (43, 3),
    "hateful_memes": (2, 1),
    "imagenet": (1000, 80),
    "imagenet_a": (200, 80),
    "imagenet_r": (200, 80),
    "imagenet_sketch": (1000, 80),
    "imagenet_v2": (1000, 80),
    "kinetics700": (700, 28),
    "kitti_distance": (4, 1),
    "mnist": (10, 1),
    "objectnet": (113, 80),
    "patch_camelyon": (2, 1),
    "pets": (37, 1),
    "rendered_sst2": (2, 1),
    "resisc45": (45, 18),
    "stl10": (10, 2),
    "sun397": (397, 2),
    "ucf101": (101, 48),
}
METRICS = {  # but top1 (methods 7.1 and 7.2)
    "slip26": {"aircraft": "class_mean", "pets": "class_mean", "caltech101": "class_mean", "flowers": "class_mean", "hateful_memes": "roc_auc", "kinetics700": "top1_top5"},
    "declip11": {"aircraft": "class_mean", "pets": "class_mean", "caltech101": "class_mean", "flowers": "class_mean"},
    "coco": {"coco_val2017": "mean_recall", "coco_karpathy": "mean_recall"},
    "flickr30k": {"flickr30k": "mean_recall"},
}
MEMBERS = {"protoclip10": 10, "declip11": 11, "slip26": 26, "robustness": 5, "coco": 2, "flickr30k": 1}
ROWS = {"imagenet": 50_000, "cifar10": 10_000, "country211": 21_100, "objectnet": 18_574, "imagenet_r": 30_000, "coco_karpathy": 5_000, "flickr30k": 1_000}
CAPTIONS = {"coco_val2017": 25_014, "coco_karpathy": 25_000, "flickr30k": 5_000}


@pytest.mark.parametrize("name", MEMBERS)
def test_members_counts_and_metrics_of_a_suite(name):
    sets = suite_of(name, "/data").evaluation.sets
    assert len(sets) == MEMBERS[name] and suite_of(name, "/data").name == name and suite_of(name, "/data").root == "/data"
    for held_out in sets:
        templates = 7 if (name, held_out.name) == ("slip26", "imagenet") else SIZES.get(held_out.name, (0, 1))[1]
        assert (len(held_out.classes), len(held_out.prompt_templates)) == (SIZES.get(held_out.name, (0, 1))[0], templates), held_out.name
        assert held_out.chosen_metric == METRICS.get(name, {}).get(held_out.name, "top1")
        assert held_out.num_rows == ROWS.get(held_out.name, held_out.num_rows) and held_out.num_captions == CAPTIONS.get(held_out.name)
        assert all("{}" in template for template in held_out.prompt_templates)
        assert set(held_out.class_words) <= set(held_out.classes)


def test_every_task_is_in_a_suite_and_can_be_prepared():
    in_suites = {held_out.task for name in suite_names() for held_out in suite_of(name, "/data").evaluation.sets}
    assert in_suites == set(task_names()) == {*SIZES, *CAPTIONS} and set(suite_names()) == set(MEMBERS)
    for task in task_names():
        assert preparation_of(task).downloads or "http" in preparation_of(task).manual


def test_imagenet_is_that_of_open_clip_and_timm():
    keys = task_keys("imagenet")
    own = importlib.resources.files("timm.data") / "_info"
    assert keys["classes"] == (own / "imagenet_synsets.txt").read_text().split()
    assert [word for name in keys["classes"] for word in keys["class_words"][name]] == list(open_clip.IMAGENET_CLASSNAMES)
    for part in ("a", "r"):
        subset = (own / f"imagenet_{part}_synsets.txt").read_text().split()
        assert synsets(f"imagenet_{part}") == subset and len(subset) == 200 and set(subset) < set(keys["classes"])
    held_out = with_task(EvaluationSet(task="imagenet"))
    assert prompts("n01440764", held_out.prompt_templates, held_out.class_words)[0] == "a bad photo of a tench."
    assert with_task(EvaluationSet(task="imagenet", templates="simple_imagenet")).prompt_templates[0] == "itap of a {}."


def test_lists_are_the_published_ones():
    assert task_keys("cifar10")["classes"] == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert task_keys("fer2013")["class_words"]["happy"] == ["happy", "smiling"]
    assert task_keys("gtsrb")["classes"][0] == "red and white circle 20 kph speed limit"
    assert task_keys("country211")["classes"][:3] == ["Andorra", "United Arab Emirates", "Afghanistan"]
    assert task_keys("objectnet")["class_words"]["alarm_clock"] == ["alarm clock"]
    assert task_keys("birdsnap")["classes"][44:48] == ["Muscovy Duck", "Long tailed Duck", "Hooded Merganser", "Black Scoter"]  # number 46 has no images


def test_a_set_keeps_what_it_says_beside_its_task():
    held_out = with_task(EvaluationSet(task="cifar10", name="mine", files="here/*.parquet", metric="class_mean", columns={"image": "img"}))
    assert (held_out.name, held_out.files, held_out.chosen_metric, held_out.num_rows) == ("mine", "here/*.parquet", "class_mean", 10_000)
    assert (held_out.columns.image, held_out.columns.caption, held_out.classify) == ("img", "", ("class",))
    on_the_hub = with_task(EvaluationSet(task="cifar10", hub="uoft-cs/cifar10", classify=("label",)))
    assert on_the_hub.files is None and on_the_hub.classify == ("label",) and len(on_the_hub.classes) == 10


def test_kinds_of_prompts():
    suite = suite_of("protoclip10", "/data")
    for kind, count, first in (("names", 1, "{}"), ("single", 1, "a photo of a {}."), ("ensemble", 80, "a bad photo of a {}.")):
        templates = with_prompts(suite, kind).evaluation.sets[0].prompt_templates
        assert (len(templates), templates[0]) == (count, first)


def test_some_sets_of_a_suite_have_no_average():
    suite = suite_of("protoclip10", "/data")
    assert [held_out.name for held_out in chosen(suite, ["stl10", "cifar10"]).evaluation.sets] == ["cifar10", "stl10"]
    assert chosen(suite, ["stl10"]).name == "" and chosen(suite, [held_out.name for held_out in suite.evaluation.sets]).name == "protoclip10"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sets": [{"task": "cifar11"}]}, "task 'cifar11' is none of the package's, did you mean cifar10?"),
        ({"sets": [{"task": "cifar10", "metrc": "top1"}]}, "did you mean metric"),
        ({"sets": [{"name": "a"}]}, "give either files or hub"),
        ({"sets": [{"name": "a", "files": "x", "hub": "y"}]}, "give either files or hub"),
        ({"sets": [{"name": "a", "files": "x", "split": "test"}]}, "split has no effect without hub"),
        ({"sets": [{"name": "a", "files": "x", "classes": ["b"]}]}, "classify names 0"),
        ({"sets": [{"name": "a", "files": "x", "classify": ["c"], "classes": ["b", "b"]}]}, "names 'b' twice"),
        ({"sets": [{"name": "a", "files": "x", "columns": {"caption": ""}}]}, "there is nothing to measure"),
        ({"sets": [{"name": "a", "files": "x", "metric": "top1"}]}, "is a figure of classification"),
        ({"sets": [{"name": "a", "files": "x", "classify": ["c"], "metric": "mean_recall"}]}, "is a figure of retrieval"),
        ({"name": "a b", "sets": [{"task": "cifar10"}]}, "cannot stand in a figure's key"),
        ({"sets": [{"task": "cifar10", "prompts": "many"}]}, "prompts"),
    ],
)
def test_bad_suites_are_one_line(tree, message, tmp_path):
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as caught:
        suite_of_file(tmp_path / "suite.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_names_are_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read.*protoclip10"):
        suite_of("protoclip11", tmp_path)
    with pytest.raises(UserError, match="--sets: 'cifr10' is not in the suite, did you mean cifar10"):
        chosen(suite_of("protoclip10", tmp_path), ["cifr10"])


def test_the_data_files_are_packaged():
    settings = (ROOT / "pyproject.toml").read_text()
    assert '"protoclip_scale.evaluation" = ["shipped/*/*"]' in settings
    assert all(len(path.relative_to(SHIPPED).parts) == 2 for path in SHIPPED.rglob("*") if path.is_file())
