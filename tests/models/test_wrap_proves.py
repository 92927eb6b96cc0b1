"""`wrap` proves the model at hand: what its config or its class changes is measured, what cannot be
trusted is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import stratoscope
from stratoscope.engine.intervene import add
from stratoscope.engine.sweep import naive, sweep
from stratoscope.errors import FamilyError, LoadError
from stratoscope.models import trials, wrap
from stratoscope.models.prove import checks
from stratoscope.models.ready import chosen_device, refuse_not_finite
from stratoscope.models.specimen import specimens
from support import tiny

G = tiny.GROUPED
ROW = [[3, 14, 15, 92, 65, 35, 89]]
BOTH_WAYS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt2",
    "olmo2",
    "phi3",
    "gpt_neox",
    "gemma3",
)


def spread(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def built(name: str, **changes: Any) -> Any:
    kind, config = tiny.CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return spread(kind(config))


@torch.no_grad()
def first_answer(model: Any, last: int) -> torch.Tensor:
    return model(input_ids=torch.tensor([[*ROW[0][:-1], last]]), use_cache=False).logits[0, 0]


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_decoder_that_its_config_makes_bidirectional(name: str) -> None:
    """`is_causal=False`: the prefix of the base run is not valid, and a sweep must not reuse it."""
    model = built(name, is_causal=False)
    hears = tiny.gap(first_answer(model, 60), first_answer(model, 61)) > 1e-4
    lm = wrap(model)
    assert lm.family.towers[""].causal is not hears
    if name != "gemma3":  # its own switch is another one
        assert hears
    value = torch.randn(1, 1, lm.dims.dim, generator=torch.Generator().manual_seed(0))
    cells = [
        add(f"layers.{n}.resid_pre", value, positions=[p]) for n in range(3) for p in (0, 3, 6)
    ]
    metric = lambda logits, e: logits[:, 7] - logits[:, 8]  # noqa: E731
    assert tiny.gap(sweep(lm, ROW, cells, metric), naive(lm, ROW, cells, metric)) < 1e-5


class Deep(hf.LlamaForCausalLM):
    """A subclass, as remote code has them, that keeps `model_type`: the stream is scaled between
    layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.register_forward_hook(lambda m, args, out: 0.7 * out)


class DeafToPadding(hf.BertModel):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **rest: Any) -> Any:
        return super().forward(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **rest
        )


def test_a_subclass_that_keeps_the_model_type() -> None:
    assert Deep.config_class.model_type == "llama"
    with pytest.raises(FamilyError, match=r"does not hold on Deep.*resid_post"):
        wrap(spread(Deep(hf.LlamaConfig(**G))))


def test_a_model_that_ignores_the_mask() -> None:
    with pytest.raises(
        FamilyError, match=r"DeafToPadding lets padding through.*attention_mask.*refused"
    ):
        wrap(spread(DeafToPadding(hf.BertConfig(**tiny.SMALL))))


class Fainter(hf.LlamaForCausalLM):
    """Each MLP is added at 0.22 of what its module gives."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.forward = _fainter.__get__(layer)


def _fainter(self: Any, hidden_states: torch.Tensor, **rest: Any) -> torch.Tensor:
    hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **rest)[0]
    return hidden_states + 0.22 * self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loud", [1.0, 3000.0])
def test_a_factor_on_a_part_that_is_small_beside_the_stream(
    dtype: torch.dtype, loud: float
) -> None:
    model = spread(Fainter(hf.LlamaConfig(**G)))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(loud)
    with pytest.raises(FamilyError, match="does not hold on Fainter"):
        wrap(model.to(dtype))


def test_the_parts_are_tried_in_every_layer_and_tower() -> None:
    for name in ("llama", "gpt_neox", "bert", "llava"):
        lm = tiny.lm(name)
        found = [c for given in specimens(lm) for c in checks(lm, given)]
        told = {c.place for c in found if c.name == "what the parts write is what is added"}
        assert told == {str(s) for s in lm.sites() if s.point == "resid_post"}
        assert trials.PADDING in {c.name for c in found}


def test_a_proof_costs_few_forward_passes() -> None:
    """Time in machines' terms: whole passes over the layers, of six tokens each."""
    model, passes = built("llama"), []
    model.model.layers[1].register_forward_hook(
        lambda m, args, out: passes.append(args[0].shape[:2].numel())
    )
    wrap(model)
    assert len(passes) <= 6
    assert max(passes) <= 8


def test_wrapping_leaves_a_model_in_training_mode_as_it_is() -> None:
    model = built("gpt2", resid_pdrop=0.5).train()
    before, state = (
        {k: v.clone() for k, v in model.state_dict().items()},
        torch.random.get_rng_state(),
    )
    wrap(model)
    assert all(m.training for m in model.modules())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- what is no model to look into ----------------------------------------------------------------


def test_the_model_is_taken_out_of_its_wrappers() -> None:
    model = built("llama")
    for outer in (
        torch.nn.DataParallel(model),
        torch.compile(model),
        torch.compile(torch.nn.DataParallel(model)),
    ):
        assert wrap(outer).model is model


def test_what_is_not_a_model_is_refused_by_name() -> None:
    class TextGenerationPipeline:
        model = tokenizer = None

    with pytest.raises(FamilyError, match=r"this is TextGenerationPipeline. Pass its `.model`"):
        wrap(TextGenerationPipeline())
    with pytest.raises(
        FamilyError, match=r"takes a Hugging Face model \(PreTrainedModel\); this is Linear"
    ):
        wrap(torch.nn.Linear(2, 2))


def test_weights_that_are_not_there() -> None:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**G))
    with pytest.raises(
        FamilyError, match=r"`model.embed_tokens.weight` of LlamaForCausalLM is not in memory"
    ):
        wrap(model)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_numbers(bad: float) -> None:
    model = built("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = bad
        model.model.layers[2].mlp.down_proj.weight[:] = bad
    told = (
        r"1 of 1536 values of `model.layers.1.mlp.down_proj.weight` are not finite numbers, "
        rf"first {bad} at \(3, 5\)"
    )
    with pytest.raises(FamilyError, match=told):
        wrap(model)


def test_large_weights_in_half_precision_are_numbers() -> None:
    """Their sum overflows; they are finite."""
    model = built("llama").half()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(60000)
    refuse_not_finite(model)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", torch.device("cuda", 99)])
def test_a_device_that_is_not_there(device: Any) -> None:
    with pytest.raises(LoadError, match=r"this machine has cpu"):
        stratoscope.load("smollm2", device=device)


def test_auto_is_the_gpu_where_there_is_one_and_else_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    built("llama").save_pretrained(tmp_path)
    assert stratoscope.load(tmp_path, tokenizer=False, device="auto").model.device.type == "cpu"
    assert chosen_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device("auto") == torch.device("cuda")
    assert chosen_device("cpu") == torch.device("cpu")  # what is named is taken


def test_auto_is_the_dtype_of_the_file(tmp_path: Any) -> None:
    built("llama").bfloat16().save_pretrained(tmp_path)
    assert stratoscope.load(tmp_path, tokenizer=False, dtype="auto").model.dtype == torch.bfloat16
    assert stratoscope.load(tmp_path, tokenizer=False).model.dtype == torch.float32


def test_a_layer_that_does_not_run_is_an_answer() -> None:
    """Whatever the model raises in its own terms becomes a sentence that names model and family."""

    class Odd(hf.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **rest: Any) -> Any:
            raise IndexError("tuple index out of range")

    with pytest.raises(
        FamilyError, match=r"Odd does not run as family `llama` has it \(IndexError"
    ):
        wrap(spread(Odd(hf.LlamaConfig(**G))))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_a_model_whose_first_mlp_was_pruned_is_still_believed(name: str) -> None:
    """An MLP that computes the same for every token tells nothing about its order."""
    model = built(name)
    weights = {
        "gpt2": "h.0.mlp.c_fc",
        "llama": "layers.0.mlp.gate_proj",
        "gpt_neox": "layers.0.mlp.dense_h_to_4h",
    }
    with torch.no_grad():
        model.base_model.get_submodule(weights[name]).weight.zero_()
    lm = wrap(model)
    assert torch.equal(lm([ROW[0]])["logits"], model(torch.tensor(ROW)).logits)
