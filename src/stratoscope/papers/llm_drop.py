"""What Matters in Transformers? Not All Attention is Needed.

He, Sun, Shen and Li, 2024. arXiv:2406.15786.
Claim: many attention layers hardly turn the residual stream and can be left out at little cost,
    unlike MLPs and whole blocks; that saves time and most of their cache.
Methods: layers.module_importance, editing.drop_modules
Protocol: Llama-2-13B and 70B and Mistral-7B: calibration on 256 texts of 2,048 tokens of C4, a
    quarter and half of the attention layers dropped, accuracy on the authors' benchmarks, tokens
    a second with a cache; 40 random draws from layers 2 on. `stratoscope claim llm-drop --model
    meta-llama/Llama-2-13b-hf` runs the small one.

The paper measures benchmark accuracy of models of 7 to 70 billion parameters and calibrates on 256
texts of 2048 tokens of C4; here it is perplexity of SmolLM2-135M, whose 30 layers are narrow, on
State of the Union addresses.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.editing import drop_modules
from stratoscope.engine.intervene import ablate, intervene
from stratoscope.lab import data, planted
from stratoscope.layers import module_importance
from stratoscope.layers.module_importance import least
from stratoscope.maths.loss import next_token_loss
from stratoscope.models import LM
from stratoscope.results import label

WINDOW, CALIBRATION, HELD_OUT = 160, 6, 12  # tokens of a text; texts
SHARE, DRAWS, REPEATS = 0.25, 3, 9
KINDS = ("attention", "mlp", "block")


@claim(
    says="A dropped module is one whose output is zero, and a dropped attention layer "
    "keeps no keys and values",
    where="section 3.3 (Layer Drop)",
    tier="identity",
    subject="planted induction model (GPT-2, two layers)",
    expect="gap == 0 and kept == 1 and changed > 1",
    null={
        "changed": "the model as it is, with both layers: how far its logits are from those "
        "without the module"
    },
)
def dropped_is_zero(seed: int) -> Measured:
    """Logits without the first attention, against writing zeros there; and how many layers its
    cache then holds."""
    p = planted.induction(seed=seed)
    lm = models.wrap(p.model, p.tokenizer)
    site = "layers.0.attn.out"
    with torch.no_grad():
        plain = lm(p.clean)["logits"].clone()
        with intervene(lm, ablate(site)):
            zeros = lm(p.clean)["logits"].clone()
        with drop_modules.edit(lm, [site]):
            run = lm(p.clean, use_cache=True)
            logits, held = run["logits"].clone(), _kept(run["cache"])[0]
    gap, changed = float((logits - zeros).abs().max()), float((logits - plain).abs().max())
    return Measured(values={"gap": gap, "kept": held}, null={"changed": changed}, n=logits.numel())


@claim(
    says="Attention layers can be dropped at little cost, MLPs and blocks cannot; and "
    "the model runs faster",
    where="abstract; section 4, tables 1 to 3",
    read="authors' code",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="12 texts",
    expect="attention <= 0.5 * mlp and attention <= 0.5 * block and attention <= 0.5 * "
    "random and speedup > 1",
    direction="attention < mlp and attention < block and attention < random",
    null={
        "random": "as many attention layers, drawn at random; three draws, which may hold "
        "layers 0 and 1"
    },
    thresholds="half: the ledger's; what `little cost` is at most, the paper does not say in"
    " these terms",
    found_there={"speedup": 1.484},
)
def attention_goes_first(lm: LM, seed: int) -> Measured:
    """Relative rise in perplexity, without the quarter (8 of 30) of attention layers, MLPs or
    blocks of least importance.

    Importance comes from texts of the training split, perplexity from texts of the test split.
    joint: as many modules, attention and MLP together. speedup: wall time of a forward pass with
    everything over that with the attention dropped, run in turn, medians; decode likewise, for one
    token with a cache; cache: the share of its bytes that is saved.
    """
    generator = random.Random(seed)
    calibration, held_out = (
        _windows(lm, "train", CALIBRATION, generator),
        _windows(lm, "test", HELD_OUT, generator),
    )
    n = round(SHARE * lm.dims.layers)
    found = [module_importance.measure(lm, [text]) for text in calibration]
    importance = xr.concat([each.drop_vars("example_text") for each in found], "example")
    sites = {kind: least(importance, n, kind) for kind in (*KINDS, "joint")}
    drawn = [sorted(generator.sample(range(lm.dims.layers), n)) for _ in range(DRAWS)]
    plain = losses(lm, held_out)
    lost = {kind: losses(lm, held_out, without) for kind, without in sites.items()}
    at_random = [
        losses(lm, held_out, [f"layers.{layer}.attn.out" for layer in layers]) for layers in drawn
    ]
    values = {kind: rise(lost[kind], plain) for kind in lost} | speed(
        lm, sites["attention"], held_out[0]
    )
    mean = importance.mean("example")
    return Measured(
        values=values | {"perplexity": float(np.exp(plain.mean()))},
        null={"random": [rise(each, plain) for each in at_random]},
        n=len(held_out),
        interval={kind: _interval(lost[kind], plain, seed) for kind in lost},
        figure=label(
            np.stack([mean[kind].values for kind in ("attention", "mlp")], axis=1),
            ("layer", "component"),
            name="importance",
            method="layers.module_importance",
            provenance=lm.provenance,
            coords={"layer": list(range(lm.dims.layers)), "component": ["attention", "mlp"]},
        ),
        note=f"Dropped {', '.join(sites['attention'])}. Random draws: {drawn}.",
    )


@torch.no_grad()
def losses(lm: LM, texts: Sequence[Sequence[int]], without: Sequence[str] = ()) -> np.ndarray:
    """Mean next-token loss of each text, in nats, with some modules dropped."""
    with drop_modules.edit(lm, without) if without else nullcontext():
        batches = [lm.batch([text]) for text in texts]
        return np.array(
            [float(next_token_loss(lm(batch)["logits"], *batch.text)) for batch in batches]
        )


def rise(lost: np.ndarray, plain: np.ndarray) -> float:
    """By which part of itself perplexity grows."""
    return float(np.exp(lost.mean() - plain.mean()) - 1)


@torch.no_grad()
def speed(lm: LM, without: Sequence[str], text: Sequence[int]) -> dict[str, float]:
    """What dropping saves in time (whole text at once, and one token with the text in the cache)
    and in the cache."""
    seconds: dict[tuple[str, str], list[float]] = {}
    size: dict[str, int] = {}
    ids = torch.tensor([text], device=lm.model.device)
    for _ in range(REPEATS + 1):
        for name, edit in (("plain", nullcontext()), ("dropped", drop_modules.edit(lm, without))):
            with edit:
                began = time.perf_counter()
                cache = lm.model(ids, use_cache=True).cache
                whole = time.perf_counter()
                lm.model(ids[:, -1:], cache=cache, use_cache=True)
                seconds.setdefault((name, "text"), []).append(whole - began)
                seconds.setdefault((name, "token"), []).append(time.perf_counter() - whole)
                size[name] = _kept(cache)[1]
    middle = {key: median(times[1:]) for key, times in seconds.items()}  # the first is warming up
    return {
        "speedup": middle["plain", "text"] / middle["dropped", "text"],
        "decode": middle["plain", "token"] / middle["dropped", "token"],
        "cache": 1 - size["dropped"] / size["plain"],
    }


def _kept(cache: object) -> tuple[int, int]:
    """How many layers of a cache hold anything, and how many bytes."""
    held = [
        layer for layer in cache.layers if isinstance(layer.keys, Tensor) and layer.keys.numel()
    ]
    return len(held), sum(
        x.numel() * x.element_size() for layer in held for x in (layer.keys, layer.values)
    )


def _windows(lm: LM, split: str, n: int, generator: random.Random) -> list[list[int]]:
    """n pieces of WINDOW tokens, each from another address, from somewhere in it."""
    found = []
    texts = [each["text"] for each in getattr(data("sotu"), split)]
    for text in generator.sample(texts, n):
        start = generator.randrange(max(1, len(text) - 12 * WINDOW))
        found.append(lm.tokenizer(text[start : start + 12 * WINDOW])["input_ids"][1 : WINDOW + 1])
    return found


def _interval(lost: np.ndarray, plain: np.ndarray, seed: int) -> tuple[float, float]:
    """Ninety-five per cent of the rise over texts drawn again with replacement."""
    draws = np.random.default_rng(seed).integers(len(plain), size=(1000, len(plain)))
    low, high = np.quantile([rise(lost[draw], plain[draw]) for draw in draws], [0.025, 0.975])
    return float(low), float(high)
