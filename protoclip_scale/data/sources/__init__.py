"""Reading: the blocks of a source, one at a time, by number, whatever its layout and wherever it lies.

Importing this package costs no more than pyarrow and fsspec: loader processes do, and never read blocks.
"""

from protoclip_scale.data.sources import folder, json_tables, parquet, tables, tar  # noqa: F401 (formats register themselves)
from protoclip_scale.data.sources.formats import FORMATS, FileScan, Format, Place, SourceLimits
from protoclip_scale.data.sources.reader import BlockReader

__all__ = ["FORMATS", "BlockReader", "FileScan", "Format", "Place", "SourceLimits"]
