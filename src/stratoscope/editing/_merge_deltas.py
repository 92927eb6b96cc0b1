"""What a trained model is, less its base, by the names of the base's tensors: of a whole model, of
an adapter's folder as PEFT saves it, without PEFT, and of a model in memory with adapters inside,
whose layers are asked what they apply. Nothing is read before it is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stratoscope.editing._merge_files import handle, header
from stratoscope.editing._merge_sources import (
    Weights,
    adapted,
    opened,
    refuse_other_base,
)
from stratoscope.errors import InputError, LoadError
from stratoscope.models import finite, weights
from stratoscope.models.lm import LM
from stratoscope.models.weights import is_plain

Read = Callable[[], Tensor]
Deltas = Mapping[str, Read]  # by the base's names; absent where nothing changes
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HALF = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
# initialisations that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ) change it too
_HARMLESS = (True, False, None, "gaussian", "eva", "orthogonal")


def of(base: Weights, source: Any, called: str) -> Deltas:
    """What a source has less the base, each tensor checked to be finite when it is read.

    called: how a model in memory is called in messages. Raises InputError for a source of another
    base, FamilyError for an adapted layer that is not linear in its input, LoadError for weights
    that cannot be read.
    """
    if isinstance(source, str | Path):
        called, folder = str(source), Path(source).expanduser()
        if (folder / CONFIG).is_file():
            return _checked(base, called, of_folder(base, folder))
    model = source.model if isinstance(source, LM) else source
    if isinstance(model, nn.Module) and adapted(model):
        return _checked(base, called, of_model(base, model, called))
    fine = opened(source, called)
    refuse_other_base(base, fine)
    plain = {name: partial(_of_one, base, fine, name, None) for name in base.floating}
    return _checked(base, called, plain)


def _checked(base: Weights, called: str, deltas: Deltas) -> Deltas:
    return {name: partial(_finite, base, name, called, x) for name, x in deltas.items()}


def _finite(base: Weights, name: str, called: str, delta: Read) -> Tensor:
    """A difference; one that is not finite is looked for in the base and then in the other."""
    x = delta().detach().to(base.device)
    if not bool(x.sum().isfinite()) and not bool(x.isfinite().all()):
        finite.refuse({f"`{name}` of {base.called}": base[name]})
        finite.refuse({f"`{name}` of {called}": x})
    return x


# --- a folder -------------------------------------------------------------------------------------


def of_folder(base: Weights, folder: Path) -> Deltas:
    """What a LoRA folder adds to the base: (lora_alpha / r) B A, and whatever it saved whole.

    Raises InputError for another kind of adapter, one whose base was changed with it, and one that
    is for another model, naming the first tensor that does not fit; LoadError for a damaged one.
    """
    config = _config(folder)
    rows = header(folder / FILE)[1]
    halves: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in rows:
        name = key.removeprefix(_PREFIX)
        if half := _HALF.fullmatch(name):
            halves.setdefault(half[1].replace(".base_layer", ""), {})[half[2]] = key
        else:
            whole[_clean(name)] = key
    read = handle(folder / FILE).get_tensor
    made: dict[str, Read] = {}
    for path, keys in halves.items():
        name, shapes = f"{path}.weight", {side: rows[key]["shape"] for side, key in keys.items()}
        if {*shapes} != {"A", "B"} or any(len(shape) != 2 for shape in shapes.values()):
            raise InputError(
                f"`{path}` of {folder} is no pair of matrices A and B ({shapes}): load it with "
                "PEFT, and give the model that has it."
            )
        turned = "lora_embedding" in keys["A"] or bool(config.get("fan_in_fan_out"))
        shape = (shapes["B"][0], shapes["A"][1])
        _refuse_misfit(base, folder, config, name, shape[::-1] if turned else shape)
        scale = _scale(config, path, shapes["A"][0])
        made[name] = partial(_product, read, keys["A"], keys["B"], scale, turned)
    for name, key in whole.items():
        _refuse_misfit(base, folder, config, name, tuple(rows[key]["shape"]))
        # an embedding may have both: its own tensor, saved beside what is added to it
        made[name] = partial(_replaced, base, name, partial(read, key), made.get(name))
    return made


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = dict(json.loads((folder / CONFIG).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise LoadError(f"{folder / CONFIG} cannot be read as JSON ({error}).") from error
    odd = [key for key in ("use_dora", "use_qalora", "layer_replication") if config.get(key)]
    if config.get("peft_type") != "LORA":
        odd.append(f"peft_type {config.get('peft_type')}")
    if config.get("init_lora_weights") not in _HARMLESS:
        odd.append(f"init_lora_weights {config['init_lora_weights']}")
    if odd:
        raise InputError(
            f"{folder} has {', '.join(odd)}: what it adds is not in its file alone. Load it with "
            "PEFT, and give the model that has it."
        )
    if not (folder / FILE).is_file():
        raise LoadError(f"{folder} lacks {FILE}: adapters are read from safetensors alone.")
    return config


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """alpha / rank, or over its root; some modules may have an alpha of their own."""
    patterns = dict(config.get("alpha_pattern") or {})
    found = (a for words, a in patterns.items() if re.match(rf"(.*\.)?({words})$", path))
    alpha = float(next(found, config.get("lora_alpha", 8)))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _refuse_misfit(
    base: Weights, folder: Path, config: Mapping[str, Any], name: str, shape: tuple[int, ...]
) -> None:
    _refuse_tied(base, str(folder), name)
    here = base.kinds.get(name)
    if here is None or here[0] != tuple(shape):
        raise InputError(
            f"{folder} is an adapter of {config.get('base_model_name_or_path') or 'another model'}:"
            f" it changes `{name}` {tuple(shape)}, which is {here[0] if here else 'absent'} in "
            f"{base.called}. Give its own base."
        )


def _refuse_tied(base: Weights, called: str, name: str) -> None:
    """Raise InputError where one of two names of a tensor was adapted, and the other not."""
    if name in base.ties:
        raise InputError(
            f"{called} changes `{name}`, which is tied to `{base.ties[name]}` in {base.called}: "
            "what is added to one use of a tensor cannot be put into both. Give a base that is not "
            "tied (tie_word_embeddings=False)."
        )


def _product(read: Callable[[str], Tensor], a: str, b: str, scale: float, turned: bool) -> Tensor:
    product = (read(b).float() @ read(a).float()) * scale
    return product.T.contiguous() if turned else product


def _replaced(base: Weights, name: str, read: Read, added: Read | None) -> Tensor:
    here = base[name].float()
    moved = read().to(here) - here
    return moved if added is None else moved + added().to(here)


# --- a model in memory ----------------------------------------------------------------------------


def of_model(base: Weights, model: Any, called: str) -> Deltas:
    """What a model with adapters inside is, less the base: its own tensors' difference, and what
    each adapted layer applies beside its base layer. Raises InputError for one of another base,
    FamilyError for a layer that is not linear in its input."""
    root: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    stored: dict[str, Tensor] = {}
    for name, value in root.state_dict(keep_vars=True).items():
        if _active(root, name):
            stored[_clean(name)] = value
    layers = {
        _clean(f"{path}.weight"): module
        for path, module in root.named_modules()
        if hasattr(module, "base_layer")
    }
    for name, at in base.ties.items():
        if name in layers or stored.get(name) is not stored.get(at):
            _refuse_tied(base, called, name)
    kinds = {n: (tuple(x.shape), x.dtype) for n, x in stored.items() if n in base.kinds}
    fine = Weights(called, kinds, stored.__getitem__, vocab=base.vocab)
    if lost := [name for name in layers if name not in base.kinds]:
        raise InputError(
            f"{called} has an adapter at `{lost[0]}`, which {base.called} lacks: it is for another "
            "model. Give its own base."
        )
    refuse_other_base(base, fine)
    return {name: partial(_of_one, base, fine, name, layers.get(name)) for name in base.floating}


def _clean(name: str) -> str:
    """A tensor's name as it is without adapters around it."""
    name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)


def _active(root: Any, name: str) -> bool:
    """Whether a tensor is the one that runs: of a module that was saved whole there are two."""
    path, found, rest = name.partition(".modules_to_save.")
    if not found:
        path, found, _ = name.partition(".original_module.")
        rest = ""
    if not found:
        return True
    wrapper = root.get_submodule(path)
    active = wrapper.active_adapter
    active = active if isinstance(active, str) else next(iter(active), "")
    runs = not getattr(wrapper, "disable_adapters", False) and active in wrapper.modules_to_save
    return rest.startswith(f"{active}.") and runs if rest else not runs


def _of_one(base: Weights, fine: Weights, name: str, module: Any) -> Tensor:
    here = base[name]
    wide = torch.promote_types(here.dtype, torch.float32)
    moved = fine[name].to(here.device, wide) - here.to(wide)
    if module is None:
        return moved
    return moved + _applied(module, name, base).to(here.device, wide)


@torch.no_grad()
def _applied(module: Any, name: str, base: Weights) -> Tensor:
    """What an adapted layer adds to its base layer's weight, as that is laid out: asked of a copy
    in float32."""
    twin = deepcopy(module).eval()
    inner = twin.base_layer
    if is_plain(inner):
        twin, inner = twin.float(), inner.float()
    if isinstance(inner, nn.Embedding):
        ids = torch.arange(inner.num_embeddings, device=inner.weight.device)
        return twin(ids) - inner(ids)
    added = [weights.bias(part) for part in (twin, inner)]
    added = [torch.zeros(()) if x is None else x.cpu() for x in added]
    if float((added[0] - added[1]).abs().max()) > 0:
        raise InputError(
            f"the adapter at `{name}` adds a bias, which is no part of {base.called}'s weight: "
            "merge it into the model with PEFT, and give that."
        )
    delta = weights.matrix(twin) - weights.matrix(inner)
    return delta.T.contiguous() if isinstance(inner, Conv1D) else delta
