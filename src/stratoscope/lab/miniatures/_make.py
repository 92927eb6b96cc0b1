"""`make` trains a miniature at first use and keeps it in the user's cache; `card` tells what it is.

A finished folder appears in the cache in one step. Training goes on in a folder beside it
(`.NAME.training`), which survives an interruption and is taken up by the next call.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from stratoscope.engine.progress import Progress, shown
from stratoscope.engine.train import Recipe, Story
from stratoscope.errors import InputError, LoadError
from stratoscope.lab import _subjects, miniatures
from stratoscope.store import hub
from stratoscope.store.cache import cache_root, cached, is_whole


def make(name: str, *, seed: int = 0, progress: Progress | None = None, **settings: Any) -> Path:
    """The folder of the miniature `name`, trained now if it is not in the cache; `stratoscope.load`
    reads it.

    progress(done, steps, words) is called while it trains; without it a bar is shown when stderr is
    a terminal. settings: other sizes than the file's defaults (`steps=20, dim=48`), kept in a
    folder of their own. An interrupted call is taken up by the next one. Raises InputError for an
    unknown name or setting; LoadError when the data cannot be had or the cache cannot be written.
    """
    module = _subjects.find(miniatures, name, "miniature")
    chosen = _settings(name, module, settings)
    folder, origin = _place(name, module, seed, chosen)
    if is_whole(folder, origin):
        return folder
    training = folder.with_name(f".{folder.name}.training")
    written: dict[str, object] = {}  # `cached` reads it when the training is done
    with shown(f"training {name}", progress) as tell:

        def train(workshop: Path, ready: Path) -> None:
            written.update(_train(name, module, seed, chosen, training, tell))
            shutil.copytree(training / "ready", ready, dirs_exist_ok=True)

        cached("miniatures", folder.name, origin, written, train, lambda words: tell(0, 0, words))
    shutil.rmtree(training, ignore_errors=True)
    return folder


def card(name: str, *, seed: int = 0, **settings: Any) -> dict[str, Any]:
    """What a miniature in the cache was trained on, for how long, how its loss fell and how well it
    does.

    Raises InputError for an unknown name or setting, and for a miniature that has not been made
    yet.
    """
    module = _subjects.find(miniatures, name, "miniature")
    folder, origin = _place(name, module, seed, _settings(name, module, settings))
    if not is_whole(folder, origin):
        raise InputError(
            f"the miniature {name!r} (seed {seed}) has not been trained here; make({name!r}) "
            "trains it."
        )
    return json.loads((folder / "card.json").read_text("utf-8"))


def _settings(name: str, module: ModuleType, given: dict[str, Any]) -> dict[str, Any]:
    """Every setting of the recipe: its default, or what was asked for."""
    options = inspect.signature(module.recipe).parameters.values()
    defaults = {
        option.name: option.default for option in options if option.kind is option.KEYWORD_ONLY
    }
    if unknown := given.keys() - defaults.keys():
        raise InputError(
            f"{name} has no setting {', '.join(sorted(unknown))}; it has {', '.join(defaults)}."
        )
    return defaults | given


def _place(name: str, module: ModuleType, seed: int, settings: dict[str, Any]) -> tuple[Path, str]:
    """The folder of a miniature in the cache, and the hash of what it is made of."""
    origin = hashlib.sha256(
        json.dumps([module.VERSION, seed, settings], sort_keys=True).encode()
    ).hexdigest()
    return cache_root() / "miniatures" / f"{name}-seed{seed}-{origin[:8]}", origin


def _train(
    name: str,
    module: ModuleType,
    seed: int,
    settings: dict[str, Any],
    training: Path,
    tell: Progress,
) -> dict[str, object]:
    """Train into `training/ready`; what the card says."""
    import torch

    from stratoscope.engine.train import train

    (training / "ready").mkdir(parents=True, exist_ok=True)
    with hub.quiet():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # for the fresh weights
            recipe = module.recipe(seed, lambda words: tell(0, 0, words), **settings)
        try:
            story = train(recipe, training, seed=seed, progress=tell)
        except ArithmeticError as error:
            raise LoadError(
                f"{name} with {settings} did not train: {error}. Lower its `rate`."
            ) from error
    return {"name": name, "about": (inspect.getdoc(module) or "").split("\n")[0]} | _described(
        seed, settings, recipe, story
    )


def _described(
    seed: int, settings: dict[str, Any], recipe: Recipe, story: Story
) -> dict[str, object]:
    import torch

    return {
        "seed": seed,
        "settings": settings,
        "data": recipe.data,
        "parameters": sum(p.numel() for p in recipe.model.parameters()),
        "steps": story.step,
        "seconds": round(story.seconds, 1),
        "cpu_seconds": round(story.cpu_seconds, 1),
        "threads": torch.get_num_threads(),
        "resumed": story.resumed,
        "results": story.held_out[str(story.step)],
        "held_out": story.held_out,
        "curve": story.curve,
        "notes": list(recipe.notes),
        "versions": {
            p: importlib.metadata.version(p)
            for p in ("stratoscope", "torch", "transformers", "tokenizers")
        },
    }
