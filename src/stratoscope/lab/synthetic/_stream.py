"""What a stream is, and how its rows are kept apart by split.

A row belongs to the test, to validation or to training by a hash of its own tokens, whatever the
seed: no row of one split is ever met in another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stratoscope.engine.train import generator
from stratoscope.errors import InputError
from stratoscope.lab.tasks import Task

NO_TARGET = -100
_PARTS = {"test": (0,), "validation": (1,), "train": tuple(range(2, 10))}  # of ten


@dataclass(frozen=True)
class Stream:
    """Rows of `length` token ids below `vocab`, all drawn anew.

    draw(generator, n): (row, position) ids, all that there is to say about a row. queried:
    (position,) where the token is a target, to be told from those before it. best(ids): (row,
    position, vocab) probabilities of the token that follows each position, by the best predictor;
    only what stands before a target counts. pair(ids, generator): one row as clean and corrupt
    prompt, answer and foil. chance: accuracy at the targets of a guesser who does not read. story:
    what is queried and what it does not show. source: who used it.
    """

    name: str
    seed: int
    split: str
    vocab: int
    length: int
    queried: Bool[Tensor, " position"]
    chance: float
    story: str
    source: str
    draw: Callable[[torch.Generator, int], Tensor]
    best: Callable[[Tensor], Tensor]
    pair: Callable[[Tensor, torch.Generator], tuple[list[int], list[int], int, int]]

    def batch(self, step: int, size: int) -> dict[str, Tensor]:
        """input_ids and labels, (row, position) each, of this step: a label stands at its own
        token, -100 where none is queried. Raises InputError when the split has too few different
        rows."""
        ids = self.rows(size, generator(self.seed, step))
        return {"input_ids": ids, "labels": ids.masked_fill(~self.queried, NO_TARGET)}

    def rows(self, n: int, generator: torch.Generator) -> Int[Tensor, "row position"]:
        """n rows of this split."""
        parts: list[Tensor] = []
        for _ in range(100):
            drawn = self.draw(generator, 2 * n + 16)
            parts += [drawn[_in_split(drawn, self.split)]]
            if sum(map(len, parts)) >= n:
                return torch.cat(parts)[:n]
        raise InputError(
            f"{self.name}: hardly a row belongs to the split {self.split!r}: there are too few "
            "different rows of this size; make it longer, or its vocabulary larger."
        )

    def optimal(self, ids: Int[Tensor, "row position"]) -> Float[Tensor, "row position vocab"]:
        """Probabilities of the token that follows each position, by the best predictor there is;
        they mean something before targets only."""
        return self.best(ids)

    def floor(self, batch: dict[str, Tensor]) -> tuple[float, float]:
        """Loss (nats a target) and accuracy of the best predictor on a batch: no model is better on
        average."""
        at = batch["labels"][:, 1:] != NO_TARGET
        probabilities = self.optimal(batch["input_ids"])[:, :-1][at]
        answers = batch["input_ids"][:, 1:][at]
        chosen = probabilities.gather(-1, answers[:, None])
        right = (probabilities.argmax(-1) == answers).float().mean()
        return -chosen.clamp_min(1e-30).log().mean().item(), right.item()

    def pairs(self, n: int, seed: int) -> Task:
        """n prompts of this split, each beside one that differs in what decides the answer."""
        if n < 1:
            raise InputError(
                f"{self.name}: {n} prompt pairs were queried for; ask for at least one."
            )
        draws = generator(seed, 0)
        rows = [self.pair(row, draws) for row in self.rows(n, draws)]
        clean, corrupt = ([tuple(row[i]) for row in rows] for i in (0, 1))
        answers, foils = ([row[i] for row in rows] for i in (2, 3))
        return Task(
            self.name,
            tuple(clean),
            tuple(corrupt),
            tuple(map(str, answers)),
            tuple(map(str, foils)),
            tuple(answers),
            tuple(foils),
            0.5,
            self.story,
            self.source,
        )


def permutations(rows: int, n: int, generator: torch.Generator) -> Int[Tensor, "row place"]:
    """A shuffle of 0 .. n - 1 for each row."""
    return torch.rand(rows, n, generator=generator).argsort(dim=1)


def other(than: int, among: Sequence[int], generator: torch.Generator) -> int:
    """One of `among` that is not `than`."""
    left = [i for i in among if i != than]
    return left[int(torch.randint(len(left), (1,), generator=generator))]


def _in_split(ids: Int[Tensor, "row position"], split: str) -> Bool[Tensor, " row"]:
    """Which rows are of this split: a polynomial of their tokens modulo a prime, in ten parts."""
    if split not in _PARTS:
        raise InputError(f"split {split!r}: choose one of {', '.join(_PARTS)}.")
    prime, value = 2_147_483_647, torch.ones(len(ids), dtype=torch.long)
    for column in ids.T:
        value = (value * 1_000_003 + column + 1) % prime
    return torch.isin(value // 7 % 10, torch.tensor(_PARTS[split]))
