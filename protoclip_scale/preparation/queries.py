"""Balancing by query: CLIP's data held at most 20,000 pairs for each of 500,000 queries (Radford et al. 2021, section 2.2).

A caption contains a query if the query's words stand in it one after another; words are runs of letters and digits, lower-cased.
"""

import hashlib
import re
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protoclip_scale.errors import UserError
from protoclip_scale.preparation.lists import Row, open_list

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class QueryIndex:
    """Finds the queries in a text: a table of word n-grams, and for each first word the lengths that occur, so a text costs its words times
    a few look-ups, whatever the number of queries."""

    def __init__(self, queries: Iterable[str]):
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        lengths: dict[str, set[int]] = {}
        for query in queries:
            query_words = words(query)
            name = " ".join(query_words)
            if name and name not in self._numbers:
                self._numbers[name] = len(self.names)
                self.names.append(name)
                lengths.setdefault(query_words[0], set()).add(len(query_words))
        self._lengths = {first: tuple(sorted(found)) for first, found in lengths.items()}

    def __len__(self) -> int:
        return len(self.names)

    def find(self, captions: Iterable[str]) -> list[int]:
        """Numbers of the queries that any caption contains, each once, ascending."""
        found = set()
        for caption in captions:
            caption_words = words(caption)
            for place, word in enumerate(caption_words):
                for length in self._lengths.get(word, ()):
                    number = self._numbers.get(" ".join(caption_words[place : place + length]))
                    if number is not None:
                        found.add(number)
        return sorted(found)


class Balance(NamedTuple):
    """``keep`` bool [rows]; ``matched`` and ``kept`` int64 [queries]: rows that contain each query, before and after; ``unmatched``: rows
    with none."""

    keep: np.ndarray
    matched: np.ndarray
    kept: np.ndarray
    unmatched: int


def read_queries(path: Path) -> QueryIndex:
    """One query a line. UserError if there is none."""
    if not path.is_file():
        raise UserError(f"--queries {path} is not a file; give a text file with one query a line")
    with open_list(path) as lines:
        index = QueryIndex(lines)
    if not len(index):
        raise UserError(f"--queries {path}: no line holds a word; write one query a line")
    return index


def balance(rows: Iterable[Row], index: QueryIndex, max_per_query: int, keep_unmatched: bool, scratch: Path) -> Balance:
    """Which rows stay. In an order made by a hash of url and captions, a row stays if any of its queries has fewer than ``max_per_query``
    rows, and then counts for all of its queries; so the choice does not depend on the order of the list.

    One pass over ``rows``, then one over the numbers found; those (4 bytes each) lie in a file in ``scratch``.
    """
    file = scratch / "matches.int32"
    counts, keys = array("i"), array("Q")
    with file.open("wb") as matches:
        for row in rows:
            found = index.find(row.captions)
            matches.write(np.array(found, dtype=np.int32))
            counts.append(len(found))
            keys.append(_key(row))
    ends = np.cumsum(counts, dtype=np.int64)
    order = np.argsort(np.frombuffer(keys, dtype=np.uint64), kind="stable")
    numbers = np.asarray(np.memmap(file, dtype=np.int32, mode="r")) if len(ends) and ends[-1] else np.empty(0, np.int32)
    keep = np.zeros(len(ends), dtype=bool)
    kept = np.zeros(len(index), dtype=np.int64)
    unmatched = 0
    for row in order:
        queries = numbers[ends[row] - counts[row] : ends[row]]
        if not len(queries):
            unmatched += 1
            keep[row] = keep_unmatched
        elif kept[queries].min() < max_per_query:
            kept[queries] += 1
            keep[row] = True
    matched = np.bincount(numbers, minlength=len(index))
    file.unlink()
    return Balance(keep, matched, kept, unmatched)


def _key(row: Row) -> int:
    text = "\n".join((row.url, *row.captions))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")
