"""A transformer that answers multiple-choice questions: it knows which words are of a kind, and
says the right one's letter.

    A hammer B river C lemon D tiger which is fruit  ->  C

8 kinds of 6 made-up words each; the question comes last, so that the options cannot be read in its
light. Three questions in four are labelled A B C D, in this order; the others with four letters of
the alphabet drawn at random, so that no head can know a letter by its place alone. The miniature in
which the findings on multiple choice in Chinchilla (Lieberum et al. 2023, arXiv:2307.09458) must
appear, if small models answer such questions in the same way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratoscope.engine.train import Recipe

VERSION = 1
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
KINDS, EACH, OPTIONS = 8, 6, 4


@dataclass(frozen=True)
class Question:
    """clean and corrupt: the same question, but in corrupt the right word and another one change
    places, so that the letter is not `answer` but `foil`. labels: the four letters in order."""

    clean: str
    corrupt: str
    answer: str
    foil: str
    labels: tuple[str, ...]


def questions(n: int, seed: int = 0, *, world: int = 0, shuffled: bool = False) -> list[Question]:
    """n questions of the world that `make("tiny-mcq", seed=world)` learned; shuffled: labelled with
    random letters."""
    generator, kinds = random.Random(f"questions {seed} {shuffled}"), _kinds(world)
    drawn = []
    for _ in range(n):
        kind, words, right, wrong = _draw(generator, kinds)
        labels = tuple(generator.sample(LETTERS, OPTIONS)) if shuffled else tuple(LETTERS[:OPTIONS])
        other = words.copy()
        other[right], other[wrong] = words[wrong], words[right]
        clean, corrupt = (_prompt(kind, labels, order) for order in (words, other))
        drawn.append(Question(clean, corrupt, labels[right], labels[wrong], labels))
    return drawn


def recipe(
    seed: int,
    say: Callable[[str], object],
    *,
    layers: int = 4,
    dim: int = 128,
    heads: int = 8,
    steps: int = 400,
    batch: int = 128,
    rate: float = 2e-3,
) -> Recipe:
    """Every batch is drawn anew; only the letter at the end is learned."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = _tokenizer(kinds := _kinds(seed))
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=16,
        n_embd=dim,
        n_layer=layers,
        n_head=heads,
        initializer_range=0.1,  # with GPT-2's 0.02 so small a model does not start to learn
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )

    def loss(model: Any, step: int, generator: torch.Generator) -> Tensor:
        drawn = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
        rows = []
        for number in range(batch):
            kind, words, right, _ = _draw(drawn, kinds)
            labels = (
                tuple(drawn.sample(LETTERS, OPTIONS))
                if number % 4 == 0
                else tuple(LETTERS[:OPTIONS])
            )
            rows.append(f"{_prompt(kind, labels, words)} {labels[right]}")
        ids = torch.tensor(tokenizer(rows)["input_ids"])
        return nn.functional.cross_entropy(_last(model, ids), ids[:, -1])

    def save(model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def judge(model: Any) -> dict[str, float]:
        return {
            name: _accuracy(model, tokenizer, questions(500, 10_000, world=seed, shuffled=shuffled))
            for name, shuffled in (("accuracy", False), ("accuracy, random letters", True))
        }

    return Recipe(
        GPT2LMHeadModel(config),
        loss,
        save,
        judge,
        steps=steps,
        rate=rate,
        data={"kinds": KINDS, "words": KINDS * EACH, "chance": 1 / OPTIONS},
        notes=[
            "`tiny_mcq.questions(n, seed, world=...)` draws questions; their words are known, "
            "their mixtures mostly new."
        ],
    )


def _last(model: Any, rows: Tensor) -> Tensor:
    """(question, vocab) logits of the answer, which is the last id of each row."""
    return model(input_ids=rows[:, :-1], use_cache=False, logits_to_keep=1).logits[:, -1]


def _accuracy(model: Any, tokenizer: Any, rows: Sequence[Question]) -> float:
    ids = torch.tensor(tokenizer([f"{q.clean} {q.answer}" for q in rows])["input_ids"])
    return (_last(model, ids).argmax(-1) == ids[:, -1]).float().mean().item()


def _kinds(world: int) -> dict[str, list[str]]:
    """Made-up words by kind."""
    generator = random.Random(f"world {world}")
    parts = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = generator.sample(
        [first + second for first in parts for second in parts], KINDS * (EACH + 1)
    )
    return {words[k]: words[KINDS + k * EACH : KINDS + (k + 1) * EACH] for k in range(KINDS)}


def _draw(generator: random.Random, kinds: dict[str, list[str]]) -> tuple[str, list[str], int, int]:
    """The kind asked for, four words of four kinds, the place of the right one, and another
    place."""
    chosen = generator.sample(sorted(kinds), OPTIONS)
    right, wrong = generator.sample(range(OPTIONS), 2)
    return chosen[right], [generator.choice(kinds[kind]) for kind in chosen], right, wrong


def _prompt(kind: str, labels: Sequence[str], words: Sequence[str]) -> str:
    listed = " ".join(f"{label} {word}" for label, word in zip(labels, words))
    return f"{listed} which is {kind}"


def _tokenizer(kinds: dict[str, list[str]]) -> Any:
    """One token for each word between spaces; an unknown word is an error, not a guess."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "which",
        "is",
        *LETTERS,
        *kinds,
        *(w for group in kinds.values() for w in group),
    ]
    whole = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", model_input_names=["input_ids", "attention_mask"]
    )
