"""What a task is, and how its prompt pairs are fitted to a tokenizer.

Three things must hold for every pair, under the tokenizer that will read it: both prompts have the
same number of tokens; after each of them answer and foil are one token each, and not the same; and
that token leaves the prompt's own tokens as they are. Words that cannot meet this are left out
before, pairs that do not are drawn again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from stratoscope.errors import InputError
from stratoscope.models.text import token_text

T = TypeVar("T")
DRAWS = 40  # how often to draw for each pair asked for, before repeating those found


class Pair(NamedTuple):
    """One example as text; answer and foil are what follows the prompt, with the space before them
    if there is one."""

    clean: str
    corrupt: str
    answer: str
    foil: str


@dataclass(frozen=True)
class Task:
    """n prompt pairs, and the two tokens compared after each.

    clean, corrupt: prompts (or, where text would not keep its tokens, ids); pair by pair of equal
    token length. answers, foils: one token each, as read; answer_ids, foil_ids: the same as ids.
    chance: accuracy of a guesser who does not read the prompt. story: what is asked, how the
    corrupt prompt differs, and what accuracy does not show.
    """

    name: str
    clean: tuple[str, ...] | tuple[tuple[int, ...], ...]
    corrupt: tuple[str, ...] | tuple[tuple[int, ...], ...]
    answers: tuple[str, ...]
    foils: tuple[str, ...]
    answer_ids: tuple[int, ...]
    foil_ids: tuple[int, ...]
    chance: float
    story: str
    source: str

    def __len__(self) -> int:
        return len(self.clean)


def fitted(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int,
    draw: Callable[[random.Random], Pair],
    *,
    story: str,
    source: str,
    chance: float = 0.5,
) -> Task:
    """Draw until n different pairs fit the tokenizer; repeat some of them if there are not as many.

    Raises InputError when n is below 1, or when no pair fits.
    """
    generator, reason = new_generator(name, n, seed), ""
    fitting: dict[tuple[str, str], tuple[int, int]] = {}
    for _ in range(DRAWS * n + 200):
        pair = draw(generator)
        ids, wrong = _ids(tokenizer, pair)
        if ids is None:
            reason = wrong
        else:
            fitting.setdefault((pair.clean, pair.corrupt), ids)
        if len(fitting) == n:
            break
    if not fitting:
        raise InputError(
            f"{name}: no prompt pair fits this tokenizer. {reason} Use another task for this model."
        )
    rows = [(*prompts, *ids) for prompts, ids in fitting.items()]
    return made(
        name, tokenizer, rows + generator.choices(rows, k=n - len(rows)), story, source, chance
    )


def made(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple],
    story: str,
    source: str,
    chance: float = 0.5,
) -> Task:
    """A Task from rows of (clean, corrupt, answer id, foil id)."""
    clean, corrupt, answers, foils = (tuple(column) for column in zip(*rows))
    texts = (tuple(token_text(tokenizer, i) for i in ids) for ids in (answers, foils))
    return Task(
        name, clean, corrupt, *texts, answers, foils, chance, " ".join(story.split()), source
    )


def new_generator(name: str, n: int, seed: int) -> random.Random:
    """The generator of one task: the same for the same seed. Raises InputError when n is below
    1."""
    if n < 1:
        raise InputError(f"{name}: {n} prompt pairs were asked for; ask for at least one.")
    return random.Random(f"{name} {seed}")


def one_token(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], what: str, *, need: int = 2
) -> list[str]:
    """Those words that are one known token after a space. Raises InputError when fewer than `need`
    are left."""
    single = [word for word in words if next_token(tokenizer, "the", f" {word}") is not None]
    return enough(single, words, what, need)


def enough(usable: list[T], given: Sequence, what: str, need: int) -> list[T]:
    """`usable` as it is. Raises InputError, naming the list as `what`, when it has fewer than
    `need`."""
    if len(usable) < need:
        raise InputError(
            f"{what}: {len(usable)} of {len(given)} are single tokens under this tokenizer, and "
            f"{need} are needed. "
            f"Use a tokenizer with more whole words, or another task."
        )
    return usable


def next_token(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> int | None:
    """The token that continues the prompt so, if it is one known token and the prompt's own tokens
    stay; else None."""
    before, after = tokens(tokenizer, prompt), tokens(tokenizer, prompt + continuation)
    known = after[-1:] != [tokenizer.unk_token_id] and after[:-1] == before
    return after[-1] if known and len(after) == len(before) + 1 else None


def tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """The ids of a text, without the special tokens around it. Raises InputError when the tokenizer
    cannot read it."""
    try:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as error:  # tokenizers has no error class of its own
        raise InputError(
            f"this tokenizer cannot read {text!r}: {error}. Use another task for this model."
        ) from error


def _ids(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> tuple[tuple[int, int] | None, str]:
    """Answer and foil as ids if the pair fits; else None and what is wrong with it."""
    clean, corrupt = (tokens(tokenizer, prompt) for prompt in (pair.clean, pair.corrupt))
    if tokenizer.unk_token_id in (*clean, *corrupt):
        return None, f"Of {pair.clean!r} some words are unknown to it."
    if len(clean) != len(corrupt):
        return None, f"{pair.clean!r} has {len(clean)} tokens, {pair.corrupt!r} {len(corrupt)}."
    ids: list[int] = []
    for word in (pair.answer, pair.foil):
        token = next_token(tokenizer, pair.clean, word)
        if token is None or token != next_token(tokenizer, pair.corrupt, word):
            return None, f"{word!r} is not one token after {pair.clean!r}."
        ids.append(token)
    if ids[0] == ids[1]:
        return None, f"{pair.answer!r} and {pair.foil!r} are the same token after {pair.clean!r}."
    return (ids[0], ids[1]), ""
