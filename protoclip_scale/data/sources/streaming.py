"""Streaming datasets over single files: the only module that imports ``datasets``.

A file is opened as a dataset of its own, never as one of many: ``datasets`` asks a server about every file it is given, and one answer too many that
fails ends the run. Each block is a one-shard dataset that is read once, so no stream has a state that could be wrong after a resume.
"""

import atexit
import os
import time
from typing import Any

import pyarrow as pa

from protoclip_scale.data.sources.filesystems import full_url, options
from protoclip_scale.data.sources.formats import Place
from protoclip_scale.errors import UserError

REQUEST_ATTEMPTS = 3  # of each request inside a read: a block takes up to five, and on a server that fails now and then one of five often does
REQUEST_DELAY = 0.3  # seconds after each attempt
SETTLE_SECONDS = 0.3
_storage_options: dict[str, dict[str, Any]] = {}  # by protocol: `datasets` keeps one for all files of a builder, that of the file opened last
_last_read = 0.0  # time.monotonic() of it
# `datasets` imports SciPy with the first block, and that sets this variable. The block may be read in a thread while the main thread is inside torch: where C
# code looks the environment up as it changes, the process is gone.
os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "True")


def library():
    """The module ``datasets``, quiet, and with short retries (its own are 20 by 5 to 60 s for each request): ``retry`` owns the time. Two seconds at the
    first call."""
    import datasets  # here, because loader processes import this package and never read blocks

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors reach the user as one line of ours
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every process asks a server, for up to 3 s
    for what in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{what}_MAX_RETRIES", REQUEST_ATTEMPTS)
    for what in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT", "OPEN"):
        setattr(datasets.config, f"STREAMING_{what}_RETRY_INTERVAL", REQUEST_DELAY)
    return datasets


def open_blocks(builder: str, place: Place, columns: pa.Schema):
    """A streaming dataset over the given columns of one file, with one shard per block, in file order; ``builder`` is a packaged module of ``datasets``.

    Nothing but what the builder itself reads is asked of a server: the file is not looked for, and no schema is inferred. 4 ms.
    """
    datasets = library()
    from datasets.data_files import DataFilesDict, DataFilesList

    url = full_url(place)
    files = DataFilesDict({"train": DataFilesList([url], [(place.stamp or str(place.size),)])})
    if "://" in url:
        _storage_options.setdefault(url.split("://")[0], options(url))
    dataset = datasets.load_dataset(
        builder,
        data_files=files,
        split="train",
        streaming=True,
        storage_options=dict(_storage_options),
        features=datasets.Features.from_arrow_schema(columns),
        columns=columns.names,
    )
    return dataset.reshard().with_format("arrow")


def read_block(dataset, block: int, num_rows: int) -> pa.Table:
    """All rows of one shard."""
    global _last_read
    try:
        batches = list(dataset.shard(num_shards=dataset.num_shards, index=block).iter(batch_size=max(num_rows, 1)))
    finally:
        _last_read = time.monotonic()
    return pa.concat_tables(batches) if batches else dataset.features.arrow_schema.empty_table()


@atexit.register
def _let_threads_end() -> None:
    """Arrow's threads give a file back a moment after its last batch; one that does so while the interpreter ends aborts the process (every fourth
    one that ended at once did; `datasets` sleeps after reads for the same reason, arrow#45214)."""
    time.sleep(max(0.0, _last_read + SETTLE_SECONDS - time.monotonic()))


def hub_files(name: str, commit: str, config: str | None) -> tuple[str, dict[str, list[str]]]:
    """(the module of ``datasets`` that reads it, {split: hf:// URLs of its files}) of a Hub dataset at a commit; its files are not read.

    UserError if the configuration does not exist, or has to be named, or no data is found.
    """
    datasets = library()
    try:
        builder = datasets.load_dataset_builder(f"hf://datasets/{name}", name=config, revision=commit)
    except (ValueError, RuntimeError, datasets.exceptions.DataFilesNotFoundError, datasets.data_files.EmptyDatasetError) as error:
        raise UserError(f"hf://datasets/{name} (config {config}): {' '.join(str(error).split())}") from error
    module = type(builder).__module__.rpartition(".")[2]
    if module == "cache":  # its answer to any failure, if some version lies in its cache
        raise ConnectionError(f"the Hub did not answer for {name}")
    return module, {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
