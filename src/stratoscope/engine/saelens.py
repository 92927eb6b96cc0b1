"""SAELens's folder of a sparse dictionary: `cfg.json` beside `sae_weights.safetensors`.

Read as SAELens 6 reads it, older folders too. What it would leave out in silence and what changes
the numbers is refused by name: an architecture or a key that is not known here, a scale that was
never folded in. These are plain functions of a config and named tensors;
`engine.dictionary.Dictionary` is what they describe.

A dictionary speaks of the activations that it was trained on. SAELens trains on TransformerLens's,
which by default centres what is written to the residual stream; Hugging Face's are not centred.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stratoscope.errors import LoadError, SiteError
from stratoscope.models.sites import parse

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
VERSION = "6.0.0"  # of the format that is written

# SAELens's own name -> our kind. A topk or gated transcoder has no name there, but one here.
_NAMES = {"standard": "relu", "topk": "topk", "gated": "gated", "jumprelu": "jumprelu"}
_TRANSCODERS = {
    f"{'' if name == 'standard' else name + '_'}{skip}transcoder": kind
    for name, kind in _NAMES.items()
    for skip in ("", "skip_")
}
# a training that was saved as it stood; what SAELens makes of one at its end is a jumprelu
_IN_TRAINING = {"batchtopk": "batchtopk", "matryoshka_batchtopk": "batchtopk"}
KINDS = _NAMES | _TRANSCODERS | _IN_TRAINING
_OF_KIND = {kind: name for name, kind in _NAMES.items()} | {"batchtopk": "jumprelu"}
_TENSORS = {
    "relu": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "batchtopk": ("b_enc", "topk_threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
_READ = {
    "architecture", "d_in", "d_sae", "d_out", "dtype", "apply_b_dec_to_input", "metadata", "k",
    "normalize_activations", "reshape_activations", "rescale_acts_by_decoder_norm",
}  # fmt: skip
# how it was trained, and where it lay: the same function whatever stands there
_INDIFFERENT = {
    "device", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "l0_coefficient",
    "l0_warm_up_steps", "decoder_init_norm", "aux_loss_coefficient", "topk_threshold_lr",
    "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode",
    "jumprelu_tanh_scale", "pre_act_loss_coefficient", "use_sparse_activations",
    "matryoshka_widths", "use_matryoshka_aux_loss", "sae_lens_version",
    "sae_lens_training_version",
}  # fmt: skip
_OFF = (None, False, "none", "", {}, [])


def fields(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: str, scale: float | None
) -> dict[str, Any]:
    """What the folder says, as the arguments of a `Dictionary`.

    where: the folder, for messages. scale: what activations were multiplied by in training, for
    `expected_average_only_in`. Raises LoadError.
    """
    config = _today(config, where)
    _refuse_unknown(config, where)
    name = config.get("architecture", "standard")
    kind, transcoder = KINDS[name], "transcoder" in name
    held = _tensors(config, tensors, kind, skip="skip" in name, where=where)
    out, about = held.pop("b_dec"), dict(config.get("metadata") or {})
    if held.pop("topk_threshold", None) is not None:
        held["threshold"] = tensors["topk_threshold"].to(held["b_enc"]).expand_as(held["b_enc"])
    kind = about.pop("kind", kind)  # ours: of a batchtopk, which SAELens keeps as a jumprelu
    shared = not transcoder and config.get("apply_b_dec_to_input", True)
    made = (
        held
        | {
            "b_enc": held.pop("b_gate") if kind == "gated" else held["b_enc"],
            "b_dec": out if shared else out.new_zeros(len(held["W_enc"])),
            "b_dec_out": None if shared else out,
            "kind": kind,
            "k": config.get("k") if kind == "topk" else None,
            "rescale": config.get("rescale_acts_by_decoder_norm", name in _IN_TRAINING),
            "normalise": config.get("normalize_activations", "none"),
            "about": about,
        }
        | _sites(about, transcoder)
    )
    if made["normalise"] == "expected_average_only_in":
        if scale is None:
            raise LoadError(
                f"{where}: `normalize_activations` is 'expected_average_only_in', and the factor "
                "that activations were multiplied by in training is not in the folder: give it as "
                "`scale=` (1.0 takes them as they are, as SAELens's load_from_disk does)."
            )
        _fold(made, scale)
    return made


def folder(made: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors to write, of the fields of a `Dictionary`. What SAELens has no
    word for is folded into the encoder: the same function but for rounding."""
    made = dict(made)
    kind, skip = made["kind"], made["W_skip"] is not None
    transcoder = skip or made["site_in"] != made["site_out"]
    _express(made)
    name = _OF_KIND[kind]
    if transcoder:
        name = f"{'' if kind == 'relu' else name + '_'}{'skip_' if skip else ''}transcoder"
    shared = made["b_dec_out"] is None
    bias = "b_gate" if kind == "gated" else "b_enc"
    tensors = {name: made[name] for name in ("W_enc", "W_dec")} | {
        bias: made["b_enc"],
        "b_dec": made["b_dec"] if shared else made["b_dec_out"],
    }
    extra = ("threshold", "b_mag", "r_mag", "W_skip")
    tensors |= {name: made[name] for name in extra if made[name] is not None}
    sites = {"hook_name": hook_name(made["site_in"]), "site_in": made["site_in"]}
    if transcoder:
        sites |= {"hook_name_out": hook_name(made["site_out"]), "site_out": made["site_out"]}
    config = {
        "architecture": name,
        "d_in": len(made["W_enc"]),
        "d_sae": len(made["W_dec"]),
        "dtype": str(made["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": shared and not transcoder,
        "normalize_activations": made["normalise"],
        "reshape_activations": "hook_z" if made["site_in"].endswith("attn.z") else "none",
        "metadata": {"sae_lens_version": VERSION, "sae_lens_training_version": VERSION}
        | dict(made["about"])
        | sites
        | ({"kind": kind} if kind == "batchtopk" else {}),
    }
    config |= {"d_out": made["W_dec"].shape[1]} if transcoder else {}
    if kind == "topk":
        config |= {"k": made["k"], "rescale_acts_by_decoder_norm": made["rescale"]}
    return config, tensors


def hook_name(site: str) -> str:
    """A site as TransformerLens calls it; as it is called here where it has no name there. What an
    MLP reads has a name with SAELens and circuit-tracer."""
    if read := re.fullmatch(r"layers\.(\d+)\.mlp\.in", site):
        return f"blocks.{read[1]}.mlp.hook_in"
    try:
        at = parse(site)
    except SiteError:  # a name of TransformerLens that is none here, as it was read
        return site
    first, _, last = at.point.partition(".")
    points = (
        f"hook_{at.point}", f"{first}.hook_{last}", f"hook_{first}_{last}",
        f"{first}.hook_rot_{last}", f"{first}.hook_post",
    )  # fmt: skip
    for name in points if at.tower == "" and at.layer is not None else ():
        there = f"blocks.{at.layer}.{name}"
        try:
            if parse(there) == at and not parse(there).alias:
                return there
        except SiteError:
            continue
    return site


def _today(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config of SAELens below 6 as 6 reads it; one that has `metadata` is of 6 already."""
    if "metadata" in config:
        return dict(config)
    renamed = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    old = {renamed.get(key, key): value for key, value in config.items()}
    given, more = old.get("activation_fn") or "relu", old.get("activation_fn_kwargs") or {}
    if given not in ("relu", "topk") or old.get("finetuning_scaling_factor"):
        key = "activation_fn" if given not in ("relu", "topk") else "finetuning_scaling_factor"
        raise LoadError(
            f"{where}: the key `{key}` is {old[key]!r}, which changes what the dictionary "
            "computes, and neither SAELens 6 nor this has it. Give a folder without it."
        )
    new = {key: value for key, value in old.items() if key in _READ}
    if given == "topk":
        new |= {"architecture": "topk", "k": more.get("k")}
    normal = new.get("normalize_activations") or "none"
    new["normalize_activations"] = "expected_average_only_in" if normal is True else normal
    new.setdefault(
        "reshape_activations", "hook_z" if "hook_z" in str(old.get("hook_name")) else "none"
    )
    new["metadata"] = {
        key: old[key]
        for key in ("model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos")
        if key in old
    }
    return new


def _refuse_unknown(config: Mapping[str, Any], where: str) -> None:
    name = config.get("architecture", "standard")
    if name not in KINDS:
        raise LoadError(
            f"{where}: the architecture {name!r} is none of those that are read here "
            f"({', '.join(KINDS)})."
        )
    about = config.get("metadata") or {}
    odd = {k: v for k, v in config.items() if k not in _READ | _INDIFFERENT}
    odd |= {k: about.get(k) for k in ("hook_head_index", "hook_head_index_out")}
    normal = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")
    allowed = {"normalize_activations": normal, "reshape_activations": ("none", "hook_z")}
    odd |= {k: config[k] for k, known in allowed.items() if config.get(k, "none") not in known}
    for key, value in odd.items():
        if value not in _OFF or (key in allowed and value is not None):
            raise LoadError(
                f"{where}: the key `{key}` is {value!r:.60}, and what that does to the numbers is "
                f"not known here. If it changes nothing, take it out of {CONFIG}."
            )


def _tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: str, *, skip: bool, where: str
) -> dict[str, Tensor]:
    """The tensors that this kind has, in the config's dtype; no others may be there."""
    names = ["W_enc", "W_dec", "b_dec", *_TENSORS[kind], *(["W_skip"] if skip else [])]
    ones = tensors.get("scaling_factor")  # of an old folder that was never fine-tuned
    extra = set() if ones is None or not bool((ones == 1).all()) else {"scaling_factor"}
    if odd := set(names) ^ (set(tensors) - extra):
        raise LoadError(
            f"{where}: a dictionary of this architecture has the tensors {', '.join(names)}; "
            f"{WEIGHTS} has {', '.join(sorted(tensors))} (differs in {', '.join(sorted(odd))})."
        )
    shape = tuple(tensors["W_enc"].shape), tuple(tensors["W_dec"].shape)
    (d_in, d_sae), d_out = shape[0], shape[1][-1]
    found = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out}
    for key, size in found.items():
        if config.get(key, size) != size:
            raise LoadError(
                f"{where}: {CONFIG} says {key} = {config[key]}, and by {WEIGHTS} it is {size}."
            )
    dtype = getattr(torch, str(config.get("dtype", "float32")).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise LoadError(f"{where}: `dtype` is {config['dtype']!r}, which torch does not know.")
    return {name: tensors[name].to(dtype) for name in names}


def _sites(about: dict[str, Any], transcoder: bool) -> dict[str, str]:
    """By our own names where these were written, else by those of TransformerLens."""
    read = about.pop("site_in", None) or _site(about.get("hook_name"))
    written = about.pop("site_out", None) or _site(about.get("hook_name_out"))
    return {"site_in": read, "site_out": written if transcoder else read}


def _site(hook: str | None) -> str:
    if read := re.fullmatch(r"blocks\.(\d+)\.mlp\.hook_in", hook or ""):
        return f"layers.{read[1]}.mlp.in"
    try:
        return str(parse(hook or ""))
    except SiteError:
        return hook or ""  # whoever uses it is told


def _fold(made: dict[str, Any], scale: float) -> None:
    """A dictionary of `scale * x` as one of x."""
    made["W_enc"] = made["W_enc"] * scale
    for name in ("W_dec", "b_dec", "b_dec_out"):
        made[name] = None if made[name] is None else made[name] / scale
    made["normalise"] = "none"


def _express(made: dict[str, Any]) -> None:
    """Fold what a folder has no place for."""
    if made["rescale"] and made["kind"] != "topk":
        norm = made["W_dec"].norm(dim=-1)
        made |= {"W_enc": made["W_enc"] * norm, "b_enc": made["b_enc"] * norm, "rescale": False}
        made["W_dec"] = made["W_dec"] / norm[:, None]
    if made["b_dec_out"] is not None and bool(made["b_dec"].any()):
        away = made["b_dec"] @ made["W_enc"]
        made["b_enc"] = made["b_enc"] - away
        if made["b_mag"] is not None:
            made["b_mag"] = made["b_mag"] - away * made["r_mag"].exp()
        made["b_dec"] = torch.zeros_like(made["b_dec"])
    elif made["b_dec_out"] is None and made["site_in"] != made["site_out"]:
        made["b_dec_out"] = made["b_dec"]
        _express(made)
