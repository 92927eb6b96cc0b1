"""A fit of a dictionary: vectors harvested from texts, then learnt from; kept in a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from stratoscope.engine.dictionary import Dictionary, Kind
from stratoscope.engine.harvest import harvest
from stratoscope.engine.places import Place
from stratoscope.engine.sparse import learn
from stratoscope.errors import ResultError
from stratoscope.models.lm import LM


def fitted(
    lm: LM,
    inputs: Any,
    *,
    read: Place,
    written: Place | None = None,
    kind: Kind,
    tokens: int,
    steps: int | None,
    batch_size: int,
    seed: int,
    folder: str | Path | None,
    **more: Any,
) -> Dictionary:
    """The dictionary of these settings: made, gone on with, or read from the folder where it is
    there. written: the site that a transcoder writes. more: method, width, sparsity."""
    count = max(1, 3 * tokens // batch_size) if steps is None else steps
    settings = {
        "site": str(read), "width": more["width"], "sparsity": more["sparsity"], "kind": kind,
        "tokens": tokens, "steps": count, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    settings |= {} if written is None else {"site_out": str(written)}
    about = {"fit": more["method"], "settings": settings, "weights": lm.provenance["weights"]}
    about |= {"model_name": lm.provenance["model"]}
    place = None if folder is None else Path(folder)
    if place is not None and (done := _done(place, about)) is not None:
        return done
    work = None if place is None else place / ".making"
    sites = [str(one) for one in (read, written) if one is not None]
    kept = harvest(
        lm, inputs, sites, tokens=tokens, context=min(64, lm.context or 64), seed=seed,
        folder=None if work is None else work / "harvest",
    )  # fmt: skip
    made = learn(
        *(kept[site].to(lm.model.device) for site in sites),
        width=more["width"], kind=kind, sparsity=more["sparsity"], steps=count,
        batch_size=batch_size, seed=seed, folder=None if work is None else work / "training",
        site_in=sites[0], site_out=sites[-1], about=about,
    ).to("cpu")  # fmt: skip
    if place is not None and work is not None:
        made.save(place)
        shutil.rmtree(work)
    return made


def _done(place: Path, about: dict[str, Any]) -> Dictionary | None:
    """The very fit, where it is there already."""
    if not (place / "cfg.json").is_file():
        return None
    there = Dictionary.load(place)
    if {key: there.about.get(key) for key in about} != about:
        raise ResultError(
            f"{place} holds another dictionary (other settings, model or weights): give another "
            "folder, or delete this one."
        )
    return there
