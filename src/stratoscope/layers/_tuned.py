"""A tuned lens as a value: one affine map for each depth, kept as a fit, or as the `tuned-lens`
package publishes it.

    from_published("gpt2-lens/", lm)       a folder of config.json and params.pt
    to_published(lens, "my-lens/", lm)     TunedLens.from_model_and_pretrained(model, "my-lens/")

Both add what the map gives to the stream, `h + A h + b`, and have a map for every depth but the
last. `params.pt` is a pickle, since the package reads nothing else; it is read here as tensors
alone, and whatever would call something in it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.errors import InputError, LoadError
from stratoscope.models.lm import LM
from stratoscope.store.fitted import Fitted


def translated(
    resid: Float[Tensor, "*rows dim"], weight: Float[Tensor, "dim dim"], bias: Float[Tensor, " dim"]
) -> Float[Tensor, "*rows dim"]:
    """h + A h + b, worked out in float32, in the precision that h comes in."""
    wide = resid.float()
    return (wide + wide @ weight.T + bias).to(resid.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class TunedLens(Fitted):
    """A and b of every depth but the last, which needs none. curve: [step, loss] of the training,
    in nats."""

    weight: Float[Tensor, "depth dim dim"]
    bias: Float[Tensor, "depth dim"]
    curve: Any = ()

    def __call__(self, resid: Float[Tensor, "*rows dim"], depth: int) -> Float[Tensor, "*rows dim"]:
        """The stream after `depth` layers as the last layer would leave it."""
        if depth == len(self.weight):
            return resid
        weight, bias = (x[depth].to(resid.device) for x in (self.weight, self.bias))
        return translated(resid, weight, bias)


def lens_of(lm: LM, given: TunedLens | str | Path, *, foreign: bool = False) -> TunedLens:
    """A lens, or that of a folder, ours or a published one, which must be of this model.

    Raises InputError for another number of layers or width, and for a lens that was fitted on
    other weights unless `foreign`; LoadError for a folder that holds none.
    """
    if isinstance(given, TunedLens):
        made = given
    elif (Path(given) / "params.pt").is_file():
        return from_published(given, lm, foreign=foreign)
    else:
        made = TunedLens.load(given)
    _refuse_misfit(lm, made)
    known, here = made.provenance.get("weights"), lm.provenance
    if known is not None and known != here.get("weights") and not foreign:
        raise InputError(
            f"this lens was fitted on {made.provenance.get('model')} ({known}), and this is "
            f"{here.get('model')} ({here.get('weights')}): fit one on this model, or say "
            "foreign=True to take it over."
        )
    return made


def from_published(folder: str | Path, lm: LM, *, foreign: bool = False) -> TunedLens:
    """A folder of config.json and params.pt, as the `tuned-lens` package writes and publishes it.

    foreign: take a lens of another unembedding than this model's. Raises LoadError for a folder
    that holds none, or a kind that is not known; InputError for a lens of another model.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        state = torch.load(folder / "params.pt", map_location="cpu", weights_only=True)
        depths, kind = int(config["num_hidden_layers"]), config.get("lens_type")
        weight = torch.stack([state[f"{n}.weight"].float() for n in range(depths)])
        odd = state.keys() - {f"{n}.{part}" for n in range(depths) for part in ("weight", "bias")}
        bias = torch.zeros_like(weight[:, 0])
        if config.get("bias", True):
            bias = torch.stack([state[f"{n}.bias"].float() for n in range(depths)])
    except Exception as error:
        # caught broadly: what is no such file fails in torch's reader in many ways
        raise LoadError(
            f"{folder} cannot be read as a tuned lens ({str(error)[:200]}): give a folder with "
            "config.json and params.pt, as the tuned-lens package saves one."
        ) from error
    if kind not in (None, "linear_tuned_lens") or odd:
        what = f"tensors {sorted(odd)[:3]}" if odd else f"the type {kind!r}"
        raise LoadError(f"{folder} holds a lens with {what}: only affine maps of layers are read.")
    made = TunedLens(
        weight=weight,
        bias=bias,
        settings={key: config.get(key) for key in ("base_model_name_or_path", "unembed_hash")},
        seed=None,
        provenance={},
    )
    _refuse_misfit(lm, made)
    known = config.get("unembed_hash")
    if known and known != unembed_hash(lm) and not foreign:
        raise InputError(
            f"the lens in {folder} was tuned for the unembedding of "
            f"{config.get('base_model_name_or_path')!r}, and this model has another: load that "
            "model, or say foreign=True to take the lens over."
        )
    return made


def to_published(lens: TunedLens, folder: str | Path, lm: LM) -> Path:
    """Write what the `tuned-lens` package reads. Raises InputError for a lens of another model,
    LoadError where nothing can be written; what was there stays then."""
    made, folder = lens_of(lm, lens), Path(folder)
    state = {}
    for number, (weight, bias) in enumerate(zip(made.weight, made.bias)):
        state |= {f"{number}.weight": weight.clone(), f"{number}.bias": bias.clone()}
    config = {
        "base_model_name_or_path": lm.provenance["model"],
        "d_model": made.weight.shape[1],
        "num_hidden_layers": len(made.weight),
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": unembed_hash(lm),
        "lens_type": "linear_tuned_lens",
    }
    parts = [folder / f".{name}.{os.getpid()}.part" for name in ("params.pt", "config.json")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, parts[0])
        parts[1].write_text(json.dumps(config), "utf-8")
        for part, name in zip(parts, ("params.pt", "config.json")):
            os.replace(part, folder / name)
    except (OSError, RuntimeError) as error:
        raise LoadError(
            f"The lens could not be written to {folder}: {error}. Make room, or give another "
            "folder."
        ) from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return folder


def unembed_hash(lm: LM) -> str:
    """By what the `tuned-lens` package knows an unembedding: of its numbers to one decimal, as
    NumPy prints them."""
    numbers = lm.weight("logits").detach().cpu().float().numpy()
    return hashlib.sha256(np.array_str(numbers, precision=1).encode()).hexdigest()


def _refuse_misfit(lm: LM, lens: TunedLens) -> None:
    wanted = (lm.dims.layers, lm.dims.dim, lm.dims.dim)
    if tuple(lens.weight.shape) != wanted or tuple(lens.bias.shape) != wanted[:2]:
        raise InputError(
            f"this lens has maps of {tuple(lens.weight.shape)} and {tuple(lens.bias.shape)}, where "
            f"{lm.family.name} has {wanted[0]} layers of width {wanted[1]}: fit one to this model."
        )
