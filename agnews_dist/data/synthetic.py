"""Generated headlines with the four classes and the length distribution of AG News; needs neither file nor network.

Every text belongs to one split, for any seed and number of rows, so splits never share a text. The classes share names, places
and sentences, and differ in topic words. Some rows mix two topics, so no model can reach 100 %.
"""

import zlib
from bisect import bisect
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from random import Random
from string import Formatter

CLASS_NAMES = ("World", "Sports", "Business", "Sci/Tech")
SPLITS = ("train", "validation", "test")

_NEIGHBOURS = ((2, 1, 3), (0, 2, 0), (3, 0, 3), (2, 2, 0))
"""Second topics of an ambiguous row, by class: elections move markets, gadgets make profits."""
_AMBIGUOUS_SHARE = 0.11
_CLEAR, _AMBIGUOUS = 0.93, 0.52
"""Share of the topical phrases that come from the row's own class."""
_NEUTRAL = 0.3
"""Share of the phrases that belong to no class."""
_QUANTILES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1)
_LENGTHS = (18, 24, 30, 34, 39, 43, 46, 50, 53, 56, 61, 69, 79, 93, 106, 119, 135, 202, 323)
"""Lengths of AG News' texts in GPT-2 tokens at these quantiles."""
_LETTERS_PER_TOKEN = 4.6
"""Measured with GPT-2's tokenizer on this text."""


def _read_vocabulary() -> dict[str, tuple[str, ...]]:
    """Read the phrases by section.

    A section of the file is `key: phrase|phrase|...`; indented lines continue it. A field in braces is replaced by a phrase of
    that section, or of `topic.field`; `{2-90}` by a number of that range.
    """
    text = files("agnews_dist.data").joinpath("vocabulary.txt").read_text(encoding="utf-8")
    sections = (section.partition(": ") for section in text.replace("\n  ", "").splitlines())
    return {key: tuple(phrases.split("|")) for key, _, phrases in sections}


_PHRASES = _read_vocabulary()


def _draw(rng: Random, options: Sequence[str]) -> str:
    # Python guarantees the numbers of `random()` across versions, but not those of `choice`.
    return options[_draw_integer(rng, 0, len(options) - 1)] if len(options) > 1 else options[0]


def _draw_integer(rng: Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))


@cache
def _parse(template: str) -> list[tuple[str, str | None]]:
    """Split a template into (literal text, field after it or None). Parsing costs more than filling, so it is cached."""
    return [(literal, field) for literal, field, _, _ in Formatter().parse(template)]


def _fill(rng: Random, template: str, topic: Callable[[], str]) -> str:
    """Replace the fields of a template: ranges by numbers, others by phrases, which can have fields themselves."""
    pieces: list[str] = []
    for literal, field in _parse(template):
        pieces.append(literal)
        if field is None:
            continue
        if field[0].isdigit():
            low, high = field.split("-")
            pieces.append(str(_draw_integer(rng, int(low), int(high))))
        else:
            phrases = _PHRASES[field] if field in _PHRASES else _PHRASES[f"{topic()}.{field}"]
            pieces.append(_fill(rng, _draw(rng, phrases), topic))
    return "".join(pieces)


def _capitalise(clause: str) -> str:
    return clause if clause.startswith("quot;") else clause[:1].upper() + clause[1:]


def _draw_length(rng: Random) -> float:
    """Draw a length in tokens from the distribution of AG News."""
    share = rng.random()
    right = min(bisect(_QUANTILES, share), len(_QUANTILES) - 1)
    low, high = _QUANTILES[right - 1], _QUANTILES[right]
    return _LENGTHS[right - 1] + (share - low) / (high - low) * (_LENGTHS[right] - _LENGTHS[right - 1])


def _write_text(rng: Random, label: int) -> str:
    """Write a headline and its description, joined by a space as in AG News."""
    own_share = _AMBIGUOUS if rng.random() < _AMBIGUOUS_SHARE else _CLEAR
    neighbour = _NEIGHBOURS[label][_draw_integer(rng, 0, 2)]

    def topic() -> str:
        if rng.random() < _NEUTRAL:
            return "any"
        return CLASS_NAMES[label if rng.random() < own_share else neighbour]

    agency, city = _draw(rng, _PHRASES["agency"]), _draw(rng, _PHRASES["city"])
    dateline = _draw(rng, ("", "", f"({agency}) {agency} - ", f"{city.upper()} ({agency}) - ", f"{agency} - "))
    headline = _capitalise(_fill(rng, "{headline}", topic))
    mark = f" {_draw(rng, _PHRASES['emoji'])}" if rng.random() < 0.01 else ""
    text = beginning = f"{headline}{mark} {dateline}"
    num_letters = _draw_length(rng) * _LETTERS_PER_TOKEN
    sentences: list[str] = []
    while len(text) < num_letters:
        sentences.append(f"{_capitalise(_fill(rng, '{clause}', topic))}.")
        text = beginning + " ".join(sentences)
    if len(text) > num_letters * 1.1:
        # Descriptions in AG News are often cut off like this.
        text = f"{text[: int(num_letters)].rsplit(' ', 1)[0].rstrip(' ,.')} ..."
    return text.strip()


def generate(num_rows: int, seed: int, split: str) -> list[tuple[str, int]]:
    """Generate `num_rows` different texts with class indices; every four rows hold each class once, in random order.

    A seed gives the same rows on every machine, and fewer rows are a prefix of more. No text is in two splits, for any seeds.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    rng = Random(f"{seed}/{split}")
    seen: set[str] = set()
    rows: list[tuple[str, int]] = []
    labels: list[int] = []
    while len(rows) < num_rows:
        if not labels:
            labels = sorted(range(len(CLASS_NAMES)), key=lambda _: rng.random())
        text = _write_text(rng, labels[-1])
        # A checksum of the text decides its split.
        if zlib.crc32(text.encode()) % len(SPLITS) == SPLITS.index(split) and text not in seen:
            seen.add(text)
            rows.append((text, labels.pop()))
    return rows
