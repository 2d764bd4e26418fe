"""Further views and extra columns of a row: each a pure function of the seed, the view's name and the row's visit."""

import dataclasses
import functools
import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from protoclip_scale.data.batches import Batch, EpisodeBatches, make_loader
from protoclip_scale.data.decode import decode_image
from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.masking import mask_tokens
from protoclip_scale.data.plan import Plan
from protoclip_scale.data.randomness import generator
from protoclip_scale.data.rows import unpack_row_ids
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.data.spool import Spool
from protoclip_scale.data.text_augmentation import text_augmentation
from protoclip_scale.data.tokenizers import ClipTokenizer
from protoclip_scale.data.transforms import augment
from protoclip_scale.data.views import Views
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from tests.support import CORPUS

SIZE, LANES = 24, 4
VIEWS = Views(images={"a": "slip_ssl", "b": "slip_ssl"}, texts={"other": "eda"}, masked=("mlm",))


@functools.cache
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer(16, mask=True)


def opened(root, spool_folder, files, views=VIEWS, lanes=range(LANES), episode_size=256, columns=None, **settings) -> EpisodeBatches:
    """Batches of 64 rows of the first episode, spooled."""
    plan = {"episode_size": episode_size, "lanes": LANES, "global_batch": 64}
    sources = [{"files": file, **({"columns": columns} if columns else {})} for file in files]
    data = schema.Data(root=str(root), sources=sources, plan=plan, augmentation="slip", caption="random", **settings)
    readers = open_readers(data)
    episode = Plan(index_of(readers), data.plan).episode(0)
    spool = Spool(spool_folder, "run")
    spool.fill(episode, 0, range(LANES), readers)
    return EpisodeBatches(data, SIZE, tokenizer(), episode, spool, lanes, seed=5, views=views)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return functools.partial(opened, CORPUS, tmp_path_factory.mktemp("spool"), ["train-0000[0-3]*.parquet"])


def flat(value, path="") -> dict[str, torch.Tensor | object]:
    """Every tensor and plain value of a batch by its path."""
    if isinstance(value, Batch):
        value = vars(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: leaf for key, each in value.items() for name, leaf in flat(each, f"{path}/{key}").items()}
    return {path: value}


def hash_of(batches: list[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for path, value in sorted(flat(batch).items()):
            digest.update(path.encode() + (value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()))
    return digest.hexdigest()


def test_views_equal_their_slow_twins(corpus):
    """Row by row, from the spooled bytes and the definitions."""
    batches = corpus()
    batch, plan = batches[2], batches.episode_plan
    assert not torch.equal(batch.image_views["a"], batch.image_views["b"])
    main = []
    for place, position in enumerate(batch.positions.tolist()):
        lane, slot = divmod(position, plan.lane_rows)
        encoded, captions = batches.spool.open(0, lane).row(int(plan.slot_to_read[lane, slot]))
        keys = (0, int(batch.row_ids[place]), 0)
        caption = captions[int(generator(5, "caption", *keys).integers(len(captions)))]
        main.append(caption)
        for tensor, how, purpose in ((batch.images, "slip", "augmentation"), *((batch.image_views[name], "slip_ssl", f"augmentation {name}") for name in "ab")):
            assert torch.equal(tensor[place], augment(how)(decode_image(encoded), SIZE, generator(5, purpose, *keys))), (place, purpose)
        edited = text_augmentation("eda")(caption, generator(5, "text augmentation other", *keys))
        assert torch.equal(batch.text_views["other"].ids[place], tokenizer()([edited]).ids[0])
    tokens = tokenizer()(main)
    assert torch.equal(batch.token_ids, tokens.ids)
    rngs = [generator(5, "masking mlm", 0, int(row_id), 0) for row_id in batch.row_ids]
    ids, labels = mask_tokens(tokens, tokenizer(), rngs)
    assert torch.equal(batch.masked_views["mlm"].ids, ids) and torch.equal(batch.masked_views["mlm"].labels, labels)
    assert (labels >= 0).any()


def test_one_more_view_changes_nothing_about_the_others(corpus):
    bare, one = flat(corpus(views=Views())[1]), flat(corpus(views=Views(images={"b": "slip_ssl"}))[1])
    every = flat(corpus()[1])
    for some in (bare, one):
        for path, value in some.items():
            assert torch.equal(value, every[path]) if isinstance(value, torch.Tensor) else value == every[path], path
    assert len(bare) < len(one) < len(every)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_are_equal_for_any_ranks_and_workers(corpus, world):
    """Composition and every view: the hash over all tensors of the global batch."""
    whole = hash_of([corpus()[step] for step in range(4)])
    ranks = [corpus(lanes=range(rank * LANES // world, (rank + 1) * LANES // world)) for rank in range(world)]
    for workers in range(4) if world == 1 else [world // 2]:
        loaders = [make_loader(batches, 0, workers) for batches in ranks]
        assert hash_of([joined(parts) for parts in zip(*loaders, strict=True)]) == whole, workers


def joined(parts: tuple[Batch, ...]) -> Batch:
    """The global batch of all ranks' parts, which hold consecutive lanes."""

    def join(values):
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values)
        if isinstance(values[0], dict):
            return {name: join([value[name] for value in values]) for name in values[0]}
        if isinstance(values[0], tuple):
            return type(values[0])(*(join([value[number] for value in values]) for number in range(len(values[0]))))
        return sum(values, []) if isinstance(values[0], list) else values[0]

    return Batch(**{name: join([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def test_extraction_sees_the_plain_text_and_training_the_edited_one(corpus):
    plain, edited = corpus(views=Views()), corpus(views=Views(), text_augmentation="eda")
    extract = EpisodeBatches(edited.data, SIZE, tokenizer(), edited.episode_plan, edited.spool, range(LANES), "extract", seed=5)
    changed = (plain[0].token_ids != edited[0].token_ids).any(dim=1)
    assert 10 < changed.sum() < 64
    assert torch.equal(extract[0].token_ids, plain[0].token_ids)


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_rows(path, rows, bad=(), **columns):
    images = pa.array([b"bad" if row in bad else picture(row) for row in rows], pa.binary())
    extra = {name: [make(row) for row in rows] for name, make in columns.items()}
    pq.write_table(pa.table({"image": images, "caption": [f"row {row}" for row in rows], **extra}), path, row_group_size=16)


def test_extra_columns_ride_with_the_row_that_is_really_used(tmp_path):
    """Ids, lists of strings and a second image; a row that stands in for a bad one brings its own."""
    bad = {3, 40, 41, 100}
    columns = {"number": int, "words": lambda row: [f"w{row}", "x"], "second": lambda row: picture(255 - row)}
    write_rows(tmp_path / "rows.parquet", range(128), bad, **columns)
    batches = opened(tmp_path, tmp_path / "spool", ["rows.parquet"], Views(), episode_size=128, columns={"extra": list(columns)})
    replaced = 0
    for batch in make_loader(batches, 0, 1):
        _, block, row = unpack_row_ids(batch.row_ids.numpy())
        numbers = (block * 16 + row).tolist()
        assert batch.extra == {name: [make(number) for number in numbers] for name, make in columns.items()}
        assert not set(numbers) & bad
        replaced += len(batch.replaced)
    assert replaced == len(bad)


def test_sources_may_differ_in_their_extra_columns_but_not_in_a_type(tmp_path):
    write_rows(tmp_path / "a.parquet", range(100), number=int)
    write_rows(tmp_path / "b.parquet", range(100), words=lambda row: [str(row)])
    data = {"root": str(tmp_path), "plan": {"episode_size": 192, "lanes": LANES, "global_batch": 64}}
    sources = [{"files": "a.parquet", "columns": {"extra": ["number"]}}, {"files": "b.parquet", "columns": {"extra": ["words"]}}]
    settings = schema.Data(**data, sources=sources)
    readers = open_readers(settings)
    episode = Plan(index_of(readers), settings.plan).episode(0)
    spool = Spool(tmp_path / "spool", "run")
    spool.fill(episode, 0, range(LANES), readers)
    batch = EpisodeBatches(settings, SIZE, tokenizer(), episode, spool, range(LANES))[0]
    source, block, row = unpack_row_ids(batch.row_ids.numpy())
    assert 10 < np.sum(source) < 54
    for place, number in enumerate((block * 16 + row).tolist()):
        assert batch.extra["number"][place] == (number if source[place] == 0 else None)
        assert batch.extra["words"][place] == (None if source[place] == 0 else [str(number)])
    write_rows(tmp_path / "c.parquet", range(100), number=str)
    clash = schema.Data(**data, sources=[sources[0], {"files": "c.parquet", "columns": {"extra": ["number"]}}])
    readers = open_readers(clash)
    with pytest.raises(UserError, match="columns.extra 'number' is string, but int64 in a.parquet"):
        Spool(tmp_path / "other", "run").fill(Plan(index_of(readers), clash.plan).episode(0), 0, range(LANES), readers)


def test_a_batch_in_pinned_memory_keeps_its_views(corpus, monkeypatch):
    """No GPU is needed to see that every tensor is reached."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = corpus()[0]
    before = {path: value for path, value in flat(batch).items() if isinstance(value, torch.Tensor)}
    after = flat(dataclasses.replace(batch).pin_memory())
    assert len(before) >= 10 and all(torch.equal(after[path], value + 1) for path, value in before.items())




def test_large_images_that_are_files_are_read_few_at_a_time(tmp_path, monkeypatch):
    """A block of a table is 1,000 rows: with photographs of megabytes it must not be in memory as a whole."""
    (tmp_path / "images").mkdir()
    for row in range(64):
        (tmp_path / "images" / f"{row}.png").write_bytes(picture(row) + bytes(4_000_000))
    lines = "".join(f"images/{row}.png\trow {row}\n" for row in range(64))
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\n" + lines)
    data = schema.Data(root=str(tmp_path), sources=[{"files": "pairs.tsv"}], plan={"episode_size": 64, "lanes": 1, "global_batch": 16})
    [reader] = readers = open_readers(data)
    assert reader.block_rows.tolist() == [64] and reader.rows_at_once(0) == 15
    some = reader.read(0, images=frozenset({3, 4})).column("image")
    assert [row for row in range(64) if some[row].as_py() is not None] == [3, 4]
    held = []
    monkeypatch.setattr(BlockReader, "read", lambda *args, read=BlockReader.read, **named: held.append(read(*args, **named)) or held[-1])
    episode = Plan(index_of(readers), data.plan).episode(0)
    spool = Spool(tmp_path / "spool", "run")
    spool.fill(episode, 0, [0], readers)
    assert len(held) == 5 and max(table.nbytes for table in held) < 64e6
    for place, row_id in enumerate(episode.read_order(0).tolist()):
        image, captions = spool.open(0, 0).row(place)
        assert image.startswith(picture(row_id)) and captions == [f"row {row_id}"]
