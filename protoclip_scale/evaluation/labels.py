"""Opening a held-out set's source, and what the values of its class columns say: names as they stand, or numbers with names."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from protoclip_scale.data.captions import clean_caption
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.errors import UserError
from protoclip_scale.recipe.names import nearest
from protoclip_scale.recipe.schema import EvaluationSet, Source

NO_CAPTION = " "  # a column of this name is never read


def open_source(settings: EvaluationSet, label_columns: Sequence[str], root: str, retry_seconds: float) -> BlockReader:
    """The set's reader, which brings the label columns with each row (but for a caption column that is a label, too)."""
    given = settings.columns.model_dump(exclude_unset=True)
    captioned = settings.columns.caption != ""
    columns = given | {"caption": given.get("caption") or NO_CAPTION} if not captioned else dict(given)
    values = {"files": settings.files, "hub": settings.hub, "revision": settings.revision, "config": settings.config, "name": settings.name, "columns": columns}
    values |= {"split": settings.split or "test"} if settings.hub else {}
    values |= {"format": settings.format} if settings.format else {}
    try:
        caption = Source(**values).columns.captions if captioned else ()
        extra = tuple(column for column in label_columns if column not in caption)
        source = Source(**values | {"columns": columns | {"extra": extra}})
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, data.sources ").removeprefix(f"{settings.name}: ")
        raise UserError(f"evaluation set {settings.name} (classify or exclude): {reason}") from error
    if not captioned:
        source = source.model_copy(update={"columns": source.columns.model_copy(update={"caption": ()})})
    try:
        return BlockReader(source, root, retry_seconds)
    except UserError as error:
        message = re.sub(r"columns\.extra of source", "classify or exclude of evaluation set", str(error))
        raise UserError(message) from error


def text_of(value: Any) -> str:
    """A caption or class name as it counts; "" for none."""
    return "" if value is None else clean_caption(str(value))


class Labels:
    """The class names in a column of a reader. Numbers stand for ``label_names``, or for the names that the files carry; without either for themselves."""

    def __init__(self, settings: EvaluationSet, reader: BlockReader, column: str):
        self.settings, self.column = settings, column
        self.names = settings.label_names or reader.class_names(column)

    def __call__(self, values: Sequence[Any]) -> list[str]:
        """The names of some rows, "" where there is none. UserError for a number without a name."""
        return [self._name(value) for value in values]

    def _name(self, value: Any) -> str:
        if not self.names or isinstance(value, (str, bytes)) or value is None:
            return text_of(value)
        if value == -1:  # of `datasets`: no label
            return ""
        if isinstance(value, int) and 0 <= value < len(self.names):
            return self.names[value]
        raise UserError(f"evaluation set {self.settings.name}: {value} in column {self.column!r} is no number of its {len(self.names)} label names, 0 to {len(self.names) - 1}; correct label_names")


def check_classes(settings: EvaluationSet, column: str, names: Sequence[str]) -> None:
    """UserError if a row's class is none of the set's ``classes``."""
    if settings.classes and (unknown := sorted(set(names) - {*settings.classes, ""})):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        near = nearest(unknown[0], settings.classes)
        raise UserError(
            f"evaluation set {settings.name}: {unknown[0]!r}{more} in column {column!r} is none of its {len(settings.classes)} classes{near if '?' in near else '; '}"
            f"{' ' if '?' in near else ''}give the names of numbers in label_names, or prepare the data with tools/prepare_evaluation.py"
        )
