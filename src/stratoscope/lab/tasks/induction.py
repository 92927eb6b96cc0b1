"""Induction: random tokens, then the same again; the next one is the one that followed the first
time."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from stratoscope.lab.tasks._task import Task, enough, made, new_generator, tokens

LENGTH = 12  # random tokens before they repeat


def task(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Task:
    """n pairs as token ids, not text: random tokens would not survive being read again.

    Raises InputError when the tokenizer has fewer ordinary tokens than the prompts need.
    """
    generator = new_generator("induction", n, seed)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = sorted({*tokenizer.get_vocab().values()} - special)
    enough(ordinary, range(len(tokenizer)), "ordinary tokens", need=LENGTH + 1)
    start = tokens(tokenizer, "".join(tokenizer.decode(ordinary[:1])), special=True)[:1]
    start = start if start == [tokenizer.bos_token_id] else []  # as this model's texts begin
    rows = []
    for _ in range(n):
        *first, foil = generator.sample(ordinary, LENGTH + 1)
        at = generator.randint(1, LENGTH - 1)
        other = [foil if place == at else token for place, token in enumerate(first)]
        rows.append(
            (*(tuple(start + text + first[:at]) for text in (first, other)), first[at], foil)
        )
    story = f"""{LENGTH} different random tokens, then the first few of them again: the answer is
        the token that followed before. In the corrupt prompt another token, the foil, stands in its
        place there."""
    return made("induction", tokenizer, rows, story, "Olsson et al. 2022, arXiv:2209.11895")
