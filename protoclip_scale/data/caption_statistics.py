"""How long, how many and how varied the captions of a sample of rows are, and what the tokenizer cuts off."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from protoclip_scale.data.captions import CHOICES, clean_caption
from protoclip_scale.data.samples import draw_sample, read_sample
from protoclip_scale.data.sources import BlockReader

NUM_REPEATED = 3
# The texts of a row that can train, by ``data.caption``, from its cleaned captions.
_TEXTS: dict[str, Callable[[list[str]], list[str]]] = {
    "first": lambda cleaned: cleaned[:1],
    "random": lambda cleaned: cleaned,
    "join": lambda cleaned: [CHOICES["join"](cleaned, None)] if cleaned else [],
}


@dataclass(frozen=True)
class Spread:
    """Of one number per item."""

    mean: float
    median: float
    percentile_95: float
    maximum: float

    def __str__(self) -> str:
        return f"mean {self.mean:,.1f}, median {self.median:,.0f}, 95% at most {self.percentile_95:,.0f}, most {self.maximum:,.0f}"


def spread(values: Sequence[float]) -> Spread:
    """All zero for no values."""
    if not len(values):
        return Spread(0.0, 0.0, 0.0, 0.0)
    return Spread(float(np.mean(values)), *(float(value) for value in np.quantile(values, [0.5, 0.95, 1.0], method="higher")))


@dataclass(frozen=True)
class CaptionStatistics:
    """Of sampled rows. Shares are in [0, 1]; words and tokens are of the texts that can train, start and end tokens included and before any is cut."""

    rows: int
    empty_share: float  # rows without any text
    captions_per_row: Spread  # those with text
    texts: int  # that can train: one a row, with caption: random all of them
    words: Spread
    tokens: Spread
    context_length: int
    cut_share: float  # texts with more tokens than that
    distinct_share: float  # different texts among all
    repeated: tuple[tuple[str, int], ...]  # the commonest texts that occur more than once, with how often

    def table(self) -> list[tuple[str, str]]:
        """(label, text) for a table."""
        repeated = "; ".join(f"{_shortened(text)} ({times} times)" for text, times in self.repeated)
        return [
            ("rows sampled", f"{self.rows:,}"),
            ("rows without a caption", f"{self.empty_share:.1%}"),
            ("captions of a row", str(self.captions_per_row)),
            ("words", str(self.words)),
            ("tokens", str(self.tokens)),
            (f"cut at {self.context_length} tokens", f"{self.cut_share:.1%}"),
            ("different texts", f"{self.distinct_share:.1%} of {self.texts:,}"),
            *([("most repeated", repeated)] if repeated else []),
        ]


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def caption_statistics(captions: Iterable[list[str]], tokenizer, how: str = "first") -> CaptionStatistics:
    """Statistics of rows' captions, as they would train with ``data.caption`` ``how``. CLIP's tokenizer takes about 50 microseconds a text."""
    cleaned = [[text for text in map(clean_caption, row) if text] for row in captions]
    texts = [text for row in cleaned for text in _TEXTS[how](row)]
    tokens = np.array(tokenizer.num_tokens(texts), dtype=np.int64)
    counts = Counter(texts)
    return CaptionStatistics(
        rows=len(cleaned),
        empty_share=sum(not row for row in cleaned) / max(1, len(cleaned)),
        captions_per_row=spread([len(row) for row in cleaned]),
        texts=len(texts),
        words=spread([len(text.split()) for text in texts]),
        tokens=spread(tokens),
        context_length=tokenizer.context_length,
        cut_share=float(np.mean(tokens > tokenizer.context_length)) if len(tokens) else 0.0,
        distinct_share=len(counts) / max(1, len(texts)),
        repeated=tuple((text, times) for text, times in counts.most_common(NUM_REPEATED) if times > 1),
    )


def sample_captions(readers: Sequence[BlockReader], rows: int = 2000, seed: int = 0) -> list[list[str]]:
    """Captions of a seeded sample of rows; reads the captions of few blocks of each source (see ``draw_sample``), no images."""
    return [captions or [] for _, table in read_sample(readers, draw_sample(readers, rows, seed), images=False) for captions in table["captions"].to_pylist()]
