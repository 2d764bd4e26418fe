"""From the cells of text tables to typed columns, and to the table that every read returns."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from protoclip_scale.data.sources.columns import is_extra
from protoclip_scale.data.sources.formats import CAPTIONS, Images, Place, SourceLimits
from protoclip_scale.data.sources.image_files import ImageRoot
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

# Text of which a number says all: 007 and a number of 20 digits are strings, and stay what they are.
INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
NUMBER = r"^(0|-?[1-9][0-9]{0,14}|-?(0|[1-9][0-9]{0,14})(\.[0-9]+([eE][+-]?[0-9]{1,2})?|[eE][+-]?[0-9]{1,2}))$"
PATTERNS = {pa.int64(): INTEGER, pa.float64(): NUMBER}
LADDER = (pa.null(), pa.int64(), pa.float64(), pa.string())


def text_cells(cells: Sequence[str]) -> pa.Array:
    """Cells of a text table; an empty one is a null."""
    return pa.array([cell or None for cell in cells], pa.string())


def text_type(cells: Sequence[str], known: pa.DataType) -> pa.DataType:
    """The first type of LADDER, from ``known`` on, that holds all cells without a loss."""
    if known == pa.string():
        return known
    cells = text_cells(cells).drop_null()
    if not len(cells):
        return known
    for kind in LADDER[max(1, LADDER.index(known)) : -1]:
        if pc.all(pc.match_substring_regex(cells, PATTERNS[kind])).as_py():
            return kind
    return pa.string()


def value_type(values: Sequence[Any], known: pa.DataType) -> pa.DataType | None:
    """The type that holds JSON values and ``known``: a string, number or truth value, or a list of one of them; None if there is no such
    type."""
    try:
        return merged_type(known, _array(values).type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None


def typed(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """JSON values as a column of the type that ``value_type`` found for them and others."""
    return _array(values).cast(kind, safe=False)  # a large whole number beside fractions is rounded


def _array(values: Sequence[Any], kind: pa.DataType | None = None) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # JSON can name halves of characters
        return pa.array([_whole_characters(value) for value in values], kind)


def _whole_characters(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole_characters(one) for one in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def merged_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type of both: null gives way, whole numbers become doubles beside doubles; None if they contradict each other."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = merged_type(one.value_type, other.value_type)
        return None if inner is None else pa.list_(inner)
    return None


def merged_text_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type of LADDER that holds the cells of both."""
    return max(one, other, key=LADDER.index)


def is_plain(kind: pa.DataType) -> bool:
    """Whether an extra column may have the type: a scalar, or a list of scalars."""
    kind = kind.value_type if pa.types.is_list(kind) else kind
    return not pa.types.is_nested(kind)


def name_of(value: Any) -> str:
    """What JSON calls the kind of a value."""
    names = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return names[type(value)]


def assemble(
    source: schema.Source,
    names: Sequence[str | None],
    captions: Sequence[Sequence[str]] | pa.Array | pa.ChunkedArray,
    extras: dict[str, pa.Array | pa.ChunkedArray],
    root: ImageRoot,
    images: Images,
    limits: SourceLimits,
) -> pa.Table:
    """The table that ``Format.read`` returns, of rows whose images are files; they are read only with ``images``, and only those of the rows that it names."""
    wanted = names if isinstance(images, bool) else [name if row in images else None for row, name in enumerate(names)]
    columns: dict[str, Any] = {"image": root.read_images(wanted, limits.max_bytes)} if images else {}
    columns["captions"] = captions if isinstance(captions, (pa.Array, pa.ChunkedArray)) else _array(captions, CAPTIONS)
    return pa.table(columns | {name: extras[name] for name in source.columns.extra})


def check_extra(columns: pa.Schema, place: Place, source: schema.Source) -> None:
    """UserError if an extra column of a parquet file has a type that is not read."""
    for name in source.columns.extra:
        kind = columns.field(name).type
        if not is_extra(kind):
            raise UserError(f"column {name!r} of {place.url} is {kind}; columns.extra takes neither maps nor lists of images: leave it out")


def check_names(present: Sequence[str], place: Place, source: schema.Source, hint: str = "") -> None:
    """UserError if one of the source's columns is not among those present."""
    columns = source.columns
    for key, names in (("image", (columns.image,)), ("caption", columns.captions), ("extra", columns.extra)):
        for name in names:
            if name not in present:
                there = ", ".join(repr(column) if column != column.strip() or not column else column for column in present[:50])
                raise UserError(
                    f"{place.url} has no column {name!r} (columns.{key} of source {source.label!r}); its columns are {there}{hint}"
                )
