"""Names of features: ``KIND`` of the main image or text, ``KIND@VIEW`` of another view of the rows; ``image``, ``text@eda``, ``simclr@ssl_a``."""

from collections.abc import Iterable
from typing import NamedTuple

MAIN = ""


class Feature(NamedTuple):
    """``kind``: what is computed; ``view``: of which view of the rows, '' for the main one."""

    kind: str
    view: str = MAIN

    @property
    def name(self) -> str:
        return f"{self.kind}@{self.view}" if self.view else self.kind


def parse(name: str) -> Feature:
    """The parts of a feature's name."""
    kind, _, view = name.partition("@")
    return Feature(kind, view)


def kinds_of(names: Iterable[str]) -> frozenset[str]:
    return frozenset(parse(name).kind for name in names)
