"""How fast a steering grid is: one exact sweep against a loop with forward hooks, same numbers.

    python bench/steering.py --small     6 layers x 2 strengths x 12 prompts; under a minute
    python bench/steering.py             30 layers x 5 strengths x 48 prompts; minutes

Arms, of SmolLM2-135M-Instruct in float32: ours, `steering_grid`'s sweep; `batched`, a loop of plain
forward hooks with all prompts in one padded batch, the last position's logits alone read out
(`logits_to_keep=1`), the best loop that a careful user writes; `whole`, the same with all logits,
as `steering-vectors` and most notebooks run it; `single`, a prompt at a time. Both at every token
and at the last token alone. A loop pays the same for each cell, so it is timed on a random sample
of cells and scaled; ours always runs the whole grid. Every timed cell is compared. `rows` is the
share of the loop's (layer, token) rows that ours computes, counted and not timed: what sharing the
prefix of layers and positions gives alone. The rest is packing and the read-out.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from torch import Tensor

import stratoscope
from stratoscope.editing import steer
from stratoscope.engine.intervene import add
from stratoscope.engine.metric import target
from stratoscope.engine.sweep import plan, sweep
from stratoscope.models.lm import LM

PAIRS = [
    (f"I loved this {x}. It was wonderful", f"I hated this {x}. It was terrible")
    for x in ("film", "meal", "trip", "book", "game", "song")
]
THINGS = "weather hotel service concert speech lesson".split()
OPENINGS = (
    "The {} was",
    "In my opinion the {} was really",
    "We all agreed that the {} had been",
    "She said that the {} was very",
    "After all these years I still think the {} was",
    "Nobody expected it, but the {} turned out",
    "My honest review: the {} was",
    "To tell you the truth, the {} of yesterday was",
)
PROMPTS = [text.format(thing) for text in OPENINGS for thing in THINGS]
STRENGTHS = (-2.0, -1.0, -0.5, 0.5, 1.0)
OUT = Path(__file__).with_suffix(".json")
Place = tuple[int, float]


@contextmanager
def hooked(lm: LM, layer: int, vector: Tensor, last: Tensor | None) -> Iterator[None]:
    """vector added to what a layer gives, everywhere or at each row's last token."""

    def hook(_: object, __: object, out: Tensor) -> Tensor:
        if last is None:
            return out + vector
        out = out.clone()
        out[torch.arange(len(out)), last] += vector
        return out

    handle = lm.model.model.layers[layer].register_forward_hook(hook)
    yield
    handle.remove()


def loop(lm: LM, vectors: dict[int, Tensor], ids: Tensor, at_last: bool, how: str) -> Callable:
    """A function of places that gives (place, example) differences."""
    batch = lm.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    rows = [lm.tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    keep = {"logits_to_keep": 1} if how == "batched" else {}

    def run(given: dict, layer: int, dose: float) -> Tensor:
        size, width = given["input_ids"].shape
        last = torch.full((size,), width - 1) if at_last else None
        with hooked(lm, layer, dose * vectors[layer], last):
            logits = lm.model(**given, **keep, use_cache=False).logits[:, -1]
        return logits[:, ids[0]] - logits[:, ids[1]]

    def of(places: list[Place]) -> Tensor:
        given = rows if how == "single" else [batch]
        with torch.no_grad():
            return torch.stack([torch.cat([run(x, *place) for x in given]) for place in places])

    return of


@click.command()
@click.option("--small", is_flag=True)
@click.option("--sample", default=3, help="Cells on which a loop is timed.")
def main(small: bool, sample: int) -> None:
    global PROMPTS
    lm = stratoscope.load("smollm2")
    fitted = steer.fit(lm, PAIRS)
    vectors = {int(site.layer): x for site, x in fitted.at("all").items()}
    doses = STRENGTHS[1::3] if small else STRENGTHS
    PROMPTS = PROMPTS[::4] if small else PROMPTS
    layers = list(vectors)[::5] if small else list(vectors)
    places = [(layer, dose) for layer in layers for dose in doses]
    batch = lm.batch(PROMPTS)
    asked = target(lm, batch, " good", " bad")
    ids, tokens = torch.tensor([int(asked.answer[0]), int(asked.foil[0])]), int(batch.lengths.sum())
    said: dict[str, object] = {"cells": len(places), "prompts": len(PROMPTS), "tokens": tokens}
    for name, positions in (("every token", None), ("last token", -1)):
        cells = [
            add(f"layers.{n}.resid_post", d * vectors[n], positions=positions) for n, d in places
        ]
        begin = time.perf_counter()
        ours = sweep(lm, batch, cells, asked.difference)
        seconds = {"ours": time.perf_counter() - begin}
        work, worst, scale = plan(lm, batch, cells), 0.0, float(ours.abs().max())
        for how in ("batched", "whole", "single"):
            arm = loop(lm, vectors, ids, positions is not None, how)
            chosen = random.Random(0).sample(range(len(places)), min(sample, len(places)))
            arm([places[chosen[0]]])
            begin = time.perf_counter()
            theirs = arm([places[n] for n in chosen])
            seconds[how] = (time.perf_counter() - begin) * len(places) / len(chosen)
            worst = max(worst, float((theirs - ours[chosen]).abs().max()))
        said[name] = {
            "seconds": {arm: round(value, 2) for arm, value in seconds.items()},
            "ratio": {arm: round(value / seconds["ours"], 2) for arm, value in seconds.items()},
            "rows": round(work.packed_rows / work.naive_rows, 3),
            "by_prefix_alone": round(work.naive_rows / work.packed_rows, 2),
            "max_abs": worst,
            "max_relative": worst / scale,
        }
        click.echo(f"{name}: {json.dumps(said[name])}")
    if not small:
        OUT.write_text(json.dumps(said, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
