"""Questions a second of the likelihood scorer beside plain Transformers, on the real SmolLM2.

    python bench/score.py           two minutes; prints the ratio and writes bench/score.json

Twenty-four questions of about sixty tokens with four choices each. Plain: every choice with its
whole context, one row at a time, as a script would. Both log-likelihoods are compared first.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import torch

import stratoscope
from stratoscope.benchmarks import Item, likelihood

FACTS = "Mary keeps a {} in the barn, Ann keeps a {} in the yard, and Tom keeps a {} at home. "
ANIMALS = ("horse", "goat", "rabbit", "parrot", "turtle", "donkey", "hamster", "spider")


def questions(n: int) -> list[Item]:
    found = []
    for number in range(n):
        three = [ANIMALS[(number * step + step) % 8] for step in (1, 3, 5)]
        story = FACTS.format(*three) * 2 + f"({number}) Question: what does Ann keep in the yard?"
        choices = tuple(f"a small {animal} that likes to sleep" for animal in ANIMALS[:4])
        found.append(Item(f"{story}\nAnswer:", choices, number % 4, id=str(number)))
    return found


@torch.no_grad()
def plain(lm: stratoscope.models.LM, items: list[Item]) -> list[list[float]]:
    found = []
    for item in items:
        scores = []
        for choice in item.choices:
            start = len(lm.tokenizer(item.context)["input_ids"])
            ids = lm.tokenizer(f"{item.context} {choice}", return_tensors="pt")["input_ids"]
            said = lm.model(ids).logits[0].log_softmax(-1)
            scores.append(said[start - 1 : -1].gather(-1, ids[0, start:, None]).sum().item())
        found.append(scores)
    return found


def main() -> None:
    lm, items = stratoscope.load("smollm2"), questions(24)
    begun = time.perf_counter()
    theirs = plain(lm, items)
    middle = time.perf_counter()
    ours = likelihood.score(lm, items)
    spent, naive = time.perf_counter() - middle, middle - begun
    gap = float((torch.tensor(ours["logprob"].to_numpy()) - torch.tensor(theirs)).abs().max())
    scale = float(torch.tensor(theirs).abs().max())
    ratio = naive / spent
    click.echo(f"plain {len(items) / naive:.2f} questions/s, ours {len(items) / spent:.2f}")
    click.echo(f"ratio {ratio:.1f}; log-likelihoods differ by {gap:.1e} of {scale:.0f}")
    found = {"ratio": round(ratio, 2), "largest_gap": gap, "largest": scale}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
