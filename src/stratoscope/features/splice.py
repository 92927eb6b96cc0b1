"""Splice: let the model run on through a sparse dictionary, with some of its features changed.

Paper: textbook (Marks et al., "Sparse feature circuits", 2024, for the error that stays)

    keep:   y' = y + decode(z') - decode(z)         z = encode(x), z' = z with features changed
    drop:   y' = decode(z')

x and y are what the dictionary reads and writes: one site for an autoencoder, two for a transcoder.
Kept, the dictionary's error stays in the model, so that nothing changes but what the features
write, and a change of nothing changes nothing, not a bit. Dropped, the model goes on with what the
dictionary alone says. It acts at every token, the first one too.

Reads as: what depends on these features, once outputs with and without the edit are compared. Does
not show that the features are the model's own: a direction that no computation uses can be switched
off to some effect too; compare with as many other active features of the same norm.
Cost: one encoding a token, two products of dim x features; nothing where nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stratoscope.engine.dictionary import Dictionary
from stratoscope.engine.edit import Edit
from stratoscope.errors import InputError, LoadError
from stratoscope.features._between import Change, between
from stratoscope.models.lm import LM
from stratoscope.store import tensors as files

Error = Literal["keep", "drop"]
Request = Dictionary | str | Path | Sequence[Dictionary | str | Path]
# a feature of the one dictionary there is, or (dictionary, feature); JSON's keys are "3", "0,3"
Feature = int | str | Sequence[int]


class Splice(Edit):
    """An edit that runs dictionaries inside its block. Nests; everything is put back on any exit.

    values: of each dictionary, the features that are held, and at what.
    """

    def __init__(
        self,
        lm: LM,
        dictionaries: Sequence[Dictionary],
        values: Sequence[Mapping[int, float]],
        error: Error,
    ) -> None:
        super().__init__(lm, note=_note(dictionaries, values, error))
        self.error: Error = error
        self.values = [dict(held) for held in values]
        self.dictionaries = [one.to(lm.model.device) for one in dictionaries]
        self._sites = [one.sites(lm) for one in self.dictionaries]

    def __enter__(self) -> Splice:
        with ExitStack() as opening:
            super().__enter__()
            opening.callback(super().__exit__)
            for one, sites, held in zip(self.dictionaries, self._sites, self.values):
                if held or self.error == "drop":
                    change = spliced(one, held, self.error)
                    opening.enter_context(between(self.lm, *sites, change))
            self._open.append(opening.pop_all())
        return self

    def save(self, path: str | Path) -> None:
        """Write dictionaries and all in one safetensors file. Raises LoadError when it cannot be
        written; a file that was there stays then."""
        tensors, about = {}, []
        for number, one in enumerate(self.dictionaries):
            own, rest = one.parts()
            tensors |= {f"{number}/{name}": x for name, x in own.items()}
            about.append(rest)
        held = [[[*pair] for pair in values.items()] for values in self.values]
        told = {"dictionaries": about, "values": held, "error": self.error}
        try:
            files.write(path, tensors, kind="splice", about=told)
        except OSError as error:
            raise LoadError(
                f"The splice could not be written to {path}: {error}. Make room, or give another "
                "path."
            ) from error

    @classmethod
    def load(cls, lm: LM, path: str | Path) -> Splice:
        """Read what `save` wrote. Raises LoadError for another file, InputError for a model of
        another width."""
        tensors, about = files.read(path, kind="splice")
        made = []
        for number, rest in enumerate(about["dictionaries"]):
            own = {
                name.partition("/")[2]: x
                for name, x in tensors.items()
                if name.startswith(f"{number}/")
            }
            made.append(Dictionary(**own, **rest))
        return cls(lm, made, [{int(f): v for f, v in held} for held in about["values"]],
                   about["error"])  # fmt: skip


def edit(
    lm: LM,
    request: Request,
    *,
    error: Error = "keep",
    off: Sequence[Feature] | None = None,
    set: Mapping[Any, float] | None = None,
) -> Splice:
    """An edit that changes features: `with splice.edit(lm, [dictionary], off=[17]): lm(...)`.

    request: dictionaries, or folders of them. error: whether what a dictionary does not say stays
    ("keep") or is left out ("drop"). off: features held at 0; set: features by what they are held
    at. A feature is a number, or (dictionary, number) where there are several dictionaries. Raises
    InputError for a feature that is not there, or a dictionary of another width than the model has
    at its site; SiteError for a site that the model lacks.
    """
    given = [request] if isinstance(request, (Dictionary, str, Path)) else list(request)
    if not given:
        raise InputError("a splice is of at least one dictionary; got an empty list.")
    if error not in ("keep", "drop"):
        raise InputError(f"error={error!r}: 'keep' what a dictionary does not say, or 'drop' it.")
    loaded = [one if isinstance(one, Dictionary) else Dictionary.load(one) for one in given]
    values: list[dict[int, float]] = [{} for _ in loaded]
    for feature, value in [*((one, 0.0) for one in off or ()), *(set or {}).items()]:
        number, index = _feature(feature, loaded)
        if not torch.isfinite(torch.tensor(float(value))):
            raise InputError(f"feature {index} cannot be held at {value}: give a finite number.")
        values[number][index] = float(value)
    return Splice(lm, loaded, values, error)


def spliced(dictionary: Dictionary, held: Mapping[int, float], error: Error) -> Change:
    """What takes the place of y: a function of x and y, (example, position, width) each."""
    units = list(held)
    # made once: nothing waits for the device in the run
    index = torch.tensor(units, dtype=torch.long, device=dictionary.W_enc.device)
    value = torch.tensor([held[unit] for unit in units]).to(dictionary.W_enc)

    def change(x: Tensor, y: Tensor) -> Tensor:
        z = dictionary.encode(x)
        new = z.index_copy(-1, index, value.expand(*z.shape[:-1], -1)) if units else z
        if error == "drop":
            return dictionary.decode(new, x).to(y.dtype)
        return y + dictionary.moved(new - z, x).to(y.dtype)

    return change


def _feature(feature: Any, dictionaries: Sequence[Dictionary]) -> tuple[int, int]:
    given = feature.split(",") if isinstance(feature, str) else feature
    pair = [int(one) for one in (given if isinstance(given, Sequence) else [given])]
    pair, several = [0, *pair][-2:], len(pair) == 1 and len(dictionaries) > 1
    if several or len(pair) != 2 or not 0 <= pair[0] < len(dictionaries):
        raise InputError(
            f"feature {feature!r}: there are {len(dictionaries)} dictionaries, so give "
            "(dictionary, feature), both numbered from 0."
        )
    there = dictionaries[pair[0]].features
    if not 0 <= pair[1] < there:
        raise InputError(
            f"feature {pair[1]} of dictionary {pair[0]}: it has {there}, numbered 0 to {there - 1}."
        )
    return pair[0], pair[1]


def _note(
    dictionaries: Sequence[Dictionary], values: Sequence[Mapping[int, float]], error: Error
) -> str:
    parts = []
    for one, held in zip(dictionaries, values):
        listed = ", ".join(f"{f}={v:g}" for f, v in list(held.items())[:8])
        more = f" and {len(held) - 8} more" if len(held) > 8 else ""
        parts.append(f"{one.site_out}: {listed or 'no feature'}{more}")
    return f"features held ({error} the error): {'; '.join(parts)}"
