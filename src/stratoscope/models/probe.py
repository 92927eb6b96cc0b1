"""A family for an architecture that no file names: guessed from the structure of its layers, then to be proved.

The guess looks for the names that decoder and encoder layers use; it is trusted only after `prove` has passed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from stratoscope.errors import FamilyError
from stratoscope.models.family import RESIDUAL_POINTS, Family, Tower, attention_points, into, out_of
from stratoscope.models.sites import SEAM_POINTS

_ATTENTION = ("self_attn", "attention", "attn", "self_attention", "mixer")
_O_PROJ = ("o_proj", "out_proj", "dense", "c_proj", "proj", "wo", "Wo")
_MLP = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe")
_DOWN = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2", "wo", "Wo", "fc_out")
_PRE = ("gate_proj", "c_fc", "fc1", "dense_h_to_4h", "w1", "fc_in")
_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "layer_norm", "layernorm")
_HEAD = ("lm_head", "embed_out", "output", "cls", "decoder")
_POST = {"attn": ("post_attention_layernorm",), "mlp": ("post_feedforward_layernorm", "post_mlp_layernorm")}


def probe(model: nn.Module) -> list[Family]:
    """Candidate families, likeliest first. Raises FamilyError, saying what was looked for, when there is none."""
    base: Any = model.base_model
    stacks = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len({*map(type, m)}) == 1]
    if not stacks:
        raise FamilyError(f"{type(model).__name__}: no stack of equal layers was found, so no family can be guessed.")
    path, stack = max(stacks, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    layer, parent = stack[0], base.get_submodule(path.rpartition(".")[0])
    prefix = f"{path.rpartition('.')[0]}." if "." in path else ""
    attention, mlp = _first(layer, _ATTENTION), _first(layer, _MLP)
    o_proj = attention and _first(layer.get_submodule(attention), _O_PROJ)
    down = mlp and _first(layer.get_submodule(mlp), _DOWN)
    pre = mlp and _first(layer.get_submodule(mlp), _PRE)
    embed = next((n for n, m in base.named_modules() if isinstance(m, nn.Embedding)), None)
    if not (attention and o_proj and mlp and down and pre and embed):
        raise FamilyError(
            f"{type(model).__name__} is an architecture no family names, and its layers ({type(layer).__name__}: "
            f"{', '.join(n for n, _ in layer.named_children())}) do not show an attention with an output projection "
            f"and an MLP with a down projection under names we know: refused."
        )
    norm = _first(parent, _NORM)
    head = _first(model, _HEAD)
    plain = Tower(
        layers=path,
        embed=embed,
        final_norm=prefix + norm if norm else None,
        points=RESIDUAL_POINTS
        | attention_points(attention, f"{attention}.{o_proj}")
        | {
            "attn.out": out_of(attention),
            "mlp.pre": out_of(f"{mlp}.{pre}"),
            "mlp.act": into(f"{mlp}.{down}"),
            "mlp.out": out_of(mlp),
        },
        attn_write=(f"{attention}.{o_proj}",),
        mlp_write=(f"{mlp}.{down}",),
    )
    reason = "attention and MLP run in parallel on the same residual"
    towers = [plain, *_post_normed(layer, plain), plain.but(residual="parallel", lacks={"resid_mid": reason})]
    own = "its attention does not go through Transformers' attention interface"
    towers += [tower.but(lacks=dict.fromkeys(SEAM_POINTS, own)) for tower in towers]
    towers += [tower.but(causal=False) for tower in towers]
    name = f"{model.config.model_type} (probed)"
    return [Family(name, {"": tower}, head=(head,) if head else ()) for tower in towers]


def _post_normed(layer: nn.Module, tower: Tower) -> list[Tower]:
    after = {part: _first(layer, names) for part, names in _POST.items()}
    if not all(after.values()):
        return []
    points = {"attn.out": out_of(after["attn"] or ""), "mlp.out": out_of(after["mlp"] or "")}
    return [
        tower.but(
            points=points,
            attn_write=(*tower.attn_write, after["attn"] or ""),
            mlp_write=(*tower.mlp_write, after["mlp"] or ""),
        )
    ]


def _first(module: nn.Module, names: Iterable[str]) -> str | None:
    children = dict(module.named_children())
    return next((name for name in names if name in children), None)
