"""How well EAP-IG's ranking of edges agrees with exact edge patching, on SmolLM2 and three tasks.

    python bench/edges.py               about three minutes; writes bench/edges.json

Two samples of 300 edges for each prompt, because they answer different questions: edges drawn at
random (nearly all of them do nothing, so correlation there is mostly about the noise floor and a
few strong edges), and EAP-IG's own strongest (are those it names as strong really strong?). Effects
are shares of the clean minus corrupt logit difference.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import click
import numpy as np
from scipy.stats import pearsonr, spearmanr

import stratoscope
from stratoscope.circuits import edge_attribution_ig, path_patching
from stratoscope.engine.wiring import wiring
from stratoscope.lab import tasks
from stratoscope.models import LM

TASKS = ("ioi", "greater_than", "capitals")
HERE = Path(__file__).parent


def agreement(estimate: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Correlations over edges, and how often both name the same edges among the strongest tenth."""
    tenth = max(1, len(exact) // 10)
    strongest = [set(np.argsort(-abs(x))[:tenth].tolist()) for x in (estimate, exact)]
    return {
        "pearson": float(pearsonr(estimate, exact)[0]),
        "spearman": float(spearmanr(estimate, exact)[0]),
        "overlap_of_strongest_tenth": len(strongest[0] & strongest[1]) / tenth,
        "mean_abs_exact": float(abs(exact).mean()),
        "mean_abs_error": float(abs(estimate - exact).mean()),
    }


def compare(
    lm: LM, name: str, prompts: int, count: int, steps: int, seed: int
) -> dict[str, object]:
    """Agreement on `count` random edges and on EAP-IG's strongest `count`, of prompts the model
    gets right."""
    task = tasks.task(name)(lm.tokenizer, 20 * prompts, seed=seed)
    right = tasks.accuracy(lm, task).correct.values.nonzero()[0][:prompts].tolist()
    wires = wiring(lm)
    every = wires.edges
    found: dict[str, list[dict[str, float]]] = {"random": [], "strongest": []}
    for i in right:
        given = {"corrupt": task.corrupt[i], "answer": task.answer_ids[i], "foil": task.foil_ids[i]}
        estimate = edge_attribution_ig.measure(
            lm, task.clean[i], **given, steps=steps
        ).effect.values[0]
        samples = {
            "random": random.Random(seed).sample(range(len(every)), count),
            "strongest": np.argsort(-abs(estimate))[:count].tolist(),
        }
        for kind, which in samples.items():
            paths = [
                (wires.senders[s[0]], wires.receivers[r[0]]) for s, r in (every[j] for j in which)
            ]
            exact = path_patching.measure(lm, task.clean[i], **given, paths=paths).effect.values[0]
            found[kind].append(agreement(estimate[which], exact))
    middle = {
        kind: {key: float(np.median([f[key] for f in rows])) for key in rows[0]}
        for kind, rows in found.items()
    }
    return {
        "prompts": [task.clean[i] for i in right],
        "edges": len(every),
        "median": middle,
        "each": found,
    }


@click.command()
@click.option("--model", default="smollm2")
@click.option("--prompts", default=3)
@click.option("--edges", default=300)
@click.option("--steps", default=10)
@click.option("--seed", default=0)
@click.option("--out", default=str(HERE / "edges.json"))
def main(model: str, prompts: int, edges: int, steps: int, seed: int, out: str) -> None:
    lm = stratoscope.load(model)
    record: dict[str, object] = {
        "model": model,
        "provenance": lm.provenance,
        "sample": edges,
        "steps": steps,
        "seed": seed,
    }
    for task in TASKS:
        start = time.perf_counter()
        record[task] = found = compare(lm, task, prompts, edges, steps, seed)
        for name, numbers in found["median"].items():
            told = ", ".join(f"{key} {value:.3g}" for key, value in numbers.items())
            click.echo(f"{task}, {edges} {name} edges of {found['edges']}: {told}")
        click.echo(f"  {len(found['prompts'])} prompts, {time.perf_counter() - start:.0f} s")
        Path(out).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
