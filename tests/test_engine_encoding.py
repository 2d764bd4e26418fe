"""Features of an episode's batches, encoded in blocks, against one plain forward pass for each row."""

from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from protoclip_scale.data.batches import Batch
from protoclip_scale.data.decode import Limits, decode_image
from protoclip_scale.data.tokenizers import ClipTokenizer
from protoclip_scale.data.transforms import eval_transform
from protoclip_scale.engine import encoding
from protoclip_scale.engine.encoding import FEATURES, Encoder, batches_together, blocks
from protoclip_scale.models import text
from protoclip_scale.models.dual_encoder import DualEncoder
from tests.support import CORPUS
from tests.test_models_dual_encoder import SETTINGS

BATCH, NUM_BATCHES, CONTEXT = 16, 5, 12


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Real rows: short captions with a few long ones."""
    rows = pq.read_table(CORPUS / "val-00000-of-00001.parquet").slice(0, BATCH * NUM_BATCHES).to_pylist()
    images = torch.stack([eval_transform(decode_image(row["image"]["bytes"], Limits(10**6, 10**6)), 32) for row in rows]).contiguous(memory_format=torch.channels_last)
    tokens = ClipTokenizer(CONTEXT)([row["caption"][0] for row in rows])
    numbers = torch.arange(len(rows))
    return [
        Batch(step, *(each[step * BATCH : (step + 1) * BATCH] for each in (images, tokens.ids, tokens.lengths, numbers, numbers, numbers)))
        for step in range(NUM_BATCHES)
    ]


@pytest.fixture(scope="module")
def strategy(batches):
    """A model whose batch norms have seen the rows."""
    torch.manual_seed(0)
    model = DualEncoder(SETTINGS, frozenset(FEATURES.values()))
    for batch in batches:
        model(batch.images, batch.token_ids, batch.token_lengths, wants=frozenset(FEATURES.values()))
    device = torch.device("cpu")
    return SimpleNamespace(bare_model=model.eval(), device=device, whole=True)


def slow_twin(strategy, batches: list[Batch]) -> dict[str, np.ndarray]:
    """Each row alone, its caption padded to the full length."""
    found = {column: [] for column in FEATURES}
    with torch.no_grad():
        for batch in batches:
            for row in range(BATCH):
                one = slice(row, row + 1)
                features = strategy.bare_model(batch.images[one], batch.token_ids[one], batch.token_lengths[one], wants=frozenset(FEATURES.values()))
                for column, name in FEATURES.items():
                    found[column].append(features[name].numpy())
    return {column: np.concatenate(rows) for column, rows in found.items()}


@pytest.fixture
def small_pieces(monkeypatch):
    """So that these few rows are cut as an episode is: unequal pieces of images, several of captions, a last block that is shorter."""
    monkeypatch.setattr(encoding, "BLOCK_ROWS", 40)
    monkeypatch.setattr(encoding, "ROWS_TOGETHER", 24)
    monkeypatch.setattr(text, "BUCKET_ROWS", {"cpu": 4})


def test_every_row_gets_its_own_features(batches, strategy, small_pieces):
    assert len(batches[0].token_lengths.unique()) > 3
    encoder = Encoder(strategy, batches[0])
    encoded = [arrays for block in blocks(batches, batches_together(BATCH)) for arrays in encoder(block)]
    expected = slow_twin(strategy, batches)
    assert len(encoded) == NUM_BATCHES
    for column in FEATURES:
        found = np.concatenate([arrays[column] for arrays in encoded])
        assert found.dtype == np.float32 and len(np.unique(found.round(4), axis=0)) > BATCH
        np.testing.assert_allclose(found, expected[column], rtol=0, atol=1e-5)


def test_padding_is_not_computed(batches, strategy, small_pieces):
    """Tokens that the text tower computes: with captions sorted, hardly more than captions have tokens."""
    computed: list[int] = []
    encoder = Encoder(strategy, batches[0])
    layers = encoder.model.text_tower.encoder.encoder
    layers.register_forward_pre_hook(lambda _, inputs, named: computed.append(named["inputs_embeds"].shape[:2].numel()), with_kwargs=True)
    for block in blocks(batches, batches_together(BATCH)):
        encoder(block)
    tokens = sum(int(batch.token_lengths.sum()) for batch in batches)
    assert tokens <= sum(computed) < 1.25 * tokens < 0.75 * BATCH * NUM_BATCHES * CONTEXT


def test_blocks_are_whole_batches():
    assert batches_together(4096) == 1 and batches_together(200) == 2 and batches_together(64) == 8
    assert [list(block) for block in blocks(iter(range(7)), 3)] == [[0, 1, 2], [3, 4, 5], [6]]
