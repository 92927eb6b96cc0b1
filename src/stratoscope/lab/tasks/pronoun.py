"""Gendered pronoun: a name is taken up by he or she."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from stratoscope.lab.tasks._task import Pair, Task, fitted, one_token

SHE = (
    "Mary Sarah Emma Anna Alice Laura Lisa Rachel Julia Maria Karen Linda Susan Jennifer Lucy "
    "Rose Diana Helen"
).split()
HE = (
    "John Tom James Peter Paul Mark David Robert Michael George Henry Frank Kevin Adam Jack "
    "Steve "
    "Brian Scott"
).split()
WHAT = "friend teacher doctor writer student singer player leader worker neighbor".split()
TEMPLATES = (
    "So {name} is a {how} {what}, isn't",
    "{name} is a {how} {what}. Yesterday",
    "Everyone says that {name} is a {how} {what}, and that",
)
HOW = ("great", "good", "really kind", "very nice")


def task(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Task:
    """n pairs, half with a woman's name in the clean prompt. Raises InputError when the tokenizer
    splits the names."""
    she, he = (
        one_token(tokenizer, names, what, need=3)
        for names, what in ((SHE, "women's names"), (HE, "men's names"))
    )

    def draw(generator: random.Random) -> Pair:
        named = [(generator.choice(she), " she"), (generator.choice(he), " he")]
        (name, answer), (other, foil) = generator.sample(named, 2)
        template, how, what = (
            generator.choice(TEMPLATES),
            generator.choice(HOW),
            generator.choice(WHAT),
        )
        clean, corrupt = (template.format(name=who, how=how, what=what) for who in (name, other))
        return Pair(clean, corrupt, answer, foil)

    story = """Someone is named, and the next word is the pronoun for them. The corrupt prompt has a
        name usual for the other gender. A task about what text says of names, not about people."""
    return fitted(
        "pronoun",
        tokenizer,
        n,
        seed,
        draw,
        story=story,
        source="after Mathwin et al. 2023 (gendered pronouns)",
    )
