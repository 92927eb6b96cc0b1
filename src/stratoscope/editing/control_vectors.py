"""Steering vectors in the files of other programs: llama.cpp's and repeng's control vectors, and
lm-eval's steering file.

    write_gguf(fitted, "calm.gguf", strength=4.0, layers=[10, 11, 12])   llama-cli --control-vector
    read_gguf("calm.gguf", lm)
    write_lm_eval(lm, fitted, "calm.pt", layers=12, strength=4.0)        lm_eval --model steered
    read_lm_eval(lm, "calm.pt")

A control vector is a GGUF of architecture `controlvector` with float32 tensors `direction.N` of the
width of the stream, added to what layer N gives (counted from 0: our `layers.N.resid_post`) at
every token; llama.cpp refuses `direction.0`. `controlvector.model_hint` names the architecture.
lm-eval's file says, for each module below the base model, what is added to its output. It is a
pickle, since lm-eval reads nothing else; it is read here as tensors and numbers alone, and whatever
would call something in it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stratoscope.editing._steered import fitting
from stratoscope.editing.steer import Steering
from stratoscope.errors import InputError, LoadError
from stratoscope.models.lm import LM
from stratoscope.models.sites import parse

Layers = int | Sequence[int] | Literal["all"] | None
# what llama.cpp calls an architecture where Transformers has a name of its own for it
_HINTS = {"mistral": "llama"}
_KEY = "controlvector"


def write_gguf(
    fitted: Steering,
    path: str | Path,
    *,
    layers: Layers = "all",
    strength: float = 1.0,
    model_type: str = "",
) -> None:
    """Write a control vector, strength times each.

    model_type: `config.model_type`, where the fit does not say it (`fitted.settings`). Raises
    InputError for vectors of another site than resid_post and for layer 0, which llama.cpp cannot
    add; LoadError when the file cannot be written.
    """
    import gguf

    hint = model_type or str(fitted.settings.get("model_type", ""))
    if not hint:
        raise InputError(
            "a control vector says of what architecture it is: give model_type=, as "
            "lm.model.config.model_type says it."
        )
    lines = _streams(fitted, layers)
    if 0 in lines:
        raise InputError(
            "llama.cpp refuses a direction of layer 0: leave it out, layers=[1, 2, ...]."
        )
    with _in_one_step(path) as part:
        writer = gguf.GGUFWriter(part, _KEY)
        writer.add_string(f"{_KEY}.model_hint", hint)
        writer.add_uint32(f"{_KEY}.layer_count", len(lines))
        for layer, vector in lines.items():
            writer.add_tensor(f"direction.{layer}", (vector.float() * strength).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf(path: str | Path, lm: LM | None = None, *, foreign: bool = False) -> Steering:
    """A control vector as a fit, whose sites are `layers.N.resid_post`; directions of one layer are
    added up, as llama.cpp does.

    lm: the model that it is for, of whose architecture, layers and width it must be. foreign: of
    its architecture it need not. Raises LoadError for a file that is none, InputError for one of
    another model.
    """
    import gguf

    path = Path(path)
    try:
        file = gguf.GGUFReader(path)
        kind, hint = (_word(file, n) for n in ("general.architecture", f"{_KEY}.model_hint"))
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise LoadError(f"{path} cannot be read as GGUF ({error}): give another file.") from error
    if kind != _KEY:
        raise LoadError(f"{path} is a GGUF of {kind or 'nothing named'!r}, not a control vector.")
    vectors: dict[str, Tensor] = {}
    for tensor in file.tensors:
        layer = tensor.name.removeprefix("direction.")
        if not layer.isdigit() or tensor.data.dtype != np.float32 or tensor.data.ndim != 1:
            raise LoadError(
                f"{path} holds {tensor.name!r} of {tensor.data.dtype} {tensor.data.shape}: a "
                "control vector holds float32 vectors direction.N."
            )
        name = f"layers.{int(layer)}.resid_post"
        own = torch.from_numpy(np.array(tensor.data))
        vectors[name] = vectors[name] + own if name in vectors else own
    if not vectors:
        raise LoadError(f"{path} holds no direction.N: give another control vector.")
    if lm is not None:
        here = lm.model.config.model_type
        if not foreign and hint not in (here, _HINTS.get(here)):
            raise InputError(
                f"{path} is a control vector of {hint!r}, and this model is a {here!r}: fit one on "
                "this model, or say foreign=True."
            )
        _refuse_misfit(lm, vectors)
    settings = {"model_type": hint, "file": path.name}
    return Steering(vectors=vectors, settings=settings, seed=None, provenance={})


def write_lm_eval(
    lm: LM,
    fitted: Steering,
    path: str | Path,
    *,
    layers: Layers = None,
    strength: float = 1.0,
) -> None:
    """Write the steering file of lm-eval's `steered` models: score a steered model on its tasks.

    Raises InputError for vectors of another site than resid_post or of another model, and for a
    path that lm-eval would not take for one; LoadError when the file cannot be written.
    """
    if Path(path).suffix not in (".pt", ".pth"):
        raise InputError(f"{path}: lm-eval takes a steering file by its name, .pt or .pth.")
    lines = _streams(fitted, layers)
    _refuse_misfit(lm, {f"layers.{layer}.resid_post": vector for layer, vector in lines.items()})
    names = {layer: name for name, layer in _modules(lm).items()}
    table = {
        names[layer]: {
            "steering_vector": vector.float(),
            "steering_coefficient": float(strength),
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for layer, vector in lines.items()
    }
    with _in_one_step(path) as part:
        torch.save(table, part)


def read_lm_eval(lm: LM, path: str | Path) -> Steering:
    """lm-eval's steering file as a fit, its coefficients multiplied in.

    Raises LoadError for a file that is none, or holds more than tensors, numbers and texts;
    InputError for modules that are no layers of this model, another width, and what is no addition
    to whole layers (a clamp, a head).
    """
    try:
        table = torch.load(path, map_location="cpu", weights_only=True)
        rows = {str(name): dict(row) for name, row in table.items()}
        vectors = {name: row["steering_vector"] for name, row in rows.items()}
    except Exception as error:
        # caught broadly: what is no such file fails in torch's reader in many ways
        raise LoadError(
            f"{path} cannot be read as lm-eval's steering file ({str(error)[:200]}): give a .pt of "
            "hookpoints with steering_vector, steering_coefficient and action."
        ) from error
    modules, found = _modules(lm), {}
    for name, row in rows.items():
        odd = row.get("action") != "add" or any(
            row.get(key) is not None for key in ("bias", "head_index")
        )
        if odd or name not in modules:
            what = f"action {row.get('action')!r} at {name!r}" if odd else f"a module {name!r}"
            raise InputError(
                f"{path} holds {what}: read are additions to whole layers of this model, "
                f"{next(iter(modules))!r} and so on."
            )
        scale = float(row.get("steering_coefficient", 1.0))
        found[f"layers.{modules[name]}.resid_post"] = vectors[name].float() * scale
    _refuse_misfit(lm, found)
    settings = {"model_type": lm.model.config.model_type, "file": Path(path).name}
    return Steering(vectors=found, settings=settings, seed=None, provenance={})


def _streams(fitted: Steering, layers: Layers) -> dict[int, Tensor]:
    """The vectors by layer. Raises InputError for one of another site than resid_post."""
    found = {}
    for site, vector in fitted.at(layers).items():
        if site.tower or site.point != "resid_post" or site.layer is None:
            raise InputError(
                f"`{site}`: other programs add vectors to what a whole layer gives, resid_post. "
                "Fit one there, or keep these with `save`."
            )
        found[int(site.layer)] = vector
    return found


def _refuse_misfit(lm: LM, vectors: Mapping[str, Tensor]) -> None:
    """Raise InputError or SiteError where a vector is of no site, or not of the width, of lm."""
    for name, vector in vectors.items():
        fitting(lm, parse(name), vector, 1.0)


def _modules(lm: LM) -> dict[str, int]:
    """The layers by what lm-eval calls them: their names below the base model."""
    layers = {id(layer): number for number, layer in enumerate(lm.layout.layers[""])}
    named = lm.model.base_model.named_modules()
    return {name: layers[id(module)] for name, module in named if id(module) in layers}


def _word(file: Any, key: str) -> str:
    """A text of a GGUF's header, "" where it is not there."""
    field = file.get_field(key)
    return "" if field is None else bytes(field.parts[-1]).decode("utf-8", "replace")


@contextmanager
def _in_one_step(path: str | Path) -> Iterator[Path]:
    """A place beside the path, which takes its place at the end; on an error what was there stays.
    Raises LoadError where nothing can be written."""
    part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        raise LoadError(
            f"{path} could not be written: {error}. Make room, or give another path."
        ) from error
    finally:
        part.unlink(missing_ok=True)
