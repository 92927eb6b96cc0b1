"""Whether a model can be looked into at all: taken out of wrappers, its weights in memory and
finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stratoscope.errors import FamilyError, LoadError

# wrappers that hold the model they were given, unchanged, under an attribute
_INSIDE = {
    "DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "module", "DeepSpeedEngine": "module",
}  # fmt: skip
_SHARDED = frozenset({"FullyShardedDataParallel", "DeepSpeedEngine"})


def ready(model: Any) -> nn.Module:
    """The Hugging Face model itself, out of DataParallel or `torch.compile`'s wrapper.

    Raises FamilyError for what is no such model (a pipeline, a peft wrapper), for weights that are
    not in memory, and for weights that are not numbers, naming the first parameter.
    """
    kind = type(model).__name__
    if kind in _SHARDED:
        raise FamilyError(
            f"{kind} holds a share of each weight on each device: gather the model on one, then "
            "wrap it."
        )
    while type(model).__name__ in _INSIDE:
        model = getattr(model, _INSIDE[type(model).__name__])
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        raise FamilyError(
            f"{kind} is peft's wrapper: wrap `model.get_base_model()`, in which the adapter stays "
            "active and is counted in "
            f"every weight, or `model.merge_and_unload()`."
        )
    if (
        not isinstance(model, nn.Module)
        or not hasattr(model, "config")
        or not hasattr(model, "base_model")
    ):
        inside = (
            " Pass its `.model`, and its `.tokenizer` as tokenizer."
            if hasattr(model, "model")
            else ""
        )
        raise FamilyError(
            f"`wrap` takes a Hugging Face model (PreTrainedModel); this is {kind}.{inside}"
        )
    absent = next((name for name, p in model.named_parameters() if p.device.type == "meta"), None)
    if absent is not None:
        raise FamilyError(
            f"`{absent}` of {kind} is not in memory (device `meta`: weights offloaded to disk or "
            "to another device, or never "
            'loaded). Load the model without `device_map="auto"` or offloading, in a smaller '
            "dtype if it must be."
        )
    refuse_not_finite(model)
    return model


@torch.no_grad()
def refuse_not_finite(model: nn.Module) -> None:
    """Raise FamilyError that names the first parameter with a value that is NaN or infinite."""
    for name, parameter in model.named_parameters():
        x = parameter.detach()
        # a sum is one quick pass; where it overflows the values are looked at
        # quantised tensors answer few questions
        plain = type(parameter) is nn.Parameter and x.is_floating_point()
        if plain and not bool(x.sum().isfinite()) and not bool(x.isfinite().all()):
            wrong = ~x.isfinite()
            at = tuple(int(i) for i in wrong.nonzero()[0])
            raise FamilyError(
                f"{int(wrong.sum())} of {x.numel()} values of `{name}` are not finite numbers, "
                f"first {float(x[at])} at {at}: "
                "training diverged, or the file is damaged. Nothing can be measured on this "
                "model, so it is refused."
            )


def chosen_device(device: str | torch.device) -> torch.device:
    """The device that is meant; "auto" is the first CUDA GPU where there is one, else the CPU.

    Apple's mps is taken by name alone: it has no float64, in which several measures count. Raises
    LoadError, as `refuse_no_device`.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_no_device(device)
    return torch.device(device)


def refuse_no_device(device: str | torch.device) -> None:
    """Raise LoadError for a device that torch does not know, or that this machine does not have."""
    have = ["cpu", *(n for n in ("cuda", "mps", "xpu") if getattr(torch, n).is_available())]
    problem = f"device {str(device)!r}: this machine has {', '.join(have)} (or say auto)"
    try:
        kind = torch.device(device)
    except (RuntimeError, TypeError):
        raise LoadError(f"{problem}; choose one of these.") from None
    if kind.type in ("cuda", "mps", "xpu") and kind.type not in have:
        raise LoadError(
            f"{problem}; choose one of these, or install a torch built for {kind.type}."
        )
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise LoadError(
            f"{problem}, with {torch.cuda.device_count()} cuda devices, numbered from 0."
        )
    if kind.type == "meta":
        raise LoadError(f"{problem}; `meta` holds no weights.")
