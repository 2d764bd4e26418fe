"""Text classifiers as files: made once, found again, refused where they are of something else; and suites with them on 1, 2 and 3 ranks."""

import shutil

import pytest
import torch

from protoclip_scale.errors import UserError
from protoclip_scale.evaluation import run as evaluation_run
from protoclip_scale.evaluation.classifiers import ClassifierFiles, model_hash
from protoclip_scale.evaluation.suites import suite_of_file
from protoclip_scale.models.build import build_model
from protoclip_scale.recipe.schema import EvaluationSet
from tests.support import CORPUS, spawn
from tests.test_evaluation_run import CPU, recipe_with, tokenizer

SET = EvaluationSet(name="pets", files="x", classify=("kind",), templates=("a {}", "the {}"), classes=("cat", "dog"))
NAMES = ("cat", "dog")


def model(seed=0, image_seed=0):
    built = build_model(recipe_with({}), frozenset({"image", "text"}), seed=seed)
    if image_seed:
        with torch.no_grad():
            next(built.image_tower.parameters()).add_(image_seed)
    return built


def test_a_classifier_is_found_again(tmp_path):
    files, rows = ClassifierFiles(tmp_path, "abc"), torch.eye(2, 5)
    assert files.load(SET, "kind", NAMES) is None
    files.save(SET, "kind", NAMES, rows)
    assert torch.equal(ClassifierFiles(tmp_path, "abc").load(SET, "kind", NAMES), rows)
    assert ClassifierFiles(tmp_path, "other").load(SET, "kind", NAMES) is None
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["pets.kind.safetensors"]


def test_classifiers_of_something_else_are_refused(tmp_path):
    files = ClassifierFiles(tmp_path, "abc")
    files.save(SET, "kind", NAMES, torch.eye(2, 5))
    for held_out, names, message in (
        (SET.model_copy(update={"templates": ("a {}",)}), NAMES, "of other templates"),
        (SET.model_copy(update={"prompts": "names"}), NAMES, "of other templates"),
        (SET, ("dog", "cat"), "of other classes"),
        (SET.model_copy(update={"class_words": {"cat": ("kitten",)}}), NAMES, "of other classes"),
    ):
        with pytest.raises(UserError, match=message):
            files.load(held_out, "kind", names)
    shutil.copytree(tmp_path / "abc", tmp_path / "xyz")
    with pytest.raises(UserError, match="of another model, tokenizer or precision"):
        ClassifierFiles(tmp_path, "xyz").load(SET, "kind", NAMES)
    files.path(SET, "kind").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read.*remove it"):
        files.load(SET, "kind", NAMES)
    files.save(SET, "kind", NAMES, torch.full((2, 5), torch.nan))
    with pytest.raises(UserError, match="2 finite rows"):
        files.load(SET, "kind", NAMES)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ClassifierFiles(tmp_path / "file", "abc").save(SET, "kind", NAMES, torch.eye(2))


def test_the_hash_is_of_what_text_embeddings_depend_on():
    first = model_hash(model(), tokenizer(), "fp32")
    assert first == model_hash(model(image_seed=1), tokenizer(), "fp32")
    assert len({first, model_hash(model(seed=1), tokenizer(), "fp32"), model_hash(model(), tokenizer(), "bf16")}) == 3
    assert first != model_hash(model(), lambda texts: tokenizer()([text.upper() + "!" for text in texts]), "fp32")


def write_suite(folder):
    files = f"{CORPUS}/eval_unseen_concept-*.parquet"
    lines = [
        "name: both",
        "sets:",
        f"  - {{name: kinds, files: {files!r}, columns: {{caption: ''}}, classify: [coarse], exclude: {{coarse: ['', flag]}}, templates: ['{{}}', 'a picture of {{}}'], metric: class_mean, num_rows: 141}}",
        f"  - {{name: pairs, files: {files!r}, exclude: {{coarse: [flag]}}}}",
    ]
    (folder / "suite.yaml").write_text("\n".join(lines) + "\n")


def evaluated(folder, files=None):
    return evaluation_run.evaluate_suite(model(), suite_of_file(folder / "suite.yaml"), 32, tokenizer(), CPU, classifiers=files)


def _in_worlds(rank, world, folder):
    from pathlib import Path

    figures = {}
    for size in range(1, world + 1):
        if rank < size:
            torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
            for start in ("made", "found"):
                figures[f"{size} {start}"] = evaluated(Path(folder), ClassifierFiles(f"{folder}/classifiers-{size}", "abc"))
            torch.distributed.destroy_process_group()
    return figures


def test_a_suite_with_classifiers_is_equal_on_1_2_and_3_ranks_made_and_found(tmp_path):
    write_suite(tmp_path)
    by_rank = spawn(_in_worlds, 3, str(tmp_path))
    alone = evaluated(tmp_path)
    assert alone["both/average"] == pytest.approx((alone["kinds/zero_shot/coarse/class_mean"] + alone["pairs/retrieval/mean_recall"]) / 2)
    assert alone["kinds/zero_shot/coarse/n"] == 141 and "kinds/retrieval/mean_recall" not in alone and 0 < alone["kinds/zero_shot/coarse/top5"] < 1
    for size in (1, 2, 3):
        for start in ("made", "found"):
            assert all(by_rank[rank][f"{size} {start}"] == alone for rank in range(size)), (size, start)


def test_prompts_of_classifiers_that_are_found_are_not_encoded(tmp_path, monkeypatch):
    write_suite(tmp_path)
    encoded = []
    encode = evaluation_run.encode_texts
    monkeypatch.setattr(evaluation_run, "encode_texts", lambda model, tokenizer, texts, *rest: encoded.append(set(texts)) or encode(model, tokenizer, texts, *rest))
    files = ClassifierFiles(tmp_path, "abc")
    first = evaluated(tmp_path, files)
    assert first == evaluated(tmp_path, files)
    prompts, *captions = encoded
    assert captions[0] == captions[1] and len(captions) == 2 and any(text.startswith("a picture of ") for text in prompts)
