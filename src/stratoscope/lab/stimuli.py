"""Stimuli of a language localiser: sentences, word lists, jabberwocky and lists of non-words, all
of as many tokens.

    sentence     she put the old lamp on the table          words in order
    words        table old she walked the of green lamp     words of all sentences, dealt out anew
    jabberwocky  she put the drell thamp on the plosk       content words made up, the rest as it is
    nonwords     drell vorn thamp ip losk nurb plesh kag    made up, all of them

After Fedorenko et al. (2010, J. Neurophysiology 104, 1177-1194), with sentences of your own. A made
up word is in more pieces than a word, so that a list of twelve non-words is twice as long for a
model, and whatever tells it from a sentence may be length. Here every text has exactly `length`
tokens, and the last of them ends a word. Words are in lower case and nothing stands between them
but a space.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stratoscope.errors import InputError

CONDITIONS = ("sentence", "words", "jabberwocky", "nonwords")
# what holds a sentence together, and stays in jabberwocky
FUNCTION = frozenset(
    """a about above after again all also an and any are around as at away be because been before
    being below between both but by can could did do does down during each either else even ever
    every few for from had has have having he her here hers herself him himself his how however i if
    in into is it its itself just less many me might mine more most much must my myself neither no
    nor not now of off on once one only or other our ours out over own rather shall she should since
    so some such than that the their theirs them themselves then there these they this those though
    through to too toward towards under until up upon us very was we were what when where whether
    which while who whom whose why will with within without would yet you your yours""".split()
)
_ONSETS = (
    "b bl br c cl cr d dr f fl fr g gl gr h j k l m n p pl pr r s sk sl sm sn sp st str".split()
)
_ONSETS += "sw t th thr tr tw v w z".split()
_VOWELS = "a e i o u ai ea ee oa oo ou".split()
_CODAS = (
    "b ck d ft g ld lk lm lp lt m mp n nd ng nk nt p rb rd rk rm rn rp rt sh sk sp st t v".split()
)
_TRIES = 200  # draws of words until their tokens come out even


def conditions(
    tokenizer: Any, sentences: Sequence[str], n: int, *, length: int = 12, seed: int = 0
) -> dict[str, list[str]]:
    """`n` texts for each of CONDITIONS, each text of `length` tokens (those that a tokenizer puts
    around a text not counted).

    sentences: running text in words; of each, in the order of a shuffle, the beginning is taken
    whose tokens come out even, once. No made up word is one of their words. Raises InputError when
    fewer than `n` of them have such a beginning, saying how many have.
    """
    if n < 1 or length < 4:
        raise InputError(
            f"n={n} texts of length={length} tokens: give at least one text, of four tokens."
        )
    generator = random.Random(f"stimuli {seed}")
    rows = [spoken(text) for text in sentences]
    generator.shuffle(rows)
    known = frozenset(word for row in rows for word in row)
    fit = lambda words: _fitting(tokenizer, words, length)  # noqa: E731
    made: dict[str, list[str]] = {name: [] for name in CONDITIONS}
    for row in rows:
        if len(made["sentence"]) == n:
            break
        other = _first(fit, lambda row=row: (_disguised(w, known, generator) for w in row))
        if (text := fit(iter(row))) and other:
            made["sentence"].append(text)
            made["jabberwocky"].append(other)
    if (count := len(made["sentence"])) < n:
        raise InputError(
            f"{count} of {len(rows)} sentences have a beginning of {length} tokens that ends with "
            f"a word, and n={n}: give more sentences, longer ones, or another length."
        )
    words = [word for text in made["sentence"] for word in text.split(" ")]
    lists = {
        "words": lambda: iter(generator.sample(words, min(len(words), length))),
        "nonwords": lambda: (pseudoword(known, generator) for _ in range(length)),
    }
    for name, draw in lists.items():
        made[name] = [text for _ in range(n) if (text := _first(fit, draw))]
        if len(made[name]) < n:
            raise InputError(
                f"no {name} of exactly {length} tokens came out of {_TRIES} draws: the tokens of "
                "this tokenizer are too long, give a larger length."
            )
    return made


def spoken(text: str) -> list[str]:
    """The words of a text in lower case, without what stands between them."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("\u2019", "'"))


def pseudoword(known: frozenset[str], generator: random.Random) -> str:
    """A pronounceable word of one or two syllables that is none of the known ones."""
    while True:
        open_syllables = generator.choice((0, 0, 1))
        parts = (_ONSETS, _VOWELS) * (open_syllables + 1) + (_CODAS,)
        word = "".join(map(generator.choice, parts))
        if word not in known and word not in FUNCTION:
            return word


def _disguised(word: str, known: frozenset[str], generator: random.Random) -> str:
    return word if word.partition("'")[0] in FUNCTION else pseudoword(known, generator)


def _first(fit: Callable[[Iterator[str]], str], draw: Callable[[], Iterator[str]]) -> str:
    """The first of some draws that fits, or ""."""
    return next((text for _ in range(_TRIES) if (text := fit(draw()))), "")


def _fitting(tokenizer: Any, words: Iterator[str], length: int) -> str:
    """The first words that are `length` tokens together, or "" when no beginning is."""
    text = ""
    for word in words:
        text = f"{text} {word}".strip()
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if count >= length:
            return text if count == length else ""
    return ""
