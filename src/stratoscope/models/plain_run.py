"""Two plain runs of a model that nobody has named: which outputs, times which factors, its layers
add to the stream.

They also tell whether attention goes through Transformers' interface, whether the MLP reads what
attention wrote, whether the model is causal, and what multiplies its logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stratoscope.errors import FamilyError
from stratoscope.models.attention import seam
from stratoscope.models.family import Point, out_of
from stratoscope.models.structure import Part

_POST = {
    "attention": (
        "post_attention_layernorm",
        "post_self_attn_layernorm",
        "post_operator_norm",
        "post_norm1",
    ),
    "mlp": ("post_feedforward_layernorm", "post_mlp_layernorm", "post_ffn_norm", "post_norm2"),
}
_POST |= {"mixer": _POST["attention"], "experts": _POST["mlp"]}
# attributes of a layer, or of the part, by which what a part gives is multiplied before it is added
_FACTORS = {
    "attention": ("residual_multiplier", "residual_scale", "attn_out_multiplier"),
    "mixer": ("residual_multiplier", "residual_scale", "ssm_out_multiplier"),
    "mlp": ("residual_multiplier", "residual_scale", "{path}.down_multiplier"),
    "experts": ("residual_multiplier", "residual_scale"),
}
_STREAM = ("layer_scalar",)
_LOGIT_FACTORS = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
)


Seam = Literal["open", "gated", "closed"]


@dataclass(frozen=True)
class Measured:
    """One layer: its parts, where what each adds is read, whether they run in parallel, and how
    attention is reached.

    seam: "open" (z is pattern @ v), "gated" (head by head, through a gate or a norm), or "closed"
    (not by Transformers' attention interface, or heads are joined before z).
    """

    layer: nn.Module
    parts: tuple[Part, ...]
    outs: tuple[Point, ...]
    parallel: bool
    seam: Seam
    stream: str | None = None  # what multiplies the whole stream at the layer's end


class PlainRun:
    """What passed through the layers and their parts in one plain run of two prompts."""

    def __init__(self, model: nn.Module, stack: nn.ModuleList, parts: list[list[Part]]) -> None:
        self.model: Any = model
        self.stack = stack
        size = self.model.config.get_text_config().vocab_size
        self.ids = torch.tensor(
            [[(a + 31 * i) % size for i in range(6)] for a in (7, 11)], device=self.model.device
        )
        self.input: dict[nn.Module, Tensor] = {}
        self.output: dict[nn.Module, Tensor] = {}
        self.calls: dict[nn.Module, int] = {}
        self.logits = self._go()
        before = self.output[stack[-1]]
        changed = self.ids.clone()
        changed[:, -1] = changed[:, 0]
        runs = dict(self.input), dict(self.output)
        self._go(changed)
        self.causal = _equal(self.output[stack[-1]][:, :-1], before[:, :-1])
        self.seams = self._seams(
            [(at, p) for at, ps in zip(stack, parts) for p in ps if p.kind == "attention"]
        )
        self.input, self.output = runs

    @torch.no_grad()
    def _go(
        self, ids: Tensor | None = None, held: dict[nn.Module, Tensor] | None = None
    ) -> Tensor | None:
        """Run, noting what goes into and comes out of each module; `held` is given to the layers in
        place of the stream."""
        with ExitStack() as hooks:
            for layer in held or ():
                hook = layer.register_forward_pre_hook(
                    partial(_held, (held or {})[layer]), with_kwargs=True
                )
                hooks.callback(hook.remove)
            watched = [
                m
                for layer in self.stack
                for m in layer.modules()
                if not isinstance(m, nn.ModuleList)
            ]
            for module in watched:
                hooks.callback(module.register_forward_hook(self._note, with_kwargs=True).remove)
            hooks.callback(self.model.train, self.model.training)
            self.model.eval()
            options = {"use_cache": False} if self.model.can_generate() else {}
            output = self.model(input_ids=self.ids if ids is None else ids, **options)
        often, self.calls = max(self.calls.values(), default=0), {}
        if self.stack[-1] not in self.output or often != 1:
            problem = (
                f"calls its layers {often} times in one forward pass"
                if often > 1
                else "does not call all its layers"
            )
            raise FamilyError(
                f"{type(self.model).__name__} {problem}, so a layer's sites have no one value: "
                "refused."
            )
        return output.get("logits")

    def _note(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        gives = (
            output
            if isinstance(output, Tensor)
            else output[0]
            if isinstance(output, (tuple, list))
            else None
        )
        if any(module is layer for layer in self.stack):
            self.calls[module] = self.calls.get(module, 0) + 1
        if isinstance(given, Tensor) and isinstance(gives, Tensor):
            self.input[module], self.output[module] = given.clone(), gives.clone()

    @torch.no_grad()
    def _seams(self, parts: list[tuple[nn.Module, Part]]) -> dict[nn.Module, Seam]:
        """What becomes of values that are given to Transformers' attention interface on their way
        to z."""
        modules = {
            layer.get_submodule(part.path): layer.get_submodule(part.write) for layer, part in parts
        }
        given: dict[nn.Module, Tensor] = {}

        def attend(
            module: nn.Module, first: float, q: Tensor, k: Tensor, v: Tensor, *how: Any
        ) -> Tensor:
            size = (q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
            z = (
                torch.sin(torch.arange(1, 1 + torch.Size(size).numel(), device=q.device))
                .reshape(size)
                .to(q.dtype)
            )
            given[module] = torch.cat([first * z[:, :, :1], z[:, :, 1:]], dim=2)
            return given[module]

        came: list[dict[nn.Module, Tensor]] = []
        stream = {layer: self.input[layer] for layer in self.stack}
        for first_head in (1.0, 0.0):
            try:
                with seam(self.model, {}, {m: partial(attend, m, first_head) for m in modules}):
                    self._go(held=stream)
            except FamilyError:  # it passes what the seam does not compute
                return {}
            came.append({m: self.input[write] for m, write in modules.items()})
        return {m: _seam(given[m], came[0][m], came[1][m]) for m in given if m in modules}

    def logit_scale(self, norm: str | None, head: tuple[str, ...]) -> float:
        """What the logits are multiplied by: the config's own number, where the measured one says
        so."""
        config = self.model.config.get_text_config()
        given = [v for key in _LOGIT_FACTORS if (v := getattr(config, key, None))]
        if getattr(config, "dim_model_base", None):
            given.append(config.dim_model_base / config.hidden_size)
        whole: Any = self.model
        if not given or self.logits is None or not all(hasattr(whole, part) for part in head):
            return 1.0
        with torch.no_grad():
            x = self.output[self.stack[-1]]
            x = x if norm is None else whole.base_model.get_submodule(norm)(x)
            for name in head:
                x = getattr(whole, name)(x)
        ratio = float((self.logits.double() * x.double()).sum() / x.double().pow(2).sum())
        return next(
            (v for f in given for v in (f, 1 / f) if abs(v - ratio) <= 1e-2 * abs(ratio)), 1.0
        )


def _held(stream: Tensor, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (stream, *args[1:]), kwargs
    name = next(key for key, x in kwargs.items() if isinstance(x, Tensor))
    return args, kwargs | {name: stream}


def _seam(given: Tensor, with_first: Tensor, without: Tensor) -> Seam:
    """given: what the interface gave without the first head; the others: what the output projection
    then took."""
    heads = given.shape[2]
    if without.shape[-1] % heads or without.numel() % given.shape[0]:
        return "closed"
    one, other = (x.reshape(*given.shape[:3], -1) for x in (with_first, without))
    if other.shape == given.shape and _equal(other, given):
        return "open"
    return (
        "gated" if _equal(one[:, :, 1:], other[:, :, 1:]) and not _equal(one, other) else "closed"
    )


def measured(seen: PlainRun, layer: nn.Module, number: int, parts: list[Part]) -> Measured:
    """The outputs and factors whose sum is what this layer adds to the stream."""
    pre, post = seen.input.get(layer), seen.output.get(layer)
    if pre is None or post is None or pre.ndim != 3 or pre.shape != post.shape:
        shape = "nothing" if pre is None else f"a tensor of shape {tuple(pre.shape)}"
        raise FamilyError(
            f"{type(seen.model).__name__}: layer {number} takes {shape}, not one residual stream "
            "(example, position, dim) "
            f"(several streams at once, as AltUp and hyper-connections keep): refused."
        )
    stream = next((name for name in _STREAM if hasattr(layer, name)), None)
    whole = post if stream is None else post / _attribute(layer, stream)
    gained = (whole - pre).float()
    for some in (parts[:n] + parts[m:] for n, m in _left_out(len(parts))):
        options = [list(_outs(seen, layer, part)) for part in some]
        for outs in product(*options):
            total = sum((_value(seen, layer, out) for out in outs), start=torch.zeros_like(gained))
            if _equal(total, gained, float(post.abs().max()), post.dtype):
                return replace(_as_measured(seen, layer, some, outs), stream=stream)
    raise FamilyError(_why_no_sum(seen, layer, number, parts))


def _left_out(count: int) -> Iterator[tuple[int, int]]:
    """Neighbouring parts to leave out: none first, then few (a block whose output goes into another
    part, Zamba's)."""
    yield 0, 0
    yield from ((n, n + gone) for gone in range(1, count) for n in range(count - gone + 1))


def _as_measured(
    seen: PlainRun, layer: nn.Module, some: list[Part], outs: tuple[Point, ...]
) -> Measured:
    mixed = [_value(seen, layer, o) for o, p in zip(outs, some) if p.kind in ("attention", "mixer")]
    middle = seen.input[layer] + sum(mixed)
    inputs = [seen.input[m] for m in layer.modules() if m in seen.input and m is not layer]
    parallel = (
        bool(mixed)
        and len(mixed) < len(some)
        and not any(_equal(x, middle, None, x.dtype) for x in inputs)
    )
    seams = {
        seen.seams.get(layer.get_submodule(p.path), "closed") for p in some if p.kind == "attention"
    }
    return Measured(
        layer, tuple(some), outs, parallel, seams.pop() if len(seams) == 1 else "closed"
    )


def _outs(seen: PlainRun, layer: nn.Module, part: Part) -> Iterator[Point]:
    """Where what a part adds might be read: after a post-norm, at its module or at its projection,
    times a factor."""
    size = seen.output[layer].numel()
    posts = [name for name in _POST[part.kind] if isinstance(getattr(layer, name, None), nn.Module)]
    for path in filter(None, (*posts, part.write, part.path)):
        output = seen.output.get(layer.get_submodule(path))
        if output is None or output.numel() != size:
            continue
        module = seen.output.get(layer.get_submodule(part.path)) if part.path else None
        if (
            path == part.write
            and module is not None
            and module.numel() == size
            and torch.equal(module.flatten(), output.flatten())
        ):
            path = part.path  # the same value: its module is the plainer place
        yield out_of(path)
        for name in _FACTORS[part.kind]:
            attribute = name.format(path=part.path)
            if isinstance(_attribute(layer, attribute), (float, int, Tensor)):
                yield out_of(path, scale=attribute)


def _value(seen: PlainRun, layer: nn.Module, out: Point) -> Tensor:
    x = seen.output[layer.get_submodule(out.path)].float().reshape(seen.output[layer].shape)
    return x * _attribute(layer, out.scale) if out.scale else x


def _attribute(layer: nn.Module, path: str) -> Any:
    value: Any = layer
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _why_no_sum(seen: PlainRun, layer: nn.Module, number: int, parts: list[Part]) -> str:
    """The truth, as far as least squares tell it: the stream or what is added is multiplied by
    something."""
    start = f"{type(seen.model).__name__}: layer {number} ({type(layer).__name__}) "
    options = [[out for out in _outs(seen, layer, part) if not out.scale] for part in parts]
    for outs in product(*options):
        terms = [seen.input[layer].float(), *(_value(seen, layer, out) for out in outs)]
        columns = torch.stack([x.flatten(0, 1) for x in terms], dim=-1).double()  # row, dim, term
        target = seen.output[layer].flatten(0, 1).double()
        names = ["the stream", *(f"`{out.path}`" for out in outs)]
        weights = torch.linalg.lstsq(columns.flatten(0, 1), target.flatten()[:, None]).solution[
            :, 0
        ]
        if _equal(columns @ weights, target):
            heard = [(w, name) for w, name in zip(weights.tolist(), names) if abs(w) > 1e-5]
            gives = " + ".join(f"{w:.3g} x {name}" for w, name in heard)
            if heard[0][1] != names[0]:
                return (
                    f"{start}does not go on with the stream that enters it: it gives {gives}: "
                    "refused."
                )
            return f"{start}puts a multiplier before the sum: it gives {gives}: refused."
        if len(target) <= 2 * len(terms) or not outs:
            continue
        by_dim = columns.transpose(0, 1)
        biased = torch.cat([by_dim, torch.ones_like(by_dim[..., :1])], dim=-1)
        for here, what in (
            (by_dim, "a number for each dimension"),
            (biased, "numbers for each dimension, or adds a bias"),
        ):
            weights = torch.linalg.lstsq(here, target.T[..., None]).solution
            if _equal((here @ weights)[..., 0].T, target):
                return f"{start}multiplies {', '.join(names)} by {what} before the sum: refused."
    named = ", ".join(f"`{part.path}`" for part in parts)
    return (
        f"{start}norms or mixes its residual stream: no sum of the stream and what {named} "
        "write "
        "gives its output: refused."
    )


def _equal(
    got: Any, expected: Tensor, scale: float | None = None, dtype: torch.dtype | None = None
) -> bool:
    """Equal up to rounding, of the largest value (or of `scale`, where a difference of large
    numbers is asked).

    dtype: that of the model, where what is compared was made in float32 from values that it had
    rounded.
    """
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return False
    allowed = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    size = max(float(expected.abs().max()), 1e-2 * (scale or 0.0), 1e-30)
    rounded = 0.0
    # two additions, each rounded by half a step of the largest value
    if dtype in (torch.bfloat16, torch.float16):
        rounded = torch.finfo(dtype).eps * max(float(expected.abs().max()), scale or 0.0)
    return float((got - expected).abs().max()) <= allowed * size + rounded
