"""What is known about a planted model: the mechanism, and the prompts that show it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from stratoscope.errors import InputError

Head = tuple[int, int]
Edge = tuple[str, str]


class Variant(NamedTuple):
    """A prompt pair of equal length with the words that the model says after each."""

    clean: str
    corrupt: str
    answer: str
    foil: str


@dataclass(frozen=True, eq=False)
class Planted:
    """A hand-built transformer, a prompt pair, and the components that carry the answer.

    `clean` and `corrupt` have as many tokens as each other; the model says `answer` after `clean`
    and `foil` after `corrupt`. *The difference* below is logit(answer) - logit(foil) at the last
    position of `clean`.

    - `heads`, `neurons`: give any one of them its output from the corrupt run, at all positions,
      and less than a fifth of the difference is left. Set it to zero instead, and the same holds,
      unless it has a backup. Do either to any other head or neuron, and the difference moves by
      less than a twentieth.
    - `edges`: (sender, receiver), named "embed", "L0H1", "L0 mlp", "logits"; a head receives
      through "L0H1.q", ".k" or ".v", of that one query head also where key/value heads are shared.
      Give the receiver alone the sender's output from the corrupt run, and less than a fifth is
      left; any other edge moves it by less than a twentieth. What both prompts share, such as the
      query of a head that always looks back by one, is needed but carries no difference: the story
      names it, `edges` does not.
    - `opposing_heads`, `opposing_edges`: they speak against the answer. Corrupt one (or set the
      head to zero), and the difference *rises*, by more than a quarter. They are neither in `heads`
      nor in `edges`.
    - `backups`: (head, its backup). Set either to zero and the difference moves by less than a
      twentieth: while the head works its backup is silent, and where it is missing the backup says
      the same. Set both to zero and less than a fifth is left. A head that says the wrong thing
      still works: with corrupt outputs the backup stays silent, so patching needs no word of it,
      and it is neither in `heads` nor in `edges`.
    - `attention`: (layer, head, query position, key position), each above 0.9 on the clean prompt.
    - `positions`: the positions in the clean prompt that the answer passes through, in order.

    `variants` draws more prompt pairs. Heads, edges and what opposes or backs them up are true of
    each; `neurons`, `attention` and `positions` are those of the pair above.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    clean: str
    corrupt: str
    answer: str
    foil: str
    heads: frozenset[Head]
    neurons: frozenset[tuple[int, int]]
    edges: frozenset[Edge]
    attention: frozenset[tuple[int, int, int, int]]
    positions: tuple[int, ...]
    story: str
    draw: Callable[[random.Random], Variant]
    opposing_heads: frozenset[Head] = frozenset()
    opposing_edges: frozenset[Edge] = frozenset()
    backups: frozenset[tuple[Head, Head]] = frozenset()

    def variants(self, n: int, seed: int = 0) -> list[Variant]:
        """n prompt pairs (clean, corrupt, answer, foil), all different; the same for the same seed.

        Raises InputError when n is below 1, or above what this mechanism has words for.
        """
        if n < 1:
            raise InputError(f"{n} variants of {self.name}: ask for at least one.")
        generator, variants = random.Random(f"{self.name} {seed}"), {}
        for _ in range(50 * n + 1000):
            variants[self.draw(generator)] = None
            if len(variants) == n:
                return list(variants)
        raise InputError(
            f"{self.name} has only about {len(variants)} different prompt pairs; {n} were "
            "asked for."
        )
