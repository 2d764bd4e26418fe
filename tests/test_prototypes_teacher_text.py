"""Text teachers: pooling against a slow twin, weights that are told apart, and what is refused."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, CLIPConfig, CLIPModel

from protoclip_scale.data.index import open_readers
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.teacher_encoders import TextEncoder
from protoclip_scale.prototypes.teacher_extraction import extract_teacher
from protoclip_scale.recipe.load import load_recipe
from tests.support import RECIPES
from tests.teachers import folder_bytes, minilm_folder, slow_embedding


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder("minilm", batch=16)


def test_pooling_is_that_of_a_slow_twin(minilm):
    captions = ["a red apple", "", "flag: Türkiye", "the quick brown fox jumps over the lazy dog, again and again", "8ball"]
    twin = np.stack([slow_embedding(caption) for caption in captions])
    np.testing.assert_allclose(minilm.captions(captions), twin, atol=1e-5)
    assert np.array_equal(minilm.captions(captions), minilm.captions(captions)) and minilm.width == 384
    short = TextEncoder("minilm", tokens=5)
    np.testing.assert_allclose(short.captions(captions[:1]), short.captions(["a red apple pie on a table"]), atol=1e-5)


def test_the_published_variant_averages_padding_too(minilm):
    reference = TextEncoder("minilm", variant="reference", tokens=12)
    captions = ["a red apple", "a red apple and a green pear on a wooden table in the kitchen"]
    ids = [reference._tokenizer(caption)["input_ids"][:12] for caption in captions]
    ids = torch.tensor([row + [0] * (12 - len(row)) for row in ids])
    with torch.no_grad():
        twin = torch.nn.functional.normalize(reference._model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(dim=1))
    np.testing.assert_allclose(reference.captions(captions), twin, atol=1e-5)
    assert ids[1, -1] != reference._tokenizer.sep_token_id, "a long caption loses its end"
    assert np.abs(reference.captions(captions)[0] - minilm.captions(captions)[0]).max() > 0.01


def test_the_shipped_store_is_the_one_the_documented_command_makes(minilm):
    """It is found finished: model, weights, pooling, captions, data and width are those it says."""
    shipped = RECIPES / "demo_corpus_teacher"
    before = folder_bytes(shipped)
    readers = open_readers(load_recipe(RECIPES / "demo.yaml").data)
    assert extract_teacher(readers, minilm, shipped, report=pytest.fail).num_rows == 4949
    assert folder_bytes(shipped) == before
    with pytest.raises(UserError, match="holds features of another teacher"):
        extract_teacher(readers, minilm, shipped, dim=32)


def test_captions_are_chosen_as_said_and_missing_ones_left_out(minilm):
    rows = pa.table({"captions": pa.array([["a red apple", "fruit"], [None, "", "fruit"], [], None], pa.list_(pa.string()))})
    first, join = minilm, TextEncoder("minilm", caption="join", batch=16)
    assert np.array_equal(first.encode(rows), first.captions(["a red apple", "fruit", "", ""]))
    assert np.array_equal(join.encode(rows), join.captions(["a red apple. fruit", "fruit", "", ""]))
    assert first.info["caption"] == "first" and join.info["caption"] == "join" and first.info["weights"] == join.info["weights"]


def masked_language_model(folder) -> str:
    """As RoBERTa-large is published: without the pooler that AutoModel gives it, drawn anew at each load."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=tokenizer.vocab_size, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_without_a_pooler_has_one_hash_and_a_model_with_a_hole_is_refused(tmp_path):
    place = masked_language_model(tmp_path / "tiny")
    one, two = TextEncoder(place), TextEncoder(place)
    assert one.info == two.info and one.width == 16 and one.info["model"] == "tiny"
    assert np.array_equal(one.captions(["a red apple"]), two.captions(["a red apple"]))
    other = BertForMaskedLM.from_pretrained(place)
    with torch.no_grad():
        other.bert.embeddings.LayerNorm.weight[3] += 1e-3
    other.save_pretrained(place)
    assert TextEncoder(place).info["weights"] != one.info["weights"]
    state = {name: tensor.clone() for name, tensor in other.state_dict().items() if "LayerNorm" not in name}
    other.save_pretrained(place, state_dict=state)
    with pytest.raises(UserError, match=r"of its weights are missing, first .*LayerNorm"):
        TextEncoder(place)


def test_what_is_no_text_encoder_is_refused_in_one_line(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    CLIPModel(CLIPConfig(text_config=sizes | {"vocab_size": 40000}, vision_config=sizes | {"image_size": 8, "patch_size": 8})).save_pretrained(tmp_path / "clip")
    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    for model, message in ((tmp_path / "empty", "transformers cannot load it"), (tmp_path / "clip", "does not encode plain captions")):
        with pytest.raises(UserError, match=message) as error:
            TextEncoder(str(model))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--caption random: a teacher has one feature for each row"):
        TextEncoder("minilm", caption="random")
    with pytest.raises(UserError, match="--tokens 0"):
        TextEncoder("minilm", tokens=0)
