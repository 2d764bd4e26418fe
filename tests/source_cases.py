"""What the tests of single formats share: scanning and reading a path without a BlockReader around it."""

import fsspec
import pyarrow as pa
import pytest

from protoclip_scale.data.sources import FORMATS, FileScan, Place, SourceLimits
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema


def place_of(url) -> Place:
    filesystem, path = fsspec.core.url_to_fs(str(url))
    return Place(str(url), filesystem, path, path.rpartition("/")[2])


def source_of(url, layout: str, columns=None, **settings) -> schema.Source:
    return schema.Source(files=str(url), format=layout, columns=columns or {}, **settings)


def scan_of(url, layout: str, columns=None, limits: SourceLimits = SourceLimits(), **settings) -> FileScan:  # noqa: B008 (frozen)
    source, place = source_of(url, layout, columns, **settings), place_of(url)
    scan = FORMATS[layout].scan(place, source, limits)
    if scan.rows:
        FORMATS[layout].check(scan, place, source)
    return scan


def read_all(url, layout: str, columns=None, images=True, limits: SourceLimits = SourceLimits(), **settings) -> pa.Table:  # noqa: B008 (frozen)
    """All blocks, one after the other; each has the rows that the scan says."""
    source, place = source_of(url, layout, columns, **settings), place_of(url)
    scan = scan_of(url, layout, columns, limits, **settings)
    tables = [FORMATS[layout].read(place, scan, block, source, images, limits) for block in range(len(scan.rows))]
    assert [table.num_rows for table in tables] == list(scan.rows) and len(scan.bytes) == len(scan.rows)
    assert len({table.schema for table in tables}) <= 1
    return pa.concat_tables(tables) if tables else pa.table({})


def refused(url, layout: str, columns=None, limits: SourceLimits = SourceLimits(), **settings) -> str:  # noqa: B008 (frozen)
    """The one line of the UserError that reading raises."""
    with pytest.raises(UserError) as caught:
        read_all(url, layout, columns, True, limits, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)
