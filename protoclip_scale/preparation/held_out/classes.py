"""From what a source calls its classes to the classes of a task: by name, or by order where the published protocol is an order. Never by guess."""

import re
from collections.abc import Mapping, Sequence

from protoclip_scale.errors import UserError

SHOWN = 3


def plain(name: str) -> str:
    """A name without case and punctuation."""
    return " ".join(re.sub(r"[\W_]+", " ", name.casefold()).split())


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts numbers in names by their value: 2 before 10, whatever their zeros."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def class_of_label(labels: Sequence[str], classes: Sequence[str], words: Mapping[str, Sequence[str]], match: str, skip_others: bool, name: str) -> dict[str, str]:
    """{label: class} for the distinct labels of a source; labels that are no class are left out with ``skip_others``.

    names: a label is a class, or called like one or like its words (``plain``). order: as many labels as classes; the n-th is the n-th class, unless it has another
    class's name. Raises UserError for what does not fit.
    """
    distinct = sorted(set(labels))
    by_name: dict[str, str | None] = {}
    for own in classes:
        for word in {own, *words.get(own, ())}:
            by_name[plain(word)] = None if plain(word) in by_name and by_name[plain(word)] != own else own  # None: two classes are called so
    named = {label: label if label in set(classes) else by_name.get(plain(label)) for label in distinct}
    if match == "order":
        return _by_order(distinct, classes, named, name)
    unknown = [label for label in distinct if named[label] is None]
    if unknown and not skip_others:
        raise UserError(f"{name}: {_some(unknown)} {'is' if len(unknown) == 1 else 'are'} none of its {len(classes)} classes; rename the folders or labels like the classes in its task file")
    found = {label: own for label, own in named.items() if own is not None}
    if len(set(found.values())) < len(found):
        raise UserError(f"{name}: two of {_some(sorted(found))} are called like one class; keep one")
    return found


def _by_order(distinct: list[str], classes: Sequence[str], named: Mapping[str, str | None], name: str) -> dict[str, str]:
    if len(distinct) != len(classes):
        raise UserError(f"{name}: {len(distinct)} classes ({_some(distinct)}) where there must be {len(classes)}; its classes are told by the order of the folders or labels, so none may lack")
    matched = dict(zip(sorted(distinct, key=natural) if all(label.isdigit() for label in distinct) else distinct, classes, strict=True))
    for label, own in matched.items():
        if named[label] is not None and named[label] != own and not label.isdigit():
            raise UserError(f"{name}: {label!r} stands where {own!r} must be in the order of the classes; a folder or label before it lacks, or is called otherwise")
    return matched


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
