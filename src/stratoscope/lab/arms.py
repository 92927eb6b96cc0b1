"""One protocol for comparing trained models: every arm gets the same search, the same tokens, and a
card.

    arms.compare("recall", [attention, recurrence, null], version=1, records=HERE / "recall")

An arm is one setting of a comparison; a null is an arm like the others. All see equally many
tokens, and have equally many parameters (largest / smallest at most 1.03, embeddings counted apart)
or, where cost is what is claimed, cost equally many operations (1.05, by torch's counter). Each
arm's learning rate is searched at a third, one and three times its stated centre, on seed 100, for
an eighth of the steps, by validation. When an arm ends, its card and its numbers for each unit of
the test are written to `records`, which is committed: claims are judged from these, and no arm is
trained twice for its verdict. The search is not counted among an arm's CPU-seconds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stratoscope.engine import budget
from stratoscope.engine.progress import Progress, shown
from stratoscope.engine.train import Recipe, Story, generator, train
from stratoscope.errors import InputError
from stratoscope.lab import _arm_records as store
from stratoscope.lab._arm_records import Ended

SEARCH_SEED = 100  # never one that is counted
FACTORS = (1 / 3, 1.0, 3.0)
LIMITS = {"parameters": 1.03, "flops": 1.05}
SECONDS = 900.0  # of CPU, for one arm


@dataclass(frozen=True)
class Arm:
    """One setting of a comparison.

    recipe(seed, rate, steps): with fresh weights, made under torch's seed `seed`; nothing else of
    it may depend on whether it is the search or the run. validate(model): a number of validation
    data, the lower the better; by it the rate is chosen. units(model): name -> (unit,) numbers of
    the test's units, in one order for all arms. centre: the learning rate that this kind of model
    is commonly given. tokens: shown in one step (or pictures, or items). settings: what else the
    card should say; a change of them makes another arm.
    """

    name: str
    recipe: Callable[[int, float, int], Recipe]
    validate: Callable[[nn.Module], float]
    units: Callable[[nn.Module], Mapping[str, Tensor]]
    centre: float
    steps: int
    tokens: int
    settings: Mapping[str, Any] = field(default_factory=dict)


def compare(
    name: str,
    arms: Sequence[Arm],
    *,
    version: int,
    records: Path,
    seeds: Sequence[int] = (0, 1, 2),
    equal: Literal["parameters", "flops"] = "parameters",
    limit: float = SECONDS,
    progress: Progress | None = None,
) -> dict[str, dict[int, Ended]]:
    """Every arm on every seed, by name and seed: read from `records`, or trained now.

    version: raise it when the same settings give other models. equal: what all arms must have
    equally much of. limit: CPU-seconds of one arm. Interrupted work goes on with the next call.
    Raises InputError, before anything is trained, for arms that are not equal, for a seed of the
    search among `seeds`, for an arm that is predicted to take longer than `limit`; and where no
    rate trains. ResultError for records of another version.
    """
    if SEARCH_SEED in seeds or len({arm.name for arm in arms}) < len(arms):
        raise InputError(
            f"seeds {list(seeds)} of arms {[arm.name for arm in arms]}: each arm needs a name of "
            f"its own, and seed {SEARCH_SEED} is the search's."
        )
    searched = {
        arm.name: store.record(store.search_path(records, arm.name), _origin(name, version, arm))
        for arm in arms
    }
    costs = {arm.name: (searched[arm.name] or {}).get("cost") or _cost(arm) for arm in arms}
    _refuse_unequal(costs, equal)
    ended: dict[str, dict[int, Ended]] = {}
    for arm in arms:
        origin = _origin(name, version, arm)
        with shown(f"{name}: {arm.name}", progress) as tell:
            search = searched[arm.name] or _search(
                name, arm, costs[arm.name], origin, records, tell
            )
            _refuse_long(arm, search, limit)
            ended[arm.name] = {
                seed: store.ended(name, arm.name, seed, origin, records)
                or _run(name, arm, seed, search, origin, records, tell)
                for seed in seeds
            }
    return ended


def missing(
    name: str, arms: Sequence[Arm], *, version: int, records: Path, seeds: Sequence[int] = (0, 1, 2)
) -> list[tuple[str, int]]:
    """The (arm, seed) that `compare` would train now."""
    return [
        (arm.name, seed)
        for arm in arms
        for seed in seeds
        if store.record(store.card_path(records, arm.name, seed), _origin(name, version, arm))
        is None
    ]


# --- what is equal --------------------------------------------------------------------------------


def _cost(arm: Arm) -> dict[str, int]:
    """Parameters, operations and tokens of the whole training, from the model and one step."""
    recipe = _fresh(arm, SEARCH_SEED, arm.centre, arm.steps)
    size = budget.size(recipe.model)
    step = budget.flops(
        recipe.model, {}, loss=lambda model, _: recipe.loss(model, 0, generator(SEARCH_SEED, 0))
    )
    return {
        "parameters": size.body or size.parameters,
        "embeddings": size.embeddings,
        "flops": step * arm.steps,
        "tokens": arm.tokens * arm.steps,
    }


def _refuse_unequal(costs: Mapping[str, Mapping[str, int]], equal: str) -> None:
    if equal not in LIMITS:
        raise InputError(f"equal={equal!r}: give one of {', '.join(LIMITS)}.")
    for what, most in (("tokens", 1.0), (equal, LIMITS[equal])):
        each = {name: cost[what] for name, cost in costs.items()}
        least, largest = min(each, key=each.__getitem__), max(each, key=each.__getitem__)
        if each[largest] > most * each[least]:
            raise InputError(
                f"these arms do not have equal {what}: {largest} has {each[largest]:,.0f}, {least} "
                f"has {each[least]:,.0f}; at most {most:g} times as many are compared. Change "
                "sizes or steps."
            )


# --- the search -----------------------------------------------------------------------------------


def _search(
    name: str,
    arm: Arm,
    cost: Mapping[str, int],
    origin: str,
    records: Path,
    tell: Progress,
) -> dict[str, Any]:
    steps = max(1, arm.steps // 8)
    tried: dict[str, float] = {}
    seconds = 0.0
    for number, factor in enumerate(FACTORS):
        recipe = _fresh(arm, SEARCH_SEED, factor * arm.centre, steps)
        workshop = store.workshop(name, arm.name, f"rate{number}", origin)
        try:
            story = train(recipe, workshop, seed=SEARCH_SEED, progress=tell)
            tried[f"{factor * arm.centre:.6g}"] = _validated(arm, recipe.model)
            seconds = max(seconds, story.cpu_seconds)
        except ArithmeticError:  # it diverged
            tried[f"{factor * arm.centre:.6g}"] = math.inf
    best = min(tried, key=tried.__getitem__)
    if not math.isfinite(tried[best]):
        raise InputError(
            f"{arm.name} trains at none of the rates {', '.join(tried)}: lower its centre."
        )
    place = list(tried).index(best)
    rates = {
        "origin": origin,
        "rate": FACTORS[place] * arm.centre,
        "validation": {rate: x if math.isfinite(x) else "diverged" for rate, x in tried.items()},
        "at_the_edge": place != 1,
        "steps": steps,
        "seed": SEARCH_SEED,
        "predicted_cpu_seconds": round(seconds * arm.steps / steps, 1),
        "cost": dict(cost),
    }
    store.write(store.search_path(records, arm.name), rates)
    for number in range(len(FACTORS)):
        shutil.rmtree(store.workshop(name, arm.name, f"rate{number}", origin), ignore_errors=True)
    return rates


def _validated(arm: Arm, model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        value = float(arm.validate(model))
    return value if math.isfinite(value) else math.inf


def _refuse_long(arm: Arm, search: Mapping[str, Any], limit: float) -> None:
    predicted = search["predicted_cpu_seconds"]
    if predicted > limit:
        raise InputError(
            f"{arm.name} will take about {predicted:.0f} CPU-seconds a seed; an arm may take "
            f"{limit:.0f}: make it smaller, or give limit={math.ceil(predicted / 60) * 60}."
        )


# --- the run --------------------------------------------------------------------------------------


def _run(
    name: str,
    arm: Arm,
    seed: int,
    search: Mapping[str, Any],
    origin: str,
    records: Path,
    tell: Progress,
) -> Ended:
    workshop = store.workshop(name, arm.name, f"seed{seed}", origin)
    recipe = _fresh(arm, seed, search["rate"], arm.steps)
    story = train(recipe, workshop, seed=seed, progress=tell)
    recipe.model.eval()
    with torch.no_grad():
        units = {
            what: torch.as_tensor(x).detach().cpu() for what, x in arm.units(recipe.model).items()
        }
    card = _described(name, arm, seed, search, recipe, story) | {"origin": origin}
    folder = store.folder(name, arm.name, seed, origin)
    if (workshop / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(workshop / "ready", folder)
    store.keep(store.card_path(records, arm.name, seed), card, units)
    shutil.rmtree(workshop, ignore_errors=True)
    return Ended(card, units, folder if folder.exists() else None)


def _described(
    name: str, arm: Arm, seed: int, search: Mapping[str, Any], recipe: Recipe, story: Story
) -> dict[str, Any]:
    return {
        "comparison": name,
        "arm": arm.name,
        "seed": seed,
        "settings": dict(arm.settings),
        "rate": search["rate"],
        "steps": story.step,
        "cost": search["cost"],
        "size": asdict(budget.size(recipe.model)),
        "validation": _validated(arm, recipe.model),
        "held_out": story.held_out,
        "curve": story.curve,
        "cpu_seconds": round(story.cpu_seconds, 1),
        "resumed": story.resumed,
        "data": recipe.data,
        "notes": list(recipe.notes),
    }


def _fresh(arm: Arm, seed: int, rate: float, steps: int) -> Recipe:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return arm.recipe(seed, rate, steps)


def _origin(name: str, version: int, arm: Arm) -> str:
    made_of = [name, version, arm.name, arm.centre, arm.steps, arm.tokens, dict(arm.settings)]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
