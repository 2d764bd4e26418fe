"""Perceptual hashes of evaluation images, so that training rows which show one of them can be dropped."""

import hashlib
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protoclip_scale.data.decode import BadImage
from protoclip_scale.data.sources.columns import image_column, is_image
from protoclip_scale.data.sources.filesystems import is_remote
from protoclip_scale.data.sources.formats import Place
from protoclip_scale.data.sources.listing import list_places
from protoclip_scale.data.sources.retry import retry
from protoclip_scale.errors import UserError
from protoclip_scale.preparation.hashes import perceptual_hash
from protoclip_scale.preparation.images import load_small
from protoclip_scale.preparation.pool import Advance
from protoclip_scale.preparation.settings import Settings

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class EvaluationFiles:
    """Parquet files with a column of images; no caption is needed."""

    places: list[Place]
    rows: list[int]  # of each file
    digests: list[str]
    column: str
    settings: Settings
    retry_seconds: float

    def facts(self) -> list[dict[str, Any]]:
        """What identifies them, wherever they lie: names, rows and a hash of each footer."""
        files = zip(self.places, self.rows, self.digests, strict=True)
        return [{"file": posixpath.basename(place.path), "rows": rows, "digest": digest} for place, rows, digest in files]

    def name(self, number: int) -> str:
        """File and row of the evaluation image with this number."""
        starts = np.concatenate([[0], np.cumsum(self.rows)])
        file = int(np.searchsorted(starts, number, side="right")) - 1
        return f"{self.places[file].relative}#{number - int(starts[file])}"


def open_evaluation_files(settings: Settings, retry_seconds: float) -> EvaluationFiles:
    """Lists the files, relative to the working directory, and reads their footers. UserError: nothing there, no parquet, or no column of images under that name."""

    def try_for_long(action, doing: str, place: str) -> Any:
        return retry(action, retry_seconds, doing, place, is_remote(place))

    places = list_places(settings.leakage, ".", (".parquet",), try_for_long) if settings.leakage else []
    rows, digests = [], []
    for place in places:
        metadata, columns = try_for_long(lambda place=place: _footer(place), "reading the footer", place.url)
        if settings.leakage_column not in columns.names:
            raise UserError(f"--leakage {place.url} has no column {settings.leakage_column!r}; name one of {', '.join(columns.names)} with --leakage-column")
        if not is_image(columns.field(settings.leakage_column).type):
            raise UserError(f"--leakage {place.url}: column {settings.leakage_column!r} is {columns.field(settings.leakage_column).type}; it must hold encoded images")
        rows.append(metadata.num_rows)
        digests.append(hashlib.sha256(f"{place.size}{metadata.to_dict()}".encode()).hexdigest()[:32])
    return EvaluationFiles(places, rows, digests, settings.leakage_column, settings, retry_seconds)


def hash_file(files: EvaluationFiles, number: int, advance: Advance) -> tuple[int, np.ndarray, np.ndarray]:
    """(number, uint64 [rows] perceptual hashes, bool [rows] whether the image could be decoded) of one file. Remote ones are tried again, from
    their first row, as their footers are. UserError: it cannot be read, or none of its images decoded."""
    place, told = files.places[number], 0

    def hash_all() -> tuple[list[int], list[bool]]:
        nonlocal told
        hashes, usable = [], []
        for image in _images(place, files.column):
            try:
                hashes.append(perceptual_hash(load_small(image, files.settings.images.short_side, files.settings.limits)[0]))
                usable.append(True)
            except BadImage:
                hashes.append(0)
                usable.append(False)
            if len(hashes) > told:
                told += 1
                advance(1)
        return hashes, usable

    hashes, usable = retry(hash_all, files.retry_seconds, "hashing evaluation images", place.url, is_remote(place.url))
    if usable and not any(usable):
        raise UserError(
            f"--leakage {place.url}: none of its {len(usable):,} images in column {files.column!r} can be decoded, so no row can be compared with them; correct the file or --leakage-column"
        )
    return number, np.array(hashes, dtype=np.uint64), np.array(usable, dtype=bool)


def _footer(place: Place) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        with place.filesystem.open(place.path, "rb") as file:
            parquet = pq.ParquetFile(file)
            return parquet.metadata, parquet.schema_arrow
    except pa.ArrowInvalid as error:
        raise UserError(f"--leakage {place.url} is no parquet file, or is corrupt: {' '.join(str(error).split())}") from error


def _images(place: Place, column: str) -> Iterator[bytes]:
    with place.filesystem.open(place.path, "rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
            for image in image_column(batch.column(0)):
                yield image.as_py() or b""
