"""Labelled headlines made on the spot: the four classes and the length distribution of AG News, without a file or network.

Every text belongs to exactly one split, whatever the seed and the number of rows, so splits can never leak into each other.
The classes share names, places and sentences and differ in topic words; some rows are about two topics, so that no model
can get all of them right.
"""

import zlib
from bisect import bisect
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from string import Formatter

from agnews_dist.data import vocabulary as words

CLASS_NAMES = ("World", "Sports", "Business", "Sci/Tech")
SPLITS = ("train", "validation", "test")

_TOPICS = (words.WORLD, words.SPORTS, words.BUSINESS, words.SCITECH)
# Which other class an ambiguous row leans to: elections move markets, gadgets make profits.
_NEIGHBOURS = ((2, 1, 3), (0, 2, 0), (3, 0, 3), (2, 2, 0))
_AMBIGUOUS_SHARE = 0.11
_CLEAR, _AMBIGUOUS = 0.93, 0.52
"""Share of the topical phrases that come from the row's own class."""
_NEUTRAL = 0.3
"""Share of the phrases that belong to no class."""
# Quantiles of AG News' lengths in GPT-2 tokens, and the lengths there.
_SHARES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1)
_LENGTHS = (18, 24, 30, 34, 39, 43, 46, 50, 53, 56, 61, 69, 79, 93, 106, 119, 135, 202, 323)
_CLAUSES = (
    "{who} {did} {what} {where}",
    "{who} {did} {what}, {who} said {when}",
    "{who} {did} {what}",
    "{who} {did} {what} and {did} {what}",
    "{what} {where} could decide the future of {what}, according to {who}",
    "{who}, who {did} {what} {where}, {did} {what}",
    "according to {who}, {who} {did} {what}",
    "it was the {ordinal} time that {who} {did} {what} {where}",
    "{when} {who} {did} {what} {where}",
    "{who} said it had {did} {what}",
    "quot;We have seen {what}, quot; said {name}",
    "{who} #39;s view of {what} {where} was not shared by {who}",
)
_HEADLINES = (
    "{who} {did} {what}",
    "{what}: {who} {did} {what}",
    "{who} and {who} in {city}",
    "{did} {what}, {who} says",
    "{name}: {what} {where}",
    "Update {digit}: {who} {did} {what}",
    "{who} {where}",
)


def _draw(rng: Random, options: Sequence[str]) -> str:
    # `random()` alone is promised to give the same numbers in every Python version; `choice` is not.
    return options[int(rng.random() * len(options))]


def _integer(rng: Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))


_FILLERS: dict[str, Callable[[Random], str]] = {
    "city": lambda rng: _draw(rng, words.CITIES),
    "country": lambda rng: _draw(rng, words.COUNTRIES),
    "surname": lambda rng: _draw(rng, words.SURNAMES),
    "name": lambda rng: f"{_draw(rng, words.FIRST_NAMES)} {_draw(rng, words.SURNAMES)}",
    "day": lambda rng: _draw(rng, words.DAYS),
    "month": lambda rng: _draw(rng, words.MONTHS),
    "when": lambda rng: f"on {_draw(rng, words.DAYS)}",
    "ordinal": lambda rng: _draw(rng, ("first", "second", "third", "fourth", "last")),
    "digit": lambda rng: str(_integer(rng, 1, 9)),
    "letter": lambda rng: _draw(rng, "ABCDEFGH"),
    "count": lambda rng: str(_integer(rng, 2, 90)),
    "percent": lambda rng: f"{_integer(rng, 0, 19)}.{_integer(rng, 1, 9)}",
    "score": lambda rng: f"{_integer(rng, 1, 6)}-{_integer(rng, 0, 5)}",
    "money": lambda rng: f"\\${_integer(rng, 1, 95)}.{_integer(rng, 0, 9)} {_draw(rng, ('million', 'billion'))}",
}


@cache
def _parts(template: str) -> list[tuple[str, str | None]]:
    """`template` as (literal text, field after it or None); kept, because parsing costs more than filling."""
    return [(literal, field) for literal, field, _, _ in Formatter().parse(template)]


def _fill(rng: Random, template: str, topic: Callable[[], words.Topic]) -> str:
    """Replace the fields of a clause by phrases, and the fields of those by names and numbers."""
    pieces: list[str] = []
    for literal, field in _parts(template):
        pieces.append(literal)
        if field in _FILLERS:
            pieces.append(_FILLERS[field](rng))
        elif field is not None:
            pieces.append(_fill(rng, _draw(rng, getattr(topic(), field)), topic))
    return "".join(pieces)


def _capital(clause: str) -> str:
    return clause if clause.startswith("quot;") else clause[:1].upper() + clause[1:]


def _length(rng: Random) -> float:
    """Tokens a text should have, from the quantiles of AG News."""
    share = rng.random()
    right = min(bisect(_SHARES, share), len(_SHARES) - 1)
    low, high = _SHARES[right - 1], _SHARES[right]
    return _LENGTHS[right - 1] + (share - low) / (high - low) * (_LENGTHS[right] - _LENGTHS[right - 1])


def _text(rng: Random, label: int) -> str:
    """One headline with its description, as AG News joins them: by a space."""
    is_ambiguous = rng.random() < _AMBIGUOUS_SHARE
    own_share = _AMBIGUOUS if is_ambiguous else _CLEAR
    neighbour = _NEIGHBOURS[label][_integer(rng, 0, 2)]

    def topic() -> words.Topic:
        if rng.random() < _NEUTRAL:
            return words.ANY
        return _TOPICS[label if rng.random() < own_share else neighbour]

    agency = _draw(rng, words.AGENCIES)
    dateline = _draw(
        rng, ("", "", f"({agency}) {agency} - ", f"{_draw(rng, words.CITIES).upper()} ({agency}) - ", f"{agency} - ")
    )
    headline = _capital(_fill(rng, _draw(rng, _HEADLINES), topic))
    mark = f" {_draw(rng, words.EMOJI)}" if rng.random() < 0.01 else ""
    text = f"{headline}{mark} {dateline}"
    # Letters per token of GPT-2's BPE on this text.
    room = _length(rng) * 4.6
    sentences: list[str] = []
    while len(text) < room:
        sentences.append(f"{_capital(_fill(rng, _draw(rng, _CLAUSES), topic))}.")
        text = f"{headline}{mark} {dateline}{' '.join(sentences)}"
    if len(text) > room * 1.1:
        # AG News' own descriptions are often cut off like this.
        text = f"{text[: int(room)].rsplit(' ', 1)[0].rstrip(' ,.')} ..."
    return text.strip()


def generate(num_rows: int, seed: int, split: str) -> list[tuple[str, int]]:
    """`num_rows` different texts with their class index; every four rows hold each class once, in random order.

    The same seed gives the same rows on every machine, and fewer rows are a prefix of more. No text of one split occurs in
    another, for any seeds.

    Raises:
        ValueError: `split` is none of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    home = SPLITS.index(split)
    rng = Random(f"{seed}/{split}")
    seen: set[str] = set()
    rows: list[tuple[str, int]] = []
    round_of_labels: list[int] = []
    while len(rows) < num_rows:
        if not round_of_labels:
            round_of_labels = sorted(range(len(CLASS_NAMES)), key=lambda _: rng.random())
        text = _text(rng, round_of_labels[-1])
        if zlib.crc32(text.encode()) % len(SPLITS) != home or text in seen:
            continue
        seen.add(text)
        rows.append((text, round_of_labels.pop()))
    return rows
