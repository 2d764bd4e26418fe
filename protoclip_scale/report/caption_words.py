"""One word that tells a group of captions from others."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

WORD = re.compile(r"[^\W\d_]{2,}")


def telling_words(groups: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """For each group of captions the word with the largest n * n / N: n of its captions have it, N of all groups' captions. So neither "the", which all
    have, nor a name that stands in one caption wins. Ties go to the first in the alphabet; groups without a word are left out."""
    counts = {group: Counter(word for caption in captions for word in set(WORD.findall(caption.lower()))) for group, captions in groups.items()}
    total = sum(counts.values(), Counter())
    return {group: min(found, key=lambda word: (-found[word] ** 2 / total[word], word)) for group, found in counts.items() if found}
