"""Attribution of a transcoder's feature, or of an answer, to earlier features, heads and tokens.

Paper: transcoders

    pre_j            = f_enc[j] . norm(x) + b         x the stream before the MLP, at one position
    attribution[i]   = z_i (f_dec[i] . v),            v = f_enc[j] back through the norm
    invariant[i]     = f_dec[i] . f_enc[j] through the norm's weights: the same on every input
    attribution[i]   = scale z_i invariant[i],        scale the norm's 1 / rms there, held
    brought[h, s]    = A[t, s] (W_O^h W_V^h norm(x_s)) . v
    embed, bias, error[l]    what enters layer 0; biases; what layer l's dictionary does not say
    total            = embed + sum attribution + sum brought + sum error + bias = pre_j

Which earlier feature does this one hear, on this prompt and on any? One factor is of the input, the
other of the weights alone. Of a feature (layer, number) total is what its activation is taken of;
of an answer and a foil it is the difference of their logits. All layers without a dictionary write
into `error`, whole. To go on backwards ask for the feature that is found, or go through a head
(`via`) to the features at the token that it reads.

Reads as: which features' outputs, at this token, make up what the feature reads, where norms are
held as they are. Does not show what comes about by attention patterns or by another scale, nor that
the dictionary's features are the model's: `error` says how much of it they leave out.
Cost: two or three runs of each example, one for each dictionary and two for each head of `via`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.backwards import to_heads
from stratoscope.engine.dictionary import Dictionary
from stratoscope.engine.metric import Words, target
from stratoscope.engine.places import MLPInput, place, seen
from stratoscope.engine.trace import capture
from stratoscope.engine.wiring import wiring
from stratoscope.engine.writes import head_writes
from stratoscope.errors import InputError, SiteError
from stratoscope.features._readers import Reader, behind, of_answer, of_feature
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.results import dataset

Given = Sequence[Dictionary | str | Path]


def attributed(
    features: Float[Tensor, " feature"], W_dec: Float[Tensor, "feature dim"], v: Tensor
) -> Float[Tensor, " feature"]:
    """z_i (f_dec[i] . v) of every feature."""
    return features.double() * (W_dec.double() @ v)


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    dictionaries: Given,
    feature: Sequence[int] | None = None,
    answer: Words = None,
    foil: Words = None,
    at: int = -1,
    via: Sequence[Sequence[int]] = (),
) -> xr.Dataset:
    """attribution, activation (example, layer, feature), invariant (layer, feature), brought
    (example, layer, head, position), error (example, layer), and embed, bias, scale and total
    (example).

    dictionaries: transcoders or folders of them, at most one a layer, that read `mlp.in`. feature:
    (layer, number) of one of them; else answer and foil, tokens whose logits' difference is asked.
    at: the position, from the prompt's start or (negative) its end; an answer is read at the last.
    via: heads to go back through, (layer, head, position read) each: what the last of them brings
    is taken apart there, under the attention that it has, and nothing of it is invariant. NaN where
    there is no such layer before, feature or position. Raises InputError for what is no
    feature, SiteError where the stream is no sum or what reads it not linear.
    """
    wires, batch = wiring(lm), lm.batch(inputs)
    if lm.layout.gated:
        raise SiteError(f"what heads of {lm.family.name} give is gated, so not linear in values.")
    wanted = None
    if feature is None:
        if answer is None or foil is None:
            raise InputError("give feature=(layer, number), or an answer and a foil.")
        wanted = target(lm, batch, answer, foil, single="it takes one token's logit apart")
    held = _by_layer(lm, dictionaries)
    layer = None if feature is None else _asked(held, feature)
    most = max(one.features for one in held.values())
    found = []
    for n, length in enumerate(batch.lengths.tolist()):
        one = batch.example(n)
        if wanted is not None:
            unembed = lm.weight("logits").detach().double()
            reader = of_answer(lm, one, unembed[wanted.answer[n]] - unembed[wanted.foil[n]])
        elif feature is not None and layer is not None and -length <= at < length:
            number, position = int(feature[1]), at % length
            reader = of_feature(lm, one, held[layer], number, position, wires.parallel)
        else:
            raise InputError(f"at={at}: this prompt has {length} tokens.")
        for step in via:
            reader = behind(lm, one, reader, step)
        found.append(_parts(lm, one, held, reader))
    width = max(one["brought"].shape[-1] for one in found)
    axes = {
        "attribution": ("example", "layer", "feature"),
        "activation": ("example", "layer", "feature"),
        "brought": ("example", "layer", "head", "position"),
        "error": ("example", "layer"),
    } | dict.fromkeys(("embed", "bias", "scale", "total"), ("example",))
    sizes = {"layer": wires.layers, "feature": most, "position": width, "head": wires.heads}
    values = {
        name: (words, torch.stack([_fill(one[name], words[1:], sizes) for one in found]).float())
        for name, words in axes.items()
    }
    invariant = _fill(found[0]["invariant"], ("layer", "feature"), sizes).float()
    return dataset(
        values | {"invariant": (("layer", "feature"), invariant)},
        method="features.transcoder_paths",
        provenance=lm.provenance,
        settings={"feature": feature, "answer": answer, "foil": foil, "at": at, "via": via},
        coords=batch.coords() | ({} if wanted is None else wanted.coords),
        notes="" if wanted is None else " ".join(wanted.notes),
    )


def _parts(lm: LM, one: Batch, held: dict[int, Dictionary], reader: Reader) -> dict[str, Any]:
    """Every part of what is read, by its name."""
    t, v, length = reader.position, reader.v, int(one.lengths[0])
    points = ("attn.v", "attn.pattern", "attn.z")
    heard = [f"layers.{n}.{point}" for n in range(reader.heads) for point in points]
    written = [f"layers.{n}.mlp.out" for n in range(reader.layers)]
    runs = capture(lm, one, "layers.0.resid_pre", *heard, *written)
    made: dict[str, Any] = {"attribution": {}, "activation": {}, "invariant": {}, "error": {}}
    bias, brought = reader.constant, []
    for n, site in enumerate(written):
        said = torch.zeros_like(v)
        if n in held:
            own, at = held[n], place(lm, held[n].site_in)
            x = seen(lm, one, at)[at][0, t]
            z, out = own.encode(x), own.b_dec if own.b_dec_out is None else own.b_dec_out
            made["activation"][n] = z.double()
            made["attribution"][n] = attributed(z, own.W_dec, v)
            made["invariant"][n] = own.W_dec.double() @ reader.unscaled
            said, bias = own.decode(z, x).double(), bias + out.double() @ v
        made["error"][n] = (runs[site][0, t].double() - said) @ v
    for n in range(reader.heads):
        values, pattern, z = (runs[f"layers.{n}.{point}"][0] for point in points)
        back = to_heads(lm, n, z[t, None], v[None])[0, 0]
        values = values.double().repeat_interleave(len(back) // values.shape[1], dim=1)
        along = torch.einsum("shk,hk->hs", values, back)
        brought.append(pattern[:, t, :length].double() * along[:, :length])
        bias = bias + head_writes(lm, n, z[t, None])[1][0] @ v
    head = torch.stack(brought) if brought else v.new_zeros(0, 0, length)
    embed = runs["layers.0.resid_pre"][0, t].double() @ v
    return made | {"brought": head, "embed": embed, "bias": bias, "scale": reader.scale,
                   "total": reader.total}  # fmt: skip


def _fill(value: Any, words: Sequence[str], sizes: dict[str, int]) -> Tensor:
    """On the whole axes, NaN elsewhere."""
    if not words:
        return value
    whole = torch.full([sizes[word] for word in words], torch.nan, dtype=torch.double)
    for n, one in value.items() if isinstance(value, dict) else enumerate(value):
        whole[(n, *(slice(size) for size in one.shape))] = one.cpu()
    return whole


def _by_layer(lm: LM, given: Given) -> dict[int, Dictionary]:
    held: dict[int, Dictionary] = {}
    for one in given:
        made = (one if isinstance(one, Dictionary) else Dictionary.load(one)).to(lm.model.device)
        read, written = made.sites(lm)
        mlp = isinstance(read, MLPInput) and written.point == "mlp.out" and not written.tower
        layer = int(written.layer) if mlp else -1
        if not mlp or read.pre.layer != layer or layer in held or made.normalise != "none":
            raise InputError(
                f"a dictionary of `{made.site_in}` and `{made.site_out}`: give transcoders from "
                "`layers.N.mlp.in` to `layers.N.mlp.out`, one a layer, that do not normalise."
            )
        if made.W_skip is not None or made.rescale:
            raise InputError(
                f"the transcoder of layer {layer} has a skip, or features in units of their rows: "
                "what it writes is not z times its rows. Give one without."
            )
        held[layer] = made
    if not held:
        raise InputError("give at least one transcoder: dictionaries= is empty.")
    return held


def _asked(held: dict[int, Dictionary], feature: Sequence[int]) -> int:
    layer, number = (int(x) for x in feature) if len(feature) == 2 else (-1, -1)
    if layer not in held or not 0 <= number < held[layer].features:
        there = ", ".join(f"layer {n} with {one.features} features" for n, one in held.items())
        raise InputError(f"feature={feature!r}: give (layer, number) of one of {there}.")
    return layer
