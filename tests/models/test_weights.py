"""One weight for every linear module: W x + bias == module(x), whatever the module holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from stratoscope.engine.intervene import ablate
from stratoscope.engine.sweep import naive, plan, sweep
from stratoscope.errors import FamilyError
from stratoscope.layers import direct_logit_attribution
from stratoscope.models import prove, weights, wrap
from stratoscope.neurons import contribution
from support import tiny

ROW = [[3, 14, 15, 92, 65, 35, 89]]


class Int8(nn.Linear):
    """Codes and one scale for each output, as LLM.int8 has them; no floating-point weight."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        scale = plain.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter(
            (plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False
        )
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class RoundsAll(Int8):
    """The input is rounded by the largest value of all rows, so that rows depend on their
    neighbours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().max().clamp_min(1e-6) / 127
        return super().forward((x / step).round() * step)


class Packed(nn.Module):
    """Two codes a byte in a flat parameter, as nf4 has them."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = nn.Parameter(
            torch.zeros(plain.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
        )
        self.register_buffer("codes", (plain.weight.detach() * 8).round().clamp(-8, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes / 8).T


class Adapted(nn.Module):
    """An adapter beside a frozen layer, not merged, whose `weight` is the layer's, with dropout, as
    peft's LoRA."""

    def __init__(self, plain: nn.Linear, *, scaled: bool = False) -> None:
        super().__init__()
        out, into = plain.weight.shape
        self.base_layer, self.in_features, self.out_features = plain, into, out
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(2, into, generator=generator) / into**0.5)
        self.up = nn.Parameter(torch.randn(out, 2, generator=generator))
        self.magnitude = (
            nn.Parameter(torch.rand(out, generator=generator) + 0.5) if scaled else None
        )
        self.dropout = nn.Dropout(0.5)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.base_layer(x) + self.dropout(x) @ self.down.T @ self.up.T
        return found if self.magnitude is None else found * self.magnitude


class DoRA(Adapted):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain, scaled=True)


class Curved(nn.Linear):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


KINDS = [Int8, Packed, Adapted, DoRA]


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(12, 6).requires_grad_(False)


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: weights.Scaled(x, 0.25), *KINDS])
def test_w_x_is_the_module_s_answer(kind: Any) -> None:
    module = kind(linear())
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    state = torch.random.get_rng_state()
    bias = weights.bias(module)
    told = x @ weights.matrix(module).T + (0 if bias is None else bias)
    assert torch.equal(state, torch.random.get_rng_state())
    assert weights.matrix(module).shape == weights.shape(module) == (6, 12)
    assert tiny.gap(told, module.eval()(x)) < 1e-5


def test_a_plain_weight_is_the_parameter_itself() -> None:
    plain, turned = linear(), Conv1D(6, 12)
    assert weights.matrix(plain) is plain.weight
    assert torch.equal(weights.matrix(turned), turned.weight.T)
    table = nn.Embedding(5, 4)
    assert weights.matrix(table) is table.weight


def test_an_adapter_in_training_mode_is_asked_without_dropout() -> None:
    module = Adapted(linear()).train()
    expected = module.base_layer.weight + module.up @ module.down
    assert tiny.gap(weights.matrix(module), expected) < 1e-5
    assert module.dropout.training


def test_what_is_not_linear_has_no_weight() -> None:
    with pytest.raises(FamilyError, match="Curved is not linear in its input"):
        weights.matrix(Curved(linear()))
    with pytest.raises(FamilyError, match="LayerNorm has no weight matrix"):
        weights.matrix(nn.LayerNorm(3))


def test_rows_that_depend_on_their_neighbours() -> None:
    assert weights.row_independent(nn.Sequential(linear(), *(kind(linear()) for kind in KINDS)))
    assert not weights.row_independent(nn.Sequential(linear(), RoundsAll(linear())))


def replaced(kind: Any) -> Any:
    """A small model with such layers inside, and the same function with plain ones: what the first
    really computes."""
    model, plain = tiny.model("llama"), tiny.model("llama")
    for layer, other in zip(model.model.layers, plain.model.layers):
        for path in ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"):
            parent, _, name = path.rpartition(".")
            made = kind(layer.get_submodule(path)).eval()
            setattr(layer.get_submodule(parent), name, made)
            with torch.no_grad():
                eye = torch.eye(made.in_features)
                other.get_submodule(path).weight.copy_((made(eye) - made(0 * eye)).T)
    return wrap(model), wrap(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_methods_that_read_weights_see_what_the_model_computes(kind: Any) -> None:
    lm, plain = replaced(kind)
    assert lm.dims == plain.dims
    for site in ("layers.1.attn.out", "layers.1.mlp.out", "layers.1.mlp.pre"):
        assert tiny.gap(lm.weight(site), plain.weight(site)) < 1e-5
    for method, name in (
        (direct_logit_attribution, "contribution"),
        (contribution, "contribution"),
    ):
        found, expected = (method.measure(x, ROW, answer=5, foil=9) for x in (lm, plain))
        assert tiny.gap(found[name].values, expected[name].values) < 1e-4
    error = direct_logit_attribution.measure(lm, ROW, answer=5, foil=9)["residual_error"]
    assert abs(float(error[0])) < 1e-4


def test_a_wrong_matrix_is_found_out_in_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes taken for the weight, as `.weight` was."""
    lm, _ = replaced(Int8)
    right = weights.matrix
    monkeypatch.setattr(
        weights, "matrix", lambda m: m.weight.float() if isinstance(m, Int8) else right(m)
    )
    failed = [c for c in prove.checks(lm, ROW) if not c.holds]
    assert {c.name for c in failed} == {"W x == module(x)"}


def test_layers_that_round_by_all_rows_are_not_packed() -> None:
    lm, _ = replaced(RoundsAll)
    cells = [ablate("layers.1.mlp.out"), ablate("layers.2.attn.z", units=[1])]
    metric = lambda logits, e: logits[:, 7] - logits[:, 8]  # noqa: E731
    assert plan(lm, ROW, cells).naive == 2
    assert torch.equal(sweep(lm, ROW, cells, metric), naive(lm, ROW, cells, metric))
