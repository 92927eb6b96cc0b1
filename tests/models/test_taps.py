"""Listeners belong to one model, one thread and one block: neighbours, copies and compiled code are
told apart."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from stratoscope.engine.generate import generate
from stratoscope.engine.intervene import ablate, add, intervene, scaled
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import InputError
from stratoscope.models import LM, wrap
from support import tiny

ROWS = [[3, 14, 15, 92, 65, 35], [38, 46, 26]]
ID = {"input_ids": torch.tensor(ROWS[:1])}
VALUE = torch.linspace(-3, 3, 32)
PATTERN = "layers.1.attn.pattern"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**ID).logits


# --- two LMs, two models, copies ------------------------------------------------------------------


@pytest.mark.parametrize("site", [PATTERN, "layers.1.mlp.out"])
def test_two_lms_on_one_model_hear_and_change_together(site: str) -> None:
    model = tiny.model("llama")
    a, b = wrap(model), wrap(model)
    with intervene(a, scaled(site, 0.2)):
        alone = logits(model)
        with trace(b, site, stop=False) as inner, trace(a, site, stop=False) as outer:
            assert torch.equal(a(ROWS[:1])["logits"], alone)
        assert torch.equal(inner[site], outer[site])
        with intervene(b, scaled(site, 0.5)):
            both = logits(model)
    with intervene(a, scaled(site, 0.1)):
        assert tiny.gap(both, logits(model)) < 1e-5
    assert not torch.allclose(both, alone)


def test_blocks_may_end_in_any_order() -> None:
    model = tiny.model("llama").train()
    model.config._attn_implementation = "sdpa"
    a, b = wrap(model), wrap(model)
    one, two = intervene(a, scaled(PATTERN, 0.2)), intervene(b, scaled("layers.2.attn.scores", 0.5))
    one.__enter__(), two.__enter__()
    one.__exit__(None, None, None)
    assert not model.training
    left = logits(model)
    two.__exit__(None, None, None)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with intervene(a, scaled("layers.2.attn.scores", 0.5)):
        assert torch.equal(left, logits(model))


def test_models_that_share_a_config_do_not_leave_it_changed() -> None:
    config = tiny.CONFIGS["llama"]()[1]
    config._attn_implementation = "sdpa"
    first, second = (wrap(hf.LlamaForCausalLM(config).eval()) for _ in range(2))
    halves = [intervene(lm, scaled(PATTERN, 0.5)) for lm in (first, second)]
    apart = []
    for lm in (first, second):
        with intervene(lm, scaled(PATTERN, 0.5)):
            apart.append(logits(lm.model))
    halves[0].__enter__(), halves[1].__enter__()
    assert torch.equal(logits(first.model), apart[0])
    halves[0].__exit__(None, None, None)
    assert torch.equal(logits(second.model), apart[1])
    halves[1].__exit__(None, None, None)
    assert config._attn_implementation == "sdpa"
    assert type(config._attn_implementation) is str


def test_a_copy_made_inside_is_a_plain_model() -> None:
    model = tiny.model("llama")
    model.config._attn_implementation = "sdpa"
    lm, plain = wrap(model), logits(model)
    inside = intervene(lm, ablate("layers.1.attn.out"), scaled(PATTERN, 0.5))
    with inside, trace(lm, "layers.0.resid_pre", stop=False) as seen:
        twin, twin_lm = copy.deepcopy(model), copy.deepcopy(lm)
        logits(twin)
        assert torch.equal(logits(twin), logits(twin_lm.model))
    assert twin.config._attn_implementation == "sdpa"
    with intervene(lm, scaled("layers.1.attn.out", -5.0)):
        assert torch.equal(logits(twin), plain)
    with pytest.raises(Exception, match="never reached"):
        seen["layers.0.resid_pre"]
    with intervene(twin_lm, scaled("layers.1.attn.out", -5.0)):
        changed = logits(twin_lm.model)
        assert torch.equal(logits(model), plain)
    with intervene(wrap(twin_lm.model), scaled("layers.1.attn.out", -5.0)):
        assert torch.equal(logits(twin_lm.model), changed)


# --- threads --------------------------------------------------------------------------------------


def in_a_thread(do: Callable[[], Any]) -> list[BaseException | Any]:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(do())
        except InputError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found


@pytest.mark.parametrize(
    "do",
    [
        lambda lm: lm(ROWS),
        lambda lm: lm.model(**ID),
        lambda lm: capture(lm, ROWS, "layers.0.resid_pre"),
        lambda lm: generate(lm, ROWS[:1], tokens=1),
    ],
)
def test_another_thread_is_refused_while_someone_listens(do: Callable[[Any], Any]) -> None:
    lm = wrap(tiny.model("llama"))
    with intervene(lm, ablate("layers.1.mlp.out")):
        [told] = in_a_thread(lambda: do(lm))
    assert isinstance(told, InputError)
    assert "another thread" in str(told)
    [fine] = in_a_thread(lambda: do(lm))
    assert not isinstance(fine, InputError)


def test_a_thread_that_runs_already_is_not_changed_midway() -> None:
    """The main thread may not begin to listen while another's forward pass is under way."""
    lm = wrap(tiny.model("llama"))
    inside, go_on = threading.Event(), threading.Event()
    hold = lm.model.model.layers[1].register_forward_hook(
        lambda *_: (inside.set(), go_on.wait(5), None)[2]
    )
    thread = threading.Thread(target=lambda: lm(ROWS))
    thread.start()
    try:
        assert inside.wait(5)
        with (
            pytest.raises(InputError, match="another thread"),
            intervene(lm, ablate("layers.2.mlp.out")),
        ):
            pass
    finally:
        go_on.set()
        thread.join()
        hold.remove()


# --- compiled, training ---------------------------------------------------------------------------


def _whole(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def _layer(model: Any) -> Any:
    model.model.layers[1].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "name"), [(_whole, "LlamaForCausalLM"), (_layer, "`model.layers.1`")]
)
def test_compiled_models_are_refused(make: Callable[[Any], Any], name: str) -> None:
    with pytest.raises(InputError, match=f"{name}.* is compiled"):
        wrap(make(tiny.model("llama")))
    lm = wrap(tiny.model("llama"))
    make(lm.model)
    for block in (intervene(lm, ablate("layers.1.mlp.out")), trace(lm, "layers.1.mlp.out")):
        with pytest.raises(InputError, match="is compiled"), block:
            pass


def test_an_optimized_module_gives_the_model_inside() -> None:
    """That one is not compiled, so changes act; an LM around the wrapper itself is refused."""
    model = tiny.model("llama")
    compiled = torch.compile(model, backend="eager")
    lm = wrap(compiled)
    plain = logits(lm.model)
    with intervene(lm, ablate("layers.1.mlp.out")):
        assert not torch.equal(logits(lm.model), plain)
    with pytest.raises(InputError, match="this OptimizedModule is compiled"):
        LM(compiled, lm.family)


def test_the_same_model_inside_and_outside_a_block() -> None:
    """In train mode dropout is off in every run through the LM, and the flags are as they were,
    also after an error."""
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ).train()
    lm = wrap(model)
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    with torch.no_grad():
        runs = [lm(ROWS)["logits"] for _ in range(2)]
    with trace(lm, "layers.0.resid_pre", stop=False):
        runs.append(lm(ROWS)["logits"])
        model.train()  # a user's own loop, inside the block
        runs.append(lm(ROWS)["logits"])
    assert all(torch.equal(runs[0], run) for run in runs[1:])
    assert all(module.training for module in model.modules())
    model.transformer.h[0].eval()
    new = [generate(lm, ROWS, tokens=4, eos_token_id=None)[0].tolist() for _ in range(3)]
    assert new[0] == new[1] == new[2]

    def fail() -> None:
        with trace(lm, "layers.0.resid_pre", stop=False):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [module.training for module in model.modules()] == flags


# --- a direct call of the Hugging Face model ------------------------------------------------------


def laid_out(left: bool) -> dict[str, torch.Tensor]:
    width = max(map(len, ROWS))
    pads = [[0] * (width - len(row)) for row in ROWS]
    ids = [pad + row if left else row + pad for row, pad in zip(ROWS, pads)]
    ones = [[1] * len(row) for row in ROWS]
    mask = torch.tensor([pad + one if left else one + pad for one, pad in zip(ones, pads)])
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": torch.tensor(ids), "attention_mask": mask, "position_ids": places}


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("positions", [-1, 1, [0, -2], [[0], [1]]])
def test_positions_in_a_direct_call_are_the_examples_own(left: bool, positions: Any) -> None:
    lm, site = tiny.lm("llama"), "layers.1.resid_post"
    given = laid_out(left)
    with torch.no_grad(), intervene(lm, add(site, VALUE, positions=positions)):
        expected = lm(ROWS)["logits"]
        got = lm.model(**given).logits
    for row, ids in enumerate(ROWS):
        assert (
            tiny.gap(got[row][given["attention_mask"][row].bool()], expected[row, : len(ids)])
            < 1e-5
        )
    names = (site, "layers.1.attn.pattern", "layers.1.attn.k")
    with trace(lm, *names, positions=positions, stop=False) as ours:
        lm(ROWS)
    with trace(lm, *names, positions=positions, stop=False) as direct:
        lm.model(**given)
    assert tiny.gap(direct[site], ours[site]) < 1e-5
    assert tiny.gap(direct["layers.1.attn.k"], ours["layers.1.attn.k"]) < 1e-5
    key = direct["layers.1.attn.pattern"][1][..., : len(ROWS[1])]
    assert tiny.gap(key, ours["layers.1.attn.pattern"][1][..., : len(ROWS[1])]) < 1e-5


@pytest.mark.parametrize("left", [True, False])
def test_a_mean_over_a_direct_call_leaves_padding_out(left: bool) -> None:
    lm, site = tiny.lm("llama"), "layers.1.resid_post"
    with trace(lm, site, stop=False) as direct:
        lm.model(**laid_out(left))
    assert direct[site].shape[1] == 6
    assert tiny.gap(direct.mean(site), capture(lm, ROWS, site).mean(site)) < 1e-5


def test_positional_arguments_are_read_too() -> None:
    lm, given = tiny.lm("llama"), laid_out(True)
    with torch.no_grad(), intervene(lm, add("layers.1.resid_post", VALUE, positions=1)):
        named = lm.model(**given).logits
        bare = lm.model(given["input_ids"], given["attention_mask"], given["position_ids"]).logits
    assert torch.equal(named, bare)


def test_a_mask_that_does_not_number_tokens_is_refused() -> None:
    lm, given = tiny.lm("llama"), laid_out(False)
    hole = given | {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]])}
    square = given | {"attention_mask": torch.zeros(2, 1, 6, 6)}
    with torch.no_grad(), intervene(lm, add("layers.1.resid_post", VALUE, positions=-1)):
        with pytest.raises(InputError, match="hides tokens between others"):
            lm.model(**hole)
        with pytest.raises(InputError, match=r"shape \(2, 1, 6, 6\)"):
            lm.model(**square)
    with torch.no_grad(), intervene(lm, add("layers.1.resid_post", VALUE)):
        lm.model(**hole), lm.model(**square)


def test_a_direct_generation_keeps_the_prompts_numbering() -> None:
    lm = tiny.lm("llama")
    given = {name: x for name, x in laid_out(True).items() if name != "position_ids"}
    changes = [
        add("layers.0.attn.v", 40.0, positions=[0, -1]),
        add("layers.1.resid_post", 3 * VALUE, positions=-2),
    ]
    with intervene(lm, *changes):
        ours = generate(lm, ROWS, tokens=4, eos_token_id=None)
        direct = lm.model.generate(
            **given, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert direct[:, 6:].tolist() == [new.tolist() for new in ours]
