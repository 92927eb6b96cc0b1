"""What is known about a planted model: the mechanism, and the prompts that show it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, eq=False)
class Planted:
    """A hand-built transformer, a prompt pair, and the components that carry the answer.

    `clean` and `corrupt` have as many tokens as each other; the model says `answer` after `clean` and `foil`
    after `corrupt`. *The difference* below is logit(answer) - logit(foil) at the last position of `clean`.

    - `heads`, `neurons`: set any one of them to zero, at all positions, and less than a fifth of the
      difference is left; set any other one to zero and it moves by less than a twentieth.
    - `edges`: (sender, receiver), named "embed", "L0H1", "L0 mlp", "logits"; a head receives through
      "L0H1.q", ".k" or ".v", of that one query head also where key/value heads are shared. Give the receiver
      alone the sender's output from the corrupt run, and less than a fifth is left; any other edge moves it
      by less than a twentieth. What both prompts share, such as the query of a head that always looks back
      by one, is needed but carries no difference: the story names it, `edges` does not.
    - `attention`: (layer, head, query position, key position), each above 0.9 on the clean prompt.
    - `positions`: the positions in the clean prompt that the answer passes through, in order.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    clean: str
    corrupt: str
    answer: str
    foil: str
    heads: frozenset[tuple[int, int]]
    neurons: frozenset[tuple[int, int]]
    edges: frozenset[tuple[str, str]]
    attention: frozenset[tuple[int, int, int, int]]
    positions: tuple[int, ...]
    story: str
