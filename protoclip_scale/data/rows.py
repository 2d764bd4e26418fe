"""Row ids: the name of one image-text pair, source (10 bits) | block in the source (27) | row in the block (26), in one int64."""

import numpy as np

from protoclip_scale.errors import UserError

SOURCE_BITS, BLOCK_BITS, ROW_BITS = 10, 27, 26


def pack_row_ids(source, block, row) -> np.ndarray:
    """Row ids int64 of broadcastable integer arrays; a part that needs more bits than it has raises UserError."""
    parts = [np.asarray(part, dtype=np.int64) for part in (source, block, row)]
    names = ("sources", "blocks (row groups) in a source", "rows in a block (row group)")
    for part, bits, name in zip(parts, (SOURCE_BITS, BLOCK_BITS, ROW_BITS), names, strict=True):
        if part.size and (part.min() < 0 or part.max() >= 1 << bits):
            raise UserError(
                f"too many {name}: number {int(part.max())} does not fit the {1 << bits} that row ids allow; split the data differently"
            )
    return (parts[0] << (BLOCK_BITS + ROW_BITS)) | (parts[1] << ROW_BITS) | parts[2]


def unpack_row_ids(row_ids) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source, block, row) of row ids, each int64 of the same shape."""
    ids = np.asarray(row_ids, dtype=np.int64)
    return ids >> (BLOCK_BITS + ROW_BITS), (ids >> ROW_BITS) & ((1 << BLOCK_BITS) - 1), ids & ((1 << ROW_BITS) - 1)
