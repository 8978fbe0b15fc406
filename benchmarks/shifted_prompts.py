"""Prompts of documents for `benchmarks.shifted`: Python's own documentation, with facts to ask for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

__all__ = ["KINDS", "Prompt", "make_prompts"]

KINDS = ("continued", "unrelated", "one fact", "four facts")
"""continued: the prefix is the text in front of the document. unrelated: the prefix is of another text. In both, the
document goes on behind itself. one fact: an unrelated document has a fact, and a question asks for it. four facts: four
documents of different texts have one fact each, and a question asks for one of them."""

_PREFIX, _OTHER, _DOCUMENT, _QUARTER, _NEXT = 384, 200, 512, 256, 32  # tokens
_CITIES = ("Oslo", "Lima", "Cairo", "Perth", "Quito", "Dublin", "Nairobi", "Hanoi", "Geneva", "Austin", "Tokyo")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prefix, documents behind it, and a query behind those; token ids.

    other: the prefix behind which the documents were computed another time. fact: what the answer must begin with;
    empty where any answer will do.
    """

    kind: str
    prefix: list[int]
    other: list[int]
    documents: list[list[int]]
    query: list[int]
    fact: list[int]

    @property
    def tokens(self) -> list[int]:
        """Return the prefix and the documents."""
        return self.prefix + [token for document in self.documents for token in document]


def make_prompts(encode: Encode, count: int, *, seed: int = 0) -> Iterator[Prompt]:
    """Yield `count` prompts of each kind, in turn, the same for the same arguments.

    encode: a tokenizer without special tokens.
    """
    rng = random.Random(seed)
    least = _PREFIX + _DOCUMENT + _NEXT
    texts = [ids for ids in (encode(topics[name]) for name in sorted(topics)) if len(ids) >= least]
    for _ in range(count):
        for kind in KINDS:
            yield _make(kind, encode, texts, rng)


def _make(kind: str, encode: Encode, texts: list[list[int]], rng: random.Random) -> Prompt:
    count = 4 if kind == "four facts" else 1
    chosen = rng.sample(texts, count + 2)
    size = _DOCUMENT if count == 1 else _QUARTER
    pieces = [_piece(text, _PREFIX + size + _NEXT, rng) for text in chosen]
    prefix = pieces[0 if kind == "continued" else count][:_PREFIX]
    documents = [piece[_PREFIX : _PREFIX + size] for piece in pieces[:count]]
    query, fact = pieces[0][_PREFIX + size :], list[int]()
    if kind in ("one fact", "four facts"):
        cities = rng.sample(_CITIES, count)
        codes = [str(rng.randrange(1000, 10_000)) for _ in cities]
        documents = [
            _with_fact(document, encode(f"\n\nThe access code of the {city} office is {code}.\n\n"), rng)
            for document, city, code in zip(documents, cities, codes, strict=True)
        ]
        asked = rng.randrange(count)
        is_of = f"the access code of the {cities[asked]} office"
        query = encode(f"\n\nQuestion: What is {is_of}?\nAnswer: T{is_of[1:]} is")
        fact = encode(f" {codes[asked]}")
    return Prompt(
        kind=kind, prefix=prefix, other=pieces[count + 1][:_OTHER], documents=documents, query=query, fact=fact
    )


def _piece(text: list[int], size: int, rng: random.Random) -> list[int]:
    start = rng.randrange(len(text) - size + 1)
    return text[start : start + size]


def _with_fact(document: list[int], fact: list[int], rng: random.Random) -> list[int]:
    """Return a document of the same length that has a fact somewhere but in its first and last tenth."""
    kept = len(document) - len(fact)
    place = rng.randrange(kept // 10, kept - kept // 10)
    return document[:place] + fact + document[place:kept]
