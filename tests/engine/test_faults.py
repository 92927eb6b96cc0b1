"""Law 1: whatever happens inside a block, the model is bit for bit what it was."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stratoscope.engine.edit import Edit
from stratoscope.engine.generate import generate
from stratoscope.engine.gradients import gradients
from stratoscope.engine.intervene import Intervention, add, intervene, knock_out, replaced, scaled
from stratoscope.engine.sweep import sweep
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import InputError, SiteError
from stratoscope.models import attention, wrap
from stratoscope.models.attention import configs_of
from support import tiny

HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_non_persistent_buffers_set",
]
PROMPTS = tiny.inputs("llama")


def fingerprint(lm: Any) -> dict[str, Any]:
    """Everything of a model, its configs and the random number generators that a run might leave
    changed."""
    model = lm.model
    modules = list(model.named_modules())
    return {
        "weights": {
            k: (v.dtype, v.data_ptr(), v.clone())
            for k, v in model.state_dict(keep_vars=True).items()
        },
        "gradients": {
            k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()
        },
        "flags": {k: p.requires_grad for k, p in model.named_parameters()},
        "training": {k: m.training for k, m in modules},
        "hooks": {(k, h): list(getattr(m, h)) for k, m in modules for h in HOOKS if hasattr(m, h)},
        "attributes": {k: sorted(vars(m)) for k, m in modules},
        "forwards": {k: m.forward.__func__ for k, m in modules if hasattr(m.forward, "__func__")},
        "configs": [
            (copy.deepcopy(c.to_dict()), c._attn_implementation_internal) for c in configs_of(model)
        ],
        "generation": model.generation_config.to_dict() if model.can_generate() else None,
        "torch": torch.get_rng_state(),
        "numpy": [np.random.get_state()[1].tolist(), np.random.get_state()[2]],  # noqa: NPY002
        "grad mode": torch.is_grad_enabled(),
        "seam": (dict(attention._listeners), dict(attention._replacements)),
        "taps": (list(lm.taps.listening), vars(lm.taps.run).copy(), dict(lm.taps._stream)),
    }


def differences(one: Any, two: Any, path: str = "") -> list[str]:
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, two) else [path]
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return [f"{path}: keys {set(one) ^ set(two)}"]
        return [d for k in one for d in differences(one[k], two[k], f"{path}.{k}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(two):
            return [f"{path}: length"]
        return [
            d for n, (a, b) in enumerate(zip(one, two)) for d in differences(a, b, f"{path}[{n}]")
        ]
    return [] if one == two else [f"{path}: {one!r} -> {two!r}"]


@contextmanager
def unchanged(lm: Any) -> Iterator[None]:
    before = fingerprint(lm)
    yield
    assert differences(before, fingerprint(lm)) == []


class Broken(RuntimeError):
    pass


def breaking(lm: Any, error: type[BaseException], layer: int = 1) -> Any:
    """A module of the model itself that raises in its forward; undone by `undo`."""
    [module] = lm.layout.writers(lm.layout.resolve_one(f"layers.{layer}.mlp.out"))[:1]

    def fail(*_: object) -> None:
        raise error("the forward pass broke")

    module.forward = fail
    return lambda: vars(module).pop("forward")


EVERY = [
    add("layers.0.attn.q", 0.1),
    scaled("layers.1.attn.pattern", 0.5),
    add("layers.*.resid_mid", 0.1),
    scaled("layers.*.mlp.act", 0.5, positions=-1),
    add("embed", 0.1),
    scaled("final_norm", 2.0),
]


def interrupted(x: Any, run: Any) -> Any:
    raise KeyboardInterrupt


def run_sweep(lm: Any, progress: Any = None) -> Any:
    cells = [
        replaced(f"layers.{n}.resid_pre", 0.5, positions=p) for n in range(3) for p in range(4)
    ]
    cells += [scaled("layers.1.attn.pattern", 0.5), add("layers.1.attn.q", 1.0, units=[0])]
    return sweep(
        lm, PROMPTS, cells, lambda logits, example: logits[:, 3], budget=200_000, progress=progress
    )


def stop_progress(done: int, total: int) -> None:
    raise KeyboardInterrupt


def nested(lm: Any) -> None:
    with (
        intervene(lm, *EVERY),
        trace(lm, *lm.sites(), stop=False),
        intervene(lm, add("layers.1.attn.z", 1.0)),
    ):
        lm(PROMPTS)
        with trace(lm, "layers.0.resid_post"):
            lm(PROMPTS)
        raise Broken


def in_edit(lm: Any) -> None:
    name = next(n for n, p in lm.model.named_parameters() if p.ndim == 2)
    shape = dict(lm.model.named_parameters())[name].shape
    with Edit(
        lm, [add("layers.1.mlp.out", 1.0)], {name: torch.randn(shape, generator=torch.Generator())}
    ):
        lm(PROMPTS)
        raise Broken


def with_hook_error(lm: Any, error: Callable[..., Any]) -> None:
    site = lm.layout.resolve_one("layers.1.attn.scores")
    with lm.taps.using(edits={site: [error]}), trace(lm, "layers.*.resid_post", "layers.*.attn.z"):
        lm(PROMPTS)


def broken_module(lm: Any, error: type[BaseException], act: Callable[[], Any]) -> None:
    undo = breaking(lm, error)
    try:
        act()
    finally:
        undo()


# what is done -> how it ends (None: well)
DEEDS: dict[str, tuple[Callable[[Any], Any], type[BaseException] | None]] = {
    "success": (lambda lm: capture(lm, PROMPTS, *lm.sites()), None),
    "success with gradients": (
        lambda lm: gradients(lm, PROMPTS, ["layers.*.attn.q", "embed"], lambda x: x[:, 1]),
        None,
    ),
    "intervention": (lambda lm: run_with(lm, *EVERY), None),
    "generation": (lambda lm: generate_with(lm, *EVERY), None),
    "sweep": (run_sweep, None),
    "early stop": (lambda lm: capture(lm, PROMPTS, "layers.0.attn.pattern"), None),
    "a site that is not there": (
        lambda lm: capture(lm, PROMPTS, "layers.0.attn.z", "layers.9.attn.z"),
        SiteError,
    ),
    "a bad position": (lambda lm: capture(lm, PROMPTS, "layers.1.attn.q", positions=7), InputError),
    "a bad value": (
        lambda lm: run_with(lm, *EVERY, add("layers.2.mlp.act", torch.ones(47))),
        InputError,
    ),
    "a bad unit": (
        lambda lm: run_with(lm, *EVERY, add("layers.2.mlp.act", 1.0, units=[999])),
        InputError,
    ),
    "a bad prompt": (lambda lm: run_with(lm, *EVERY, prompts=[[1], []]), InputError),
    "a model that breaks": (
        lambda lm: broken_module(lm, Broken, lambda: run_with(lm, *EVERY)),
        Broken,
    ),
    "a model that breaks in a sweep": (
        lambda lm: broken_module(lm, Broken, lambda: run_sweep(lm)),
        Broken,
    ),
    "a model that breaks in generation": (
        lambda lm: broken_module(lm, Broken, lambda: generate_with(lm, *EVERY)),
        Broken,
    ),
    "a model that breaks with gradients": (
        lambda lm: broken_module(
            lm, Broken, lambda: gradients(lm, PROMPTS, ["layers.*.attn.q"], lambda x: x[:, 1])
        ),
        Broken,
    ),
    "an interrupt in a module": (
        lambda lm: broken_module(
            lm, KeyboardInterrupt, lambda: run_with(lm, *EVERY, knock_out("*", -1, 0))
        ),
        KeyboardInterrupt,
    ),
    "an interrupt in a hook": (lambda lm: with_hook_error(lm, interrupted), KeyboardInterrupt),
    "an interrupt between waves": (lambda lm: run_sweep(lm, stop_progress), KeyboardInterrupt),
    "nested blocks": (nested, Broken),
    "an edit": (in_edit, Broken),
    "a trace that stops generation": (lambda lm: stopped_generation(lm), InputError),
    "a bad generation option": (
        lambda lm: generate_with(lm, *EVERY, num_beams="two"),
        (ValueError, TypeError),
    ),
    "a metric that fails": (
        lambda lm: gradients(lm, PROMPTS, ["layers.*.attn.q"], lambda x: x[:, 1000]),
        IndexError,
    ),
}


def run_with(lm: Any, *changes: Intervention, prompts: Any = PROMPTS) -> None:
    with intervene(lm, *changes), torch.no_grad():
        lm(prompts)


def generate_with(lm: Any, *changes: Intervention, **options: Any) -> None:
    with intervene(lm, *changes), trace(lm, "layers.1.attn.pattern", stop=False):
        generate(lm, PROMPTS, tokens=2, **options)


def stopped_generation(lm: Any) -> None:
    with trace(lm, "layers.1.attn.pattern"):
        generate(lm, PROMPTS, tokens=2)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_is_what_it_was(name: str, deed: str, kernel: str) -> None:
    if name == "gpt2" and kernel == "eager":
        pytest.skip("one kernel is enough for the second model")
    model = tiny.model(name)
    model.set_attn_implementation(kernel)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    lm = wrap(model)
    lm(PROMPTS)
    with torch.no_grad():
        plain = lm(PROMPTS)["logits"]
    act, error = DEEDS[deed]
    for training in (False, True):
        model.train(training)
        lm.layout.layers[""][1].eval()  # one layer otherwise than the rest
        with unchanged(lm):
            if error is None:
                act(lm)
            else:
                with pytest.raises(error):
                    act(lm)
    model.eval()
    with torch.no_grad():
        assert torch.equal(lm(PROMPTS)["logits"], plain)


@pytest.mark.parametrize(
    "name", ["llava", "qwen2_5_vl", "clip", "bert", "bloom", "mixtral", "modernbert"]
)
def test_every_kind_of_model_is_left_as_it_was(name: str) -> None:
    lm, given = tiny.lm(name), tiny.inputs(name)
    with torch.no_grad():
        lm(given)  # Transformers puts up hooks of its own once, where hidden states are collected
    with unchanged(lm), trace(lm, *lm.sites(), stop=False):
        lm(given)
    site = lm.layout.resolve_one("layers.1.mlp.out")
    edits = {site: [interrupted]}
    with (
        unchanged(lm),
        pytest.raises(KeyboardInterrupt),
        lm.taps.using(edits=edits),
        trace(lm, *lm.sites()),
    ):
        lm(given)


def test_the_fingerprint_can_tell() -> None:
    """Each thing that a run could leave behind is seen."""
    lm = wrap(tiny.model("gpt2"))
    spoil: dict[str, Callable[[], Any]] = {
        "weights": lambda: lm.model.transformer.wpe.weight.data[0, 0].add_(1e-6),
        "flags": lambda: lm.model.transformer.wpe.weight.requires_grad_(False),
        "gradients": lambda: setattr(lm.model.transformer.wpe.weight, "grad", torch.zeros(64, 32)),
        "training": lambda: lm.model.transformer.h[1].mlp.train(),
        "hooks": lambda: lm.model.transformer.h[1].register_forward_hook(print),
        "configs": lambda: setattr(lm.model.config, "_attn_implementation_internal", "stratoscope"),
        "torch": lambda: torch.rand(1),
        "numpy": lambda: np.random.rand(),  # noqa: NPY002
        "forwards": lambda: setattr(lm.model.transformer.h[0], "forward", print),
    }
    for what, act in spoil.items():
        before = fingerprint(lm)
        act()
        assert any(d.startswith(f".{what}") for d in differences(before, fingerprint(lm))), what


def test_nothing_is_drawn_from_python_s_generator() -> None:
    """In a process of its own: the type checks that run during tests draw from it."""
    script = """
import random, sys
sys.path.insert(0, sys.argv[1])
from support import tiny
from stratoscope.engine.generate import generate
from stratoscope.engine.intervene import intervene, scaled
from stratoscope.engine.sweep import sweep
from stratoscope.engine.trace import capture
lm, prompts = tiny.lm("llama"), tiny.inputs("llama")
random.seed(0)
state = random.getstate()
capture(lm, prompts, *lm.sites())
with intervene(lm, scaled("layers.1.attn.pattern", 0.5)):
    generate(lm, prompts, tokens=2)
cells = [scaled("layers.1.mlp.act", 0.5, units=[3])]
sweep(lm, prompts, cells, lambda logits, example: logits[:, 0])
sys.exit(random.getstate() != state)
"""
    where = str(Path(tiny.__file__).parents[1])
    assert (
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, where], timeout=900
        ).returncode
        == 0
    )


def test_dropout_is_off_inside_and_back_on_afterwards() -> None:
    _, config = tiny.CONFIGS["gpt2"]()
    assert config.resid_pdrop > 0
    model = tiny.model("gpt2").train()
    lm = wrap(model)
    eval_lm = tiny.lm("gpt2")
    site = "layers.2.resid_post"
    state = torch.get_rng_state()
    assert torch.equal(capture(lm, PROMPTS, site)[site], capture(eval_lm, PROMPTS, site)[site])
    with intervene(lm, scaled("layers.1.attn.pattern", 0.5)), torch.no_grad():
        one, two = lm(PROMPTS)["logits"], lm(PROMPTS)["logits"]
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    torch.manual_seed(0)
    assert not torch.equal(
        model(torch.tensor(PROMPTS[:1])).logits, model(torch.tensor(PROMPTS[:1])).logits
    )


def test_a_user_s_own_hooks_stay_and_act() -> None:
    model = tiny.model("llama")
    lm = wrap(model)
    calls = []
    handle = model.model.layers[1].register_forward_hook(lambda m, a, out: calls.append(1))
    with unchanged(lm):
        capture(lm, PROMPTS, "layers.1.resid_post", "layers.2.resid_post")
    assert calls == [1]
    handle.remove()


def test_blocks_left_in_another_order_than_entered() -> None:
    lm = wrap(tiny.model("llama"))
    with unchanged(lm):
        one, two = intervene(lm, add("layers.1.attn.q", 1.0)), trace(lm, "layers.1.attn.pattern")
        one.__enter__()
        seen = two.__enter__()
        one.__exit__(None, None, None)
        lm(PROMPTS)
        two.__exit__(None, None, None)
    expected = capture(lm, PROMPTS, "layers.1.attn.pattern")["layers.1.attn.pattern"]
    assert torch.equal(seen["layers.1.attn.pattern"], expected)
