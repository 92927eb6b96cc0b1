"""What an exact residual sweep takes on a GPU: the planner beside what its users would write, in
under six minutes.

    PYTHONPATH=src python bench/gpu.py --json gpu.json
    PYTHONPATH=src python bench/gpu.py --rows "1B fp32 18,heads"     some rows only
    PYTHONPATH=src python bench/gpu.py --device cpu --tiny           the whole script on a CPU,
                                                                     small; under a minute

Llamas of real sizes with random weights, random tokens, every layer and position, no shared prefix
unless said. Each row's times, all with the device waited for, after one warm-up:

    naive       one forward pass a patch by plain hooks: 16 cells, scaled (~)
    batched     256 patches in one pass (64 at 128 tokens): a few passes, scaled where not all (~)
    limit       `handwritten.dense_sweep`
    planner     `engine.sweep.sweep`

Gaps are the largest difference over the cells that both computed, of the metric's range. Memory is
what torch holds at most during the planner's sweep, less what it held before; `own` is what a sweep
of one cell holds (the base run), which the budget does not speak of. A row that fails is reported
and the others go on; --seconds ends the script in time.
"""

from __future__ import annotations

import cProfile
import gc
import json
import pstats
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from overhead import WORDS, Work, build, llama

from stratoscope.circuits import edge_attribution_ig
from stratoscope.engine.memory import available
from stratoscope.heads import activation_patching
from stratoscope.models.lm import LM

SIZES = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# size, dtype, tokens, share of them that both prompts have in common; rows of one model together
SWEEPS = [
    ("135M", "fp32", 18, 0.0),
    ("135M", "bf16", 18, 0.0),
    ("1B", "fp32", 18, 0.0),
    ("1B", "fp32", 18, 0.6),
    ("1B", "fp32", "heads", 0.0),
    ("1B", "fp32", "edges", 0.0),
    ("1B", "bf16", 64, 0.0),
    ("1B", "bf16", 64, 0.6),
    ("8B", "bf16", 18, 0.0),
    ("8B", "bf16", 128, 0.0),
]
NAIVE = 16  # cells of the naive loop
PASSES = 4  # of the batched loop, at most
OF_LIMIT, OVER_LOOP, OVER_LOOP_SHARED, HEADS = 1.3, 1.8, 3.0, 1.0  # bars
EXACT = 1e-4  # of the range, in fp32


class Clock:
    """Seconds of a function, the device waited for."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def once(self, run: Callable[[], Any]) -> tuple[float, Any]:
        self.wait()
        start = time.perf_counter()
        value = run()
        self.wait()
        return time.perf_counter() - start, value

    def median(self, run: Callable[[], Any], most: int = 5) -> tuple[float, Any]:
        """After one warm-up, of as many as fit into about three seconds."""
        first, _ = self.once(run)
        each = [self.once(run) for _ in range(max(1, min(most, int(3 / first))))]
        return statistics.median(seconds for seconds, _ in each), each[-1][1]

    def peak(self, run: Callable[[], Any]) -> int:
        """Bytes held at most while it runs, less those held before; 0 where nobody counts."""
        if not self.cuda:
            return 0
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.once(run)
        return torch.cuda.max_memory_allocated() - before


def name_of(row: tuple[str, str, int | str, float]) -> str:
    size, dtype, what, shared = row
    return f"{size} {dtype} {what}" + (f" {shared:.0%} shared" if shared else "")


def sweep_row(
    lm: LM, row: tuple[str, str, int, float], clock: Clock, tiny: bool, profiled: bool
) -> dict[str, Any]:
    """One row of the table, with its bars: name -> whether it is met."""
    size, dtype, tokens, shared = row
    work = build(lm, "resid", [min(tokens, 8 + tokens // 16) if tiny else tokens], shared)
    cells, group = len(work.cells), 64 if tokens > 64 else 256
    group = min(group, 16) if tiny else group
    jobs = 1024 if tokens > 64 else 4096
    planner, ours = clock.median(work.planner)
    limit, theirs = clock.median(lambda: work.limit(at_once=jobs))
    # whole groups, evenly over the layers: a late patch costs what an early one costs
    starts = range(0, cells, group)
    passes = min(PASSES, len(starts))
    starts = [starts[n * len(starts) // passes] for n in range(passes)]
    which = [n for start in starts for n in range(start, min(start + group, cells))]
    some = work.of(which)
    batched, beside = clock.median(lambda: some.loop(group=group), 3)
    batched *= cells / len(which)
    count = 8 if tokens > 64 else NAIVE
    few = [n * len(which) // count for n in range(count)]
    alone = work.of([which[n] for n in few])
    work.of(which[:1]).loop(group=1)
    naive, single = clock.once(lambda: alone.loop(group=1))
    naive *= cells / count
    span = float(ours.max() - ours.min())
    gap = lambda a, b: float((a - b).abs().max()) / span  # noqa: E731
    found: dict[str, Any] = {
        "cells": cells,
        "naive": naive,
        "batched": batched,
        "batched_cells": len(which),
        "limit": limit,
        "planner": planner,
        "planner_over_limit": planner / limit,
        "batched_over_planner": batched / planner,
        "gap_planner_limit": gap(ours, theirs),
        "gap_limit_batched": gap(theirs[which], beside),
        "gap_planner_naive": gap(ours[which][few], single),
        "gap_batched_naive": gap(beside[few], single),
        "range": span,
    }
    bars = {f"planner <= {OF_LIMIT} x limit": planner <= OF_LIMIT * limit}
    over = OVER_LOOP_SHARED if shared else OVER_LOOP if size != "135M" else 0
    if over:
        bars[f"batched >= {over} x planner"] = batched >= over * planner
    if dtype == "fp32":
        bars["planner = limit"] = found["gap_planner_limit"] <= EXACT
    else:
        bars["planner as near naive as batched"] = (
            found["gap_planner_naive"] <= found["gap_batched_naive"]
        )
    if clock.cuda:
        try:
            found |= memory(work, clock, planner < 8)
            fits = [use["peak"] - found["own"] <= use["budget"] for use in found["memory"]]
        except Exception as error:  # the times are worth their line all the same
            click.echo(f"    memory: {type(error).__name__}: {error}"[:200])
            fits = [False]
        bars["peak within budget"] = all(fits)
    if profiled:
        profile(work.planner)
    return found | {"bars": bars}


def profile(run: Callable[[], Any]) -> None:
    """Where Python spends its time, the dozen functions that take most of their own."""
    watch = cProfile.Profile()
    watch.runcall(run)
    pstats.Stats(watch).sort_stats("tottime").print_stats(12)


def memory(work: Work, clock: Clock, quick: bool) -> dict[str, Any]:
    """The planner's peak with the budget it takes by itself and, where that is quick, with a
    quarter of what it then needed."""
    own = clock.peak(work.of([len(work.cells) // 2]).planner)
    budget = available(work.lm.model.device) // 4
    whole = clock.peak(work.planner)
    uses = [{"budget": budget, "peak": whole}]
    if quick:
        less = max(64 << 20, (whole - own) // 4)
        uses.append({"budget": less, "peak": clock.peak(lambda: work.planner(budget=less))})
    return {"own": own, "memory": uses}


def heads_row(lm: LM, clock: Clock, tokens: int) -> dict[str, Any]:
    """`heads.activation_patching` of one pair of prompts, null and bound included."""
    prompts = pair_of(lm, tokens)
    seconds, result = clock.median(lambda: activation_patching.measure(lm, **prompts), 3)
    bars = {f"heads.activation_patching <= {HEADS:.0f} s": seconds <= HEADS}
    cells = 2 * result.effect[0].size + activation_patching.EXACTLY
    return {"cells": cells, "planner": seconds, "bars": bars if clock.cuda else {}}


def edges_row(lm: LM, clock: Clock, tokens: int) -> dict[str, Any]:
    """`circuits.edge_attribution_ig` of one pair of prompts, ten steps."""
    prompts = pair_of(lm, tokens)
    seconds, result = clock.median(lambda: edge_attribution_ig.measure(lm, **prompts), 2)
    return {"cells": result.effect[0].size, "planner": seconds, "bars": {}}


def pair_of(lm: LM, tokens: int) -> dict[str, Any]:
    """Two random prompts, as methods take them."""
    generator = torch.Generator().manual_seed(2)
    clean, corrupt = torch.randint(5, lm.dims.vocab, (2, 1, tokens), generator=generator).tolist()
    return {"inputs": clean, "corrupt": corrupt, "answer": WORDS[0], "foil": WORDS[1]}


HEADER = (
    f"{'row':<23}{'cells':>6}{'naive':>9}{'batched':>9}{'limit':>8}{'planner':>9}{'/limit':>8}"
    f"{'batched/':>9}{'gap':>9}{'batched':>9}{'bf16: to naive':>18}  bars"
)


def told(name: str, found: dict[str, Any]) -> str:
    """One line of the table, its missed bars, and its memory."""
    missed = [words for words, met in found["bars"].items() if not met]
    verdict = f"FAIL: {'; '.join(missed)}" if missed else "pass" if found["bars"] else "-"
    if "limit" not in found:
        return f"{name:<23}{found['cells']:>6}{'':>26}{found['planner']:>9.3f}{'':>53}  {verdict}"
    mark = "~" if found["batched_cells"] < found["cells"] else " "
    line = (
        f"{name:<23}{found['cells']:>6}{found['naive']:>8.2f}~{found['batched']:>8.3f}{mark}"
        f"{found['limit']:>8.3f}{found['planner']:>9.3f}{found['planner_over_limit']:>8.2f}"
        f"{found['batched_over_planner']:>9.2f}{found['gap_planner_limit']:>9.1e}"
        f"{found['gap_limit_batched']:>9.1e}"
        f"{found['gap_planner_naive']:>9.1e}{found['gap_batched_naive']:>9.1e}  {verdict}"
    )
    for use in found.get("memory", []):
        line += (
            f"\n    budget {use['budget'] / 2**20:,.0f} MiB: peak {use['peak'] / 2**20:,.0f} MiB, "
            f"of it own {found['own'] / 2**20:,.0f} MiB"
        )
    return line


def run_row(lm: LM, row: Any, clock: Clock, tiny: bool, profiled: bool) -> dict[str, Any]:
    what = {"heads": heads_row, "edges": edges_row}.get(row[2])
    return what(lm, clock, 8 if tiny else 18) if what else sweep_row(lm, row, clock, tiny, profiled)


@click.command()
@click.option("--rows", default="", help="Names of rows or parts of them, with commas; all.")
@click.option("--device", default="cuda")
@click.option("--tiny", is_flag=True, help="Small models, to try the script.")
@click.option("--seconds", default=340.0, help="After this long no further row begins.")
@click.option("--profile", "profiled", is_flag=True, help="And a profile of the planner's Python.")
@click.option("--json", "out", default=None, help="Where the numbers go, after every row.")
@torch.no_grad()
def main(
    rows: str, device: str, tiny: bool, seconds: float, profiled: bool, out: str | None
) -> None:
    begin, clock = time.perf_counter(), Clock(device)
    card = torch.cuda.get_device_name() if clock.cuda else "CPU"
    click.echo(f"{card}, torch {torch.__version__}{', tiny models' if tiny else ''}\n{HEADER}")
    table: dict[str, Any] = {}
    lm, held = None, None
    for row in SWEEPS:
        name = name_of(row)
        if rows and not any(part.strip() in name for part in rows.split(",")):
            continue
        if time.perf_counter() - begin > seconds:
            table[name] = {"skipped": True}
            click.echo(f"{name:<23} skipped: {seconds:.0f} s are over")
            continue
        try:
            if held != row[:2]:
                lm = None
                free(clock)
                lm = llama(device, DTYPES[row[1]], **(TINY if tiny else SIZES[row[0]]))
                held = row[:2]
            assert lm is not None
            table[name] = run_row(lm, row, clock, tiny, profiled)
            click.echo(told(name, table[name]))
        except Exception as error:  # the others are still worth their time
            table[name] = {"error": f"{type(error).__name__}: {error}"}
            last = traceback.format_exc().strip().splitlines()[-4:]
            click.echo(f"{name:<23} {type(error).__name__}\n    " + "\n    ".join(last))
            if held != row[:2]:
                lm = held = None
        free(clock)
        if out:
            record = {"device": card, "torch": torch.__version__, "tiny": tiny, "rows": table}
            Path(out).write_text(json.dumps(record, indent=1))
    click.echo(f"{time.perf_counter() - begin:.0f} s in all")


def free(clock: Clock) -> None:
    gc.collect()
    if clock.cuda:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
