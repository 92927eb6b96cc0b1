"""What the tests of fact editing share: a fact in token ids, a corpus, and the learned write by a
plain loop that runs each prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stratoscope.editing import rome
from stratoscope.lab import planted
from stratoscope.lab.planted.facts import CAPITALS
from stratoscope.models import LM, wrap
from support.subjects import entering, parts

FACT = {"prompt": [3, 4, 5, 6, 7], "subject": [4, 5], "target_new": [8]}
PREFIXES = [[9, 10, 11], [12]]
LEARNED = {"steps": 4, "rate": 0.3, "kl": 0.5, "decay": 0.2, "furthest": 3.0}


def corpus(vocab: int = 96, rows: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, vocab, (rows, 12), generator=generator).tolist()


def fitted(lm: LM, layers: int | Sequence[int]) -> rome.Moments:
    """Of too few tokens for a full rank: to be used with a ridge."""
    return rome.fit(lm, [FACT["prompt"], [11, 10, 9, 8]], layers=layers)


def projection(lm: LM, layer: int) -> Any:
    return parts(lm, layer)[1]


def weight_of(lm: LM, layer: int) -> np.ndarray:
    """(dim, neuron), whichever way round the model holds it."""
    weight = projection(lm, layer).weight.detach().double()
    return (weight.T if lm.family.name == "gpt2" else weight).numpy()


def matrix(lm: LM, delta: Tensor) -> np.ndarray:
    """A delta as (dim, neuron)."""
    return (delta.T if lm.family.name == "gpt2" else delta).double().numpy()


def key(lm: LM, layer: int, row: list[int], end: int) -> np.ndarray:
    return entering(lm, projection(lm, layer), row)[end].double().numpy()


def second_moment(lm: LM, layer: int, rows: Sequence[list[int]]) -> np.ndarray:
    """E[k k^T] by a plain hook, row by row, each behind the BOS that is not counted."""
    bos = [lm.model.config.bos_token_id]
    keys = np.concatenate(
        [entering(lm, projection(lm, layer), [*bos, *row])[1:].double() for row in rows]
    )
    return keys.T @ keys / len(keys)


def write(lm: LM, layer: int, row: list[int], end: int) -> Tensor:
    """What the projection gives at a position, by a plain hook."""
    seen: list[Tensor] = []
    handle = projection(lm, layer).register_forward_hook(
        lambda _, __, out: seen.append(out[0, end].detach().clone())
    )
    with torch.no_grad():
        lm.model(torch.tensor([row]))
    handle.remove()
    return seen[0]


def learned(
    lm: LM,
    layer: int,
    fact: dict[str, list[int]],
    prefixes: Sequence[list[int]],
    size: float,
    *,
    steps: int,
    rate: float,
    kl: float,
    decay: float,
    furthest: float,
) -> Tensor:
    """The change of the write, by plain Adam and a plain hook on a copy; no batch, no padding."""
    model = deepcopy(lm.model)
    block = model.transformer.h[layer] if lm.family.name == "gpt2" else model.model.layers[layer]
    module = block.mlp.c_proj if lm.family.name == "gpt2" else block.mlp.down_proj
    start = next(i for i, t in enumerate(fact["prompt"]) if t == fact["subject"][0])
    end = start + len(fact["subject"]) - 1
    change = torch.zeros(lm.dims.dim, requires_grad=True)

    def run(row: list[int], at: int) -> Tensor:
        def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            moved = torch.zeros_like(out)
            moved[0, at] = 1.0
            return out + moved * change

        handle = module.register_forward_hook(hook)
        logits = model(torch.tensor([row])).logits[0]
        handle.remove()
        return logits.log_softmax(dim=-1)

    optimiser = torch.optim.Adam([change], lr=rate)
    first = None
    for _ in range(steps):
        nats = []
        for prefix in [[], *prefixes]:
            row = [*prefix, *fact["prompt"]]
            said = run([*row, *fact["target_new"][:-1]], len(prefix) + end)
            nats += [-said[len(row) - 1 + k, t] for k, t in enumerate(fact["target_new"])]
        essence = run(fact["subject"], len(fact["subject"]) - 1)[-1]
        first = essence.detach() if first is None else first
        moved = (essence.exp() * (essence - first)).sum()
        loss = torch.stack(nats).mean() + kl * moved + decay * change.norm() / size**2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            if change.norm() > furthest * size:
                change.mul_(furthest * size / change.norm())
    return change.detach()


# --- the planted memory ---------------------------------------------------------------------------

PLANTED = {  # where the memory is, and how it is asked
    "fact_lookup": (1, "we ask the capital of {}"),
    "fact_lookup_moved": (0, "we ask of {} and the capital is"),
}
BEFORE = ["the capital of we", "and is the"]


def memory(name: str) -> tuple[LM, rome.Moments, list[str]]:
    """A planted model, its keys over other prompts, and how each country is asked."""
    one = getattr(planted, name)()
    lm = wrap(one.model, one.tokenizer)
    layer, prompt = PLANTED[name]
    texts = [variant.clean for variant in one.variants(60, seed=3)]
    asked = [prompt.replace("{}", country) for country in CAPITALS]
    return lm, rome.fit(lm, texts, layers=layer), asked


def planted_fact(name: str, subject: str, target: str) -> dict[str, Any]:
    return {
        "prompt": PLANTED[name][1],
        "subject": subject,
        "target_new": target,
        "target_true": CAPITALS[subject],
        "essence": "we ask of {} and",
    }
