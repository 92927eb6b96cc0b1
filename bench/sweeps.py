"""How fast an exact sweep is: the planner against the naive loop, and against the peers in the same
process.

    python bench/sweeps.py --quick      planner and naive only, some layers, every timed cell
                                        compared; under a minute
    make bench                          all layers, TransformerLens and nnsight beside them,
                                        medians of 5; minutes

Each repetition runs every arm once, in random order. The naive loop and the peers pay the same for
every cell, so they are timed on a random sample of cells (all of them compared with the planner's
numbers) and scaled to the whole sweep; the planner always runs the whole sweep. Ratios are medians
over repetitions of (arm / planner in the same repetition).
"""

from __future__ import annotations

import copy
import gc
import json
import random
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from handwritten import residual_sweep
from torch import Tensor

import stratoscope
from stratoscope.engine.intervene import Intervention, replaced
from stratoscope.engine.sweep import naive, plan, sweep
from stratoscope.engine.trace import capture
from stratoscope.models.lm import LM

CLEAN = "When Mary and John went to the store for some cold milk, John gave a drink to"
PREFIX = "When Mary and John went to the store for some cold milk, Mary gave a drink to"
NO_PREFIX = "Later Susan plus Mark ran from a house with no open door: Susan took the book from"
ANSWER, FOIL = " Mary", " John"
HERE = Path(__file__).parent


@dataclass
class Arm:
    """One way of computing cells: run(cells) -> metric of each, and whether it runs all cells or
    only the sample."""

    name: str
    run: Callable[[list[int]], Tensor]
    whole: bool = False


@dataclass
class Sweep:
    """A sweep to be timed: what each cell patches, as (layer, position) or (layer, head)."""

    name: str
    kind: str
    clean: Tensor
    corrupt: Tensor
    places: list[tuple[int, int]]
    cells: list[Intervention]


def build(lm: LM, kind: str, clean: str, corrupt: str, stride: int, device: str) -> Sweep:
    """All layers (every stride-th) by all positions, or by all heads at all positions, clean into
    corrupt."""
    batches = lm.batch(clean), lm.batch(corrupt)
    site = "resid_pre" if kind == "resid" else "attn.z"
    source = capture(lm, batches[0], f"layers.*.{site}").stack(f"layers.*.{site}")
    layers = range(0, lm.dims.layers, stride)
    others = range(source.shape[2]) if kind == "resid" else range(lm.dims.heads)
    places = [(layer, other) for layer in layers for other in others]
    cells = [
        replaced(f"layers.{a}.resid_pre", source[a][:, [b]], positions=b)
        if kind == "resid"
        else replaced(f"layers.{a}.attn.z", source[a][:, :, [b]], units=[b])
        for a, b in places
    ]
    return Sweep(kind, kind, batches[0].ids, batches[1].ids, places, cells)


def measure(
    lm: LM, work: Sweep, arms: list[Arm], repetitions: int, sample: int, seed: int
) -> dict[str, object]:
    """Seconds for the whole sweep by each arm, per repetition, and the largest difference from the
    planner."""
    rng = random.Random(seed)
    everything = list(range(len(work.cells)))
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    worst = {arm.name: 0.0 for arm in arms}
    planner = next(arm for arm in arms if arm.name == "planner")
    reference = planner.run(everything)  # also warms up
    for arm in arms:
        arm.run(everything[:2])
    for _ in range(repetitions):
        for arm in rng.sample(arms, len(arms)):
            chosen = (
                everything if arm.whole else rng.sample(everything, min(sample, len(everything)))
            )
            start = time.perf_counter()
            values = arm.run(chosen)
            spent = time.perf_counter() - start
            seconds[arm.name].append(spent * len(everything) / len(chosen))
            gap = (values.flatten().cpu() - reference[chosen].flatten().cpu()).abs().max()
            worst[arm.name] = max(worst[arm.name], float(gap))
    return {
        "cells": len(everything),
        "tokens": int(work.corrupt.shape[1]),
        "examples": int(work.corrupt.shape[0]),
        "seconds": seconds,
        "max_abs": worst,
        "ratio": {
            name: statistics.median(a / b for a, b in zip(seconds[name], seconds[planner.name]))
            for name in seconds
        },
        "metric_range": float(reference.max() - reference.min()),
    }


def ours(lm: LM, work: Sweep, ids: tuple[int, int]) -> list[Arm]:
    def metric(logits: Tensor, example: Tensor) -> Tensor:
        return logits[:, ids[0]] - logits[:, ids[1]]

    def chosen(which: list[int]) -> list[Intervention]:
        return [work.cells[i] for i in which]

    return [
        Arm("planner", lambda which: sweep(lm, work.corrupt, chosen(which), metric), whole=True),
        Arm("naive", lambda which: naive(lm, work.corrupt, chosen(which), metric)),
    ]


def transformer_lens(lm: LM, work: Sweep, ids: tuple[int, int]) -> Arm | None:
    """transformer_lens.patching on the same Hugging Face model, one forward pass a patch, as its
    users run it."""
    with suppress(ImportError):
        import pandas as pd
        from transformer_lens import patching
        from transformer_lens.model_bridge import TransformerBridge

        own = copy.deepcopy(lm.model)  # the bridge rewires the model it is given
        own.set_attn_implementation("eager")
        bridge = TransformerBridge.boot_transformers(lm._name, hf_model=own, tokenizer=lm.tokenizer)
        _, cache = bridge.run_with_cache(work.clean)
        second = "pos" if work.kind == "resid" else "head"
        how = {
            "resid": ("resid_pre", patching.layer_pos_patch_setter),
            "heads": ("z", patching.layer_head_vector_patch_setter),
        }[work.kind]

        def run(which: list[int]) -> Tensor:
            index = pd.DataFrame([work.places[i] for i in which], columns=["layer", second])
            return patching.generic_activation_patch(
                bridge,
                work.corrupt,
                cache,
                lambda logits: (logits[:, -1, ids[0]] - logits[:, -1, ids[1]]).mean(),
                how[1],
                how[0],
                index_df=index,
            )

        return Arm("TransformerLens", run)
    return None


def nnsight(lm: LM, work: Sweep, ids: tuple[int, int]) -> Arm | None:
    """nnsight, one trace a patch."""
    with suppress(ImportError):
        from nnsight import NNsight

        model = NNsight(copy.deepcopy(lm.model))
        heads = lm.dims.head_dim

        def run(which: list[int]) -> Tensor:
            found = []
            for i in which:
                layer, other = work.places[i]
                value = work.cells[i].value
                with torch.no_grad(), model.trace(work.corrupt, use_cache=False):
                    if work.kind == "resid":
                        model.model.layers[layer].input[:, other] = value[:, 0]
                    else:
                        span = slice(other * heads, (other + 1) * heads)
                        model.model.layers[layer].self_attn.o_proj.input[:, :, span] = value[
                            :, :, 0
                        ]
                    logits = model.lm_head.output[:, -1].save()
                found.append((logits[:, ids[0]] - logits[:, ids[1]]).mean())
            return torch.stack(found)

        return Arm("nnsight", run)
    return None


def by_hand(lm: LM, work: Sweep, ids: tuple[int, int]) -> Arm:
    """The whole residual sweep as one would write it for Llama alone."""
    # layer, position, 1, 1, dim
    source = torch.stack([cell.value for cell in work.cells]).unflatten(0, (lm.dims.layers, -1))
    source = source.flatten(2, 3).transpose(1, 2)
    return Arm(
        "hand-written",
        lambda which: residual_sweep(lm.model, work.corrupt, source, ids).flatten()[which],
        whole=True,
    )


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that the process grows by while `run` runs, sampled every 2 ms."""
    page, going = resource.getpagesize(), threading.Event()
    seen: list[int] = []

    def sample() -> None:
        while not going.is_set():
            seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
            time.sleep(0.002)

    gc.collect()
    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        run()
    finally:
        going.set()
        watcher.join()
    return max(seen) - seen[0]


def settings() -> dict[str, tuple[str, str]]:
    return {
        "full": ("resid", NO_PREFIX),
        "prefix": ("resid", PREFIX),
        "heads": ("heads", NO_PREFIX),
        "heads_prefix": ("heads", PREFIX),
    }


def growth(lm: LM, ids: tuple[int, int], repetitions: int) -> list[dict[str, object]]:
    """How cost grows with length, pairs and depth: residual sweeps of random tokens without a
    shared prefix.

    Long sweeps are thinned to every n-th layer and position, evenly, so that a result costs on
    average what it costs in the whole sweep. Depth is that of the same model cut after its first
    layers.
    """
    rows = []
    generator = torch.Generator().manual_seed(0)
    whole = lm.dims.layers
    shapes = [
        (8, 1, whole),
        (18, 1, whole),
        (64, 1, whole),
        (256, 1, whole),
        (8, 8, whole),
        (18, 8, whole),
    ]
    for tokens, pairs, depth in [*shapes, (18, 1, 8), (18, 1, 15), (18, 1, 23)]:
        cut = lm if depth == whole else shallower(lm, depth)
        clean, corrupt = (
            torch.randint(100, 40000, (pairs, tokens), generator=generator) for _ in range(2)
        )
        source = capture(cut, clean, "layers.*.resid_pre").stack("layers.*.resid_pre")
        layers = range(0, depth, 1 if tokens * pairs <= 18 else 5)
        positions = range(0, tokens, max(1, tokens // 32))
        places = [(a, b) for a in layers for b in positions]
        cells = [
            replaced(f"layers.{a}.resid_pre", source[a][:, [b]], positions=b) for a, b in places
        ]
        work = Sweep("growth", "resid", clean, corrupt, places, cells)
        found = measure(cut, work, ours(cut, work, ids), repetitions, 4, 0)
        each = {
            arm: 1000 * statistics.median(s) / len(cells) / pairs
            for arm, s in found["seconds"].items()
        }
        rows.append(
            {"tokens": tokens, "pairs": pairs, "layers": depth, "ms_a_result": each} | found
        )
        told = ", ".join(f"{arm} {ms:.2f} ms" for arm, ms in each.items())
        click.echo(
            f"  {tokens} tokens, {pairs} pairs, {depth} layers: {told} a result; naive / planner "
            f"{found['ratio']['naive']:.1f}"
        )
    return rows


def shallower(lm: LM, depth: int) -> LM:
    """The model cut after its first layers; final norm and read-out stay."""
    model = copy.deepcopy(lm.model)
    model.model.layers = model.model.layers[:depth]
    model.config.num_hidden_layers = depth
    return stratoscope.models.wrap(model, lm.tokenizer)


def memory(lm: LM, work: Sweep, ids: tuple[int, int], budget: int) -> dict[str, int]:
    """What the process really grows by when rows in flight may take `budget` bytes; the base run's
    share is its own."""
    metric = lambda logits, example: logits[:, ids[0]] - logits[:, ids[1]]  # noqa: E731
    base = peak_memory(lambda: sweep(lm, work.corrupt, work.cells[:1], metric))
    grown = peak_memory(lambda: sweep(lm, work.corrupt, work.cells, metric, budget=budget))
    click.echo(
        f"  budget {budget >> 20} MiB: grew by {grown >> 20} MiB at most; a sweep of one cell by "
        f"{base >> 20} MiB"
    )
    return {"budget": budget, "grown": grown, "one_cell": base}


@click.command()
@click.option(
    "--quick", is_flag=True, help="Planner and naive only, every fifth layer; under a minute."
)
@click.option(
    "--no-growth",
    is_flag=True,
    help="Leave out how cost grows with length and pairs; it takes longest.",
)
@click.option("--model", default="smollm2")
@click.option("--dtype", default="float32")
@click.option("--device", default="cpu")
@click.option("--repetitions", default=None, type=int)
@click.option("--out", default=str(HERE / "sweeps.json"), help="Where the full run's numbers go.")
def main(
    quick: bool,
    no_growth: bool,
    model: str,
    dtype: str,
    device: str,
    repetitions: int | None,
    out: str,
) -> None:
    repetitions = repetitions or (1 if quick else 5)
    lm = stratoscope.load(model, dtype=dtype, device=device)
    ids = tuple(lm.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in (ANSWER, FOIL))
    table: dict[str, dict[str, object]] = {}
    for name, (kind, corrupt) in settings().items():
        work = build(lm, kind, CLEAN, corrupt, 5 if quick else 1, device)
        arms = ours(lm, work, ids)
        if not quick:
            arms += [arm for make in (transformer_lens, nnsight) if (arm := make(lm, work, ids))]
            arms += [by_hand(lm, work, ids)] if name == "full" and lm.family.name == "llama" else []
        found = measure(lm, work, arms, repetitions, len(work.cells) if quick else 12, seed=0)
        if name == "full" and not quick:
            found["memory"] = [memory(lm, work, ids, megabytes << 20) for megabytes in (64, 256)]
        table[name] = found
        times = ", ".join(
            f"{arm} {statistics.median(s):.2f} s" for arm, s in found["seconds"].items()
        )
        click.echo(f"{name}: {found['cells']} cells of {found['tokens']} tokens: {times}")
        click.echo(f"  {plan(lm, work.corrupt, work.cells).explain()}")
    worst = max(gap for found in table.values() for gap in found["max_abs"].values())
    if not quick:
        record = {
            "model": model,
            "dtype": dtype,
            "device": device,
            "provenance": lm.provenance,
            "sweeps": table,
        }
        record["growth"] = [] if no_growth else growth(lm, ids, min(3, repetitions))
        Path(out).write_text(json.dumps(record, indent=1))
    ratios = " ".join(f"{name}={found['ratio']['naive']:.1f}" for name, found in table.items())
    click.echo(f"{ratios} max_abs={worst:.1e}")
    sys.exit(worst > 1e-3 * (1 if dtype == "float32" else 100))


if __name__ == "__main__":
    main()
