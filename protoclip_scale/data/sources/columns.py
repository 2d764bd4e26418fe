"""Columns as every reader returns them, from the types that files have."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from protoclip_scale.data.sources.formats import CAPTIONS, IMAGE

Column = pa.Array | pa.ChunkedArray


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_image(kind: pa.DataType) -> bool:
    """Encoded bytes, or a struct with them in ``bytes``."""
    return is_bytes(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type))


def is_caption(kind: pa.DataType) -> bool:
    """A string or a list of strings, dictionary-encoded ones too."""
    kind = kind.value_type if is_list(kind) or pa.types.is_dictionary(kind) else kind
    return is_text(kind)


def is_extra(kind: pa.DataType) -> bool:
    """Whether ``extra_column`` can return it: all but maps, and lists of images."""
    if is_list(kind):
        return not (pa.types.is_struct(kind.value_type) and is_image(kind.value_type)) and is_extra(kind.value_type)
    if pa.types.is_struct(kind):
        return all(is_extra(kind.field(number).type) for number in range(kind.num_fields))
    return not pa.types.is_map(kind)


def image_column(column: Column) -> pa.ChunkedArray:
    """Encoded bytes of a column for which ``is_image`` holds; large_binary."""
    column = _chunked(column)
    if pa.types.is_struct(column.type):
        column = pa.chunked_array([pc.struct_field(chunk, "bytes") for chunk in column.chunks], type=column.type.field("bytes").type)
    return column.cast(IMAGE)


def captions_column(columns: Sequence[Column], num_rows: int) -> pa.ChunkedArray:
    """list<string> [rows]: the captions of each row in the order of the columns, nulls left out, a row without one as the empty list."""
    if not columns:
        return pa.chunked_array([pa.array([[]] * num_rows, CAPTIONS)])
    rows, texts = [], []
    for column in map(_chunked, columns):
        if is_list(column.type):
            lengths = pc.fill_null(pc.list_value_length(column), 0)
            parents, column = np.repeat(np.arange(num_rows), np.asarray(lengths)), _chunked(pc.list_flatten(column))
        else:
            parents = np.arange(num_rows)
        rows.append(parents[np.asarray(column.is_valid())])
        texts.append(column.drop_null().cast(pa.string()))
    row = np.concatenate(rows)
    values = pa.chunked_array([chunk for column in texts for chunk in column.chunks], type=pa.string())
    if len(columns) > 1:
        order = np.argsort(row, kind="stable")
        row, values = row[order], values.take(pa.array(order))
    offsets = np.searchsorted(row, np.arange(num_rows + 1)).astype(np.int32)
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(offsets), values.combine_chunks())], type=CAPTIONS)


def extra_type(kind: pa.DataType) -> pa.DataType:
    """The type under which an extra column of this type is returned: a second image as large_binary, text as string, lists as list, all else as it is."""
    if pa.types.is_struct(kind) and is_image(kind):
        return IMAGE
    if pa.types.is_dictionary(kind):
        return extra_type(kind.value_type)
    if is_list(kind):
        return pa.list_(extra_type(kind.value_type))
    return pa.string() if is_text(kind) else IMAGE if is_bytes(kind) else kind


def extra_column(column: Column) -> pa.ChunkedArray:
    """A column as ``extra_type`` of its type."""
    column = _chunked(column)
    if pa.types.is_struct(column.type) and is_image(column.type):
        return image_column(column)
    return column.cast(extra_type(column.type))


def _chunked(column: Column) -> pa.ChunkedArray:
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
