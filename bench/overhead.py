"""The planner's overhead, measured where no device hides it: a model so small that calls cost
everything and arithmetic nothing.

    python bench/overhead.py            a Llama of 30 layers of width 16, on one thread; a minute;
                                        writes bench/overhead.json
    python bench/overhead.py --check    exit code 1 where the planner takes more than 1.3 x the
                                        hand-written sweep or more than 0.6 x the batched loop

Three sweeps of random tokens without a shared prefix: residual streams (30 layers x 18 positions),
heads at all positions with their null (30 x 2, clean and a random direction), and residual streams
of eight prompts of unequal length. Three ways of computing each, whose values are all compared:

    planner         `engine.sweep.sweep`
    limit           `handwritten.dense_sweep`: what one writes for this one architecture
    batched loop    what a user writes: plain hooks, 256 patches in one forward pass

Each repetition runs every way once, in random order; seconds are medians, and ratios are medians of
(planner / other in the same repetition).
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from handwritten import dense_sweep
from torch import Tensor

from stratoscope.engine.intervene import Intervention, replaced
from stratoscope.engine.pair import random_like
from stratoscope.engine.sweep import sweep
from stratoscope.engine.trace import capture
from stratoscope.models import wrap
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM

HERE = Path(__file__).parent
WORDS = (7, 11)
LIMIT, LOOP = 1.3, 0.6  # the planner's bars, of the hand-written sweep and of the batched loop
SAME = 1e-5  # of the metric's range


@dataclass
class Work:
    """A sweep as all ways take it: `dense_sweep`'s arguments, and the planner's."""

    lm: LM
    batch: Batch
    ids: Tensor
    lengths: Tensor
    source: Tensor
    places: Tensor
    cells: list[Intervention]

    def planner(self, **options: Any) -> Tensor:
        return sweep(self.lm, self.batch, self.cells, difference, **options)

    def limit(self, **options: Any) -> Tensor:
        return dense_sweep(*self._by_hand(), **options)

    def loop(self, **options: Any) -> Tensor:
        return batched_loop(*self._by_hand(), **options)

    def of(self, which: list[int]) -> Work:
        """Some of the cells."""
        cells = [self.cells[n] for n in which]
        rest = (self.lm, self.batch, self.ids, self.lengths, self.source)
        return Work(*rest, self.places[which], cells)

    def _by_hand(self) -> tuple[Any, ...]:
        return self.lm.model, self.ids, self.lengths, self.source, self.places, WORDS


def difference(logits: Tensor, example: Tensor) -> Tensor:
    return logits[:, WORDS[0]].float() - logits[:, WORDS[1]].float()


def llama(device: str, dtype: torch.dtype, **sizes: int) -> LM:
    """A Llama with random weights, made where it will stand."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            config = transformers.LlamaConfig(max_position_embeddings=2048, **sizes)
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return wrap(model.eval())


def build(lm: LM, kind: str, lengths: list[int], shared: float = 0.0) -> Work:
    """Random prompts of these lengths, clean into corrupt. kind: "resid" at each layer and
    position, "heads" at all positions and their null. shared: of the tokens, how many of the first
    both prompts have in common; cells are only at the others."""
    generator = torch.Generator().manual_seed(1)
    clean, corrupt = (
        [torch.randint(5, lm.dims.vocab, (n,), generator=generator).tolist() for n in lengths]
        for _ in range(2)
    )
    begin = int(shared * min(lengths))
    clean = [b[:begin] + a[begin:] for a, b in zip(clean, corrupt)]
    site = "resid_pre" if kind == "resid" else "attn.z"
    batches = lm.batch(clean), lm.batch(corrupt)
    one, base = (
        capture(lm, batch, f"layers.*.{site}").stack(f"layers.*.{site}")
        for batch in (batches[0], batches[1])
    )
    source = one[None] if kind == "resid" else torch.stack([one, random_like(base, one, 0)])
    others = range(begin, max(lengths)) if kind == "resid" else range(lm.dims.heads)
    places = [(d, n, p) for d in range(len(source)) for n in range(lm.dims.layers) for p in others]
    has = {p: [e for e, n in enumerate(lengths) if kind == "heads" or p < n] for p in others}
    cells = []
    for draw, layer, place in places:
        rows = source[draw, layer, has[place]]
        cells.append(
            replaced(
                f"layers.{layer}.resid_pre", rows[:, [place]], positions=place, examples=has[place]
            )
            if kind == "resid"
            else replaced(
                f"layers.{layer}.attn.z", rows[:, :, [place]], units=[place], examples=has[place]
            )
        )
    ids = batches[1].text[0]
    return Work(lm, batches[1], ids, torch.tensor(lengths), source, torch.tensor(places), cells)


# --- what a user writes ---------------------------------------------------------------------------


@torch.no_grad()
def batched_loop(
    model: Any,
    ids: Tensor,
    lengths: Tensor,
    source: Tensor,
    cells: Tensor,
    words: tuple[int, int],
    *,
    group: int = 256,
) -> Tensor:
    """What `dense_sweep` computes, by plain hooks on the whole model, `group` patches in one
    forward pass: (cell, example)."""
    per_head, examples = source.ndim == 6, len(ids)
    there = torch.ones_like(lengths)[None] > 0 if per_head else cells[:, 2:] < lengths
    cell, example = there.expand(len(cells), examples).nonzero(as_tuple=True)
    padded = bool((lengths < ids.shape[1]).any())
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(ids.device)
    result = torch.full((len(cells), examples), torch.nan, device=ids.device)
    for some in torch.arange(len(cell)).split(group):
        on = example[some].to(ids.device)
        with _hooked(model, source, cells[cell[some]], on):
            out = model.model(
                ids[on], attention_mask=mask[on] if padded else None, use_cache=False
            ).last_hidden_state
            last = out[torch.arange(len(on), device=ids.device), lengths.to(ids.device)[on] - 1]
            logits = model.lm_head(last).float()
        result[cell[some], example[some]] = logits[:, words[0]] - logits[:, words[1]]
    if bool(result.isnan().any()):  # a patch at padding
        out = model.model(ids, attention_mask=mask if padded else None).last_hidden_state
        last = out[torch.arange(examples), lengths.to(ids.device) - 1]
        logits = model.lm_head(last).float()
        clean = logits[:, words[0]] - logits[:, words[1]]
        result = torch.where(result.isnan(), clean, result)
    return result


@contextmanager
def _hooked(model: Any, source: Tensor, cells: Tensor, example: Tensor) -> Iterator[None]:
    """One patch a row, each made by a hook on its layer. cells (row, 3) on the host, example
    (row,)."""
    with ExitStack() as stack:
        for number in cells[:, 1].unique().tolist():
            rows = (cells[:, 1] == number).nonzero()[:, 0]
            draw, place = (x.to(example.device) for x in (cells[rows, 0], cells[rows, 2]))
            on = example[rows := rows.to(example.device)]
            layer = model.model.layers[number]
            if source.ndim == 6:
                put = source[draw, number, on, :, place]
                size = source.shape[-1]
                hook = partial(_put_head, rows=rows, head=place, put=put, size=size)
                stack.callback(layer.self_attn.o_proj.register_forward_pre_hook(hook).remove)
            else:
                hook = partial(_put, rows=rows, place=place, put=source[draw, number, on, place])
                stack.callback(layer.register_forward_pre_hook(hook).remove)
        yield


def _put(module: Any, args: tuple, *, rows: Tensor, place: Tensor, put: Tensor) -> tuple:
    x = args[0].clone()
    x[rows, place] = put
    return x, *args[1:]


def _put_head(
    module: Any, args: tuple, *, rows: Tensor, head: Tensor, put: Tensor, size: int
) -> tuple:
    x = args[0].clone()
    x.unflatten(-1, (-1, size))[rows, :, head] = put
    return x, *args[1:]


# --- measuring ------------------------------------------------------------------------------------


def measure(work: Work, repetitions: int, seed: int = 0) -> dict[str, Any]:
    """Seconds of each way in each repetition, the planner's ratios, and the largest differences."""
    ways: dict[str, Callable[[], Tensor]] = {
        "planner": work.planner,
        "limit": work.limit,
        "loop": work.loop,
    }
    values = {name: run() for name, run in ways.items()}  # also warms up
    rng = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name in rng.sample(list(ways), len(ways)):
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
    ratio = {
        name: statistics.median(a / b for a, b in zip(seconds["planner"], seconds[name]))
        for name in ("limit", "loop")
    }
    gap = {
        name: float((values["planner"] - values[name]).abs().max()) for name in ("limit", "loop")
    }
    return {
        "cells": len(work.cells),
        "lengths": work.lengths.tolist(),
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "each": seconds,
        "ratio": ratio,
        "max_abs": gap,
        "metric_range": float(values["planner"].max() - values["planner"].min()),
    }


@click.command()
@click.option("--repetitions", default=9, help="Of each way, interleaved.")
@click.option("--check", is_flag=True, help="Exit code 1 where a bar is missed.")
@click.option("--out", default=str(HERE / "overhead.json"))
def main(repetitions: int, check: bool, out: str) -> None:
    torch.set_num_threads(1)
    lm = llama(
        "cpu",
        torch.float32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=30,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    sweeps = {
        "residual": ("resid", [18]),
        "heads": ("heads", [18]),
        "residual, 8 examples": ("resid", [18, 17, 15, 14, 12, 11, 9, 8]),
    }
    click.echo(
        f"{'sweep':<22}{'cells':>6}{'planner':>10}{'limit':>10}{'loop':>10}"
        f"{'/ limit':>9}{'/ loop':>8}{'gap of range':>14}"
    )
    table, missed = {}, []
    for name, (kind, lengths) in sweeps.items():
        table[name] = row = measure(build(lm, kind, lengths), repetitions)
        one, two = row["ratio"]["limit"], row["ratio"]["loop"]
        gap = max(row["max_abs"].values()) / row["metric_range"]
        times = "".join(f"{1000 * t:>7.1f} ms" for t in row["seconds"].values())
        click.echo(f"{name:<22}{row['cells']:>6}{times}{one:>9.2f}{two:>8.2f}{gap:>14.1e}")
        bars = {f"{one:.2f} x the limit": one > LIMIT, f"{two:.2f} x the loop": two > LOOP}
        bars[f"differs by {gap:.1e} of the range"] = gap > SAME
        missed += [f"{name}: {words}" for words, wrong in bars.items() if wrong]
    record = {"bars": {"limit": LIMIT, "loop": LOOP}, "torch": torch.__version__, "sweeps": table}
    Path(out).write_text(json.dumps(record, indent=1))
    for words in missed:
        click.echo(f"missed: {words}")
    sys.exit(bool(check and missed))


if __name__ == "__main__":
    main()
