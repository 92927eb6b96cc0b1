"""An own model, from its class to a fresh process: the family on the class is believed when it is
proved."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PoolFormerConfig, PoolFormerForImageClassification

import stratoscope as st
from stratoscope.architectures.vision import metaformer, pooling
from stratoscope.engine.intervene import intervene, replaced
from stratoscope.engine.trace import capture
from stratoscope.errors import FamilyError, InputError, LoadError, SiteError
from stratoscope.layers import module_importance
from stratoscope.models import own, wrap
from stratoscope.neurons import activation_sparsity

ONE = {"image_size": 16, "num_labels": 5, "stages": [{"depth": 3, "dim": 24, "patch": 4}]}
TWO = ONE | {"stages": [{"depth": 2, "dim": 16, "patch": 2}, {"depth": 2, "dim": 32, "patch": 2}]}
KINDS = {
    "plain": ONE,
    "scaled": ONE | {"layer_scale": 0.1},
    "group": ONE | {"norm": "group"},
    "two stages": TWO | {"layer_scale": 0.5},
}


def pictures(n: int = 2) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


EXAMPLE = {
    "build": ONE | {"layer_scale": 0.1},
    "built": {
        "examples": [{"pixel_values": picture[None]} for picture in pictures()["pixel_values"]],
        "parameters": (4 * 4 * 3 + 1 + 16) * 24 + 3 * (2 * 24 * 96 + 96 + 7 * 24) + 48 + 25 * 5,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_wrapped_proved_and_read_out(kind: str) -> None:
    lm = wrap(metaformer.build(**KINDS[kind]))
    assert (lm.family.name, lm.readout.kind, lm.readout.where) == ("metaformer", "classes", "mean")
    x = pictures()
    seen = capture(lm, x, *lm.sites("layers.*.mix.out"), "final_norm")
    # beside plain PyTorch: the mixer of the first layer on the normalised embeddings
    body = lm.model.metaformer
    first = body.layers[0]
    mixed = first.mixer(first.norm_1(body.patches[0](x["pixel_values"])))
    mixed = mixed if first.scale_1 is None else first.scale_1 * mixed
    torch.testing.assert_close(seen["layers.0.mix.out"], mixed)
    with torch.no_grad():
        logits = lm.model.classifier(seen["final_norm"].mean(dim=1))
        torch.testing.assert_close(logits, lm.model(**x).logits)


def test_every_parameter_has_a_gradient_and_is_counted() -> None:
    model = metaformer.build(**ONE | {"layer_scale": 0.1})
    model(**pictures(), labels=torch.tensor([1, 3])).loss.backward()
    for name, parameter in model.named_parameters():
        assert float(parameter.grad.abs().sum()) > 0, name
    dim, m, depth, positions = 24, 96, 3, 16
    stated = (4 * 4 * 3 + 1 + positions) * dim + depth * (2 * dim * m + m + 5 * dim)
    stated += 2 * dim + (dim + 1) * 5 + depth * 2 * dim
    assert sum(p.numel() for p in model.parameters()) == stated


def test_a_batch_is_its_pictures_one_by_one() -> None:
    lm, x = wrap(metaformer.build(**KINDS["group"])), pictures(3)
    whole = capture(lm, x, "layers.2.resid_post")["layers.2.resid_post"]
    alone = [
        capture(lm, {"pixel_values": picture[None]}, "layers.2.resid_post")["layers.2.resid_post"]
        for picture in x["pixel_values"]
    ]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator() -> None:
    before = torch.get_rng_state()
    one, two, other = (metaformer.build(**ONE, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


def test_a_folder_opens_in_a_fresh_process_to_the_same_bits(tmp_path: Path) -> None:
    model = metaformer.build(**KINDS["two stages"])
    model.save_pretrained(tmp_path)
    program = (
        "import sys, torch, stratoscope as st\n"
        "lm = st.load(sys.argv[1])\n"
        "x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))\n"
        "print(*(v.hex() for v in lm({'pixel_values': x}).logits.flatten().tolist()))\n"
        "print(*sorted(m for m in sys.modules if m.startswith('stratoscope.architectures.')))\n"
        "print(type(lm.model).__module__, lm.family.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    logits, loaded, what = done.stdout.splitlines()
    with torch.no_grad():
        expected = [v.hex() for v in model(**pictures()).logits.flatten().tolist()]
    assert logits.split() == expected
    home = "stratoscope.architectures.vision"
    parts = "stratoscope.architectures.parts"  # and of all shelves nothing else
    blocks = [parts, f"{parts}.norm", f"{parts}.patches", home]
    assert loaded.split() == [*blocks, f"{home}.metaformer", f"{home}.pooling"]
    assert what == f"{home}.metaformer metaformer"


def test_a_type_of_ours_that_no_file_defines_is_refused(tmp_path: Path) -> None:
    metaformer.build(**ONE).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    for name in ("st_nothing_of_the_kind", "st_pooling"):  # the latter is a file, and no model
        config.write_text(config.read_text("utf-8").replace("st_metaformer", name), "utf-8")
        with pytest.raises(LoadError, match=rf"'{name}'.*none of this version defines it"):
            st.load(tmp_path)
        config.write_text(config.read_text("utf-8").replace(name, "st_metaformer"), "utf-8")
    config.write_text(config.read_text("utf-8").replace("st_metaformer", "st_../../x"), "utf-8")
    assert own.module_of(tmp_path) is None  # no path is made of it


def _wrong(**changes: object) -> object:
    def family(config: object) -> object:
        table = metaformer.family(config)
        return replace(table, towers={"": table.towers[""].but(**changes)})

    return staticmethod(family)


@pytest.mark.parametrize(
    "changes",
    [
        {"points": {"mix.out": metaformer.out_of("norm_1")}},
        {"points": {"mix.out": metaformer.out_of("mixer")}},  # without its scale
        {"points": {"mlp.act": metaformer.into("mlp.fc1")}},
        {"causal": True},
        {"residual": "parallel"},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_wrong_family_on_the_class_is_refused(changes: dict, monkeypatch) -> None:
    model = metaformer.build(**KINDS["scaled"])
    monkeypatch.setattr(type(model), "FAMILY", _wrong(**changes))
    with pytest.raises(FamilyError, match=r"does not hold|does not run"):
        wrap(model)


def test_the_class_comes_first_and_must_hold_a_family(monkeypatch) -> None:
    model = metaformer.build(**ONE)
    held = SimpleNamespace(config=model.config)
    assert own.family_of(held) is None
    monkeypatch.setattr(type(model), "FAMILY", {"": "layers"})
    with pytest.raises(FamilyError, match=r"FAMILY is dict .* must be a Family"):
        wrap(model)
    # a type that `families/` names too: the class is asked before the folder
    monkeypatch.setattr(type(model), "FAMILY", staticmethod(metaformer.family))
    monkeypatch.setattr(type(model.config), "model_type", "llama")
    assert wrap(model).family.name == "metaformer"


def test_layers_of_different_width_are_read_one_by_one_and_not_stacked() -> None:
    lm, x = wrap(metaformer.build(**TWO)), pictures()
    seen = capture(lm, x, "layers.*.resid_post", "layers.*.mlp.act")
    assert seen["layers.1.resid_post"].shape == (2, 64, 16)
    assert seen["layers.2.resid_post"].shape == (2, 16, 32)
    message = r"cannot be stacked.*`layers.0.resid_post` is \(2, 64, 16\).*layers.2.*\(2, 16, 32\)"
    with pytest.raises(SiteError, match=message):
        seen.stack("layers.*.resid_post")
    for method in (module_importance, activation_sparsity):
        with pytest.raises(SiteError, match="cannot be stacked"):
            method.measure(lm, x)
    # a change in the wide stage is what plain PyTorch makes of it
    new = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2))
    with intervene(lm, replaced("layers.2.mix.out", new)):
        after = capture(lm, x, "layers.2.resid_mid")["layers.2.resid_mid"]
    before = capture(lm, x, "layers.2.resid_pre")["layers.2.resid_pre"]
    torch.testing.assert_close(after, before + new)


def test_what_needs_attention_is_refused_by_name() -> None:
    lm = wrap(metaformer.build(**ONE))
    with pytest.raises(SiteError, match=r"this mixer is no attention; what it writes is mix\.out"):
        capture(lm, pictures(), "layers.0.attn.pattern")


def test_pooling_is_poolformers_and_linear() -> None:
    """Our weights in Transformers' PoolFormer give our logits; the pattern gives what is mixed."""
    sizes = {"depths": [3], "hidden_sizes": [24], "patch_sizes": [4], "strides": [4]}
    config = PoolFormerConfig(
        num_encoder_blocks=1, padding=[0], num_labels=5, layer_scale_init_value=0.1, **sizes
    )
    theirs, ours = (
        PoolFormerForImageClassification(config).eval(),
        metaformer.build(**ONE, norm="group", layer_scale=0.1),
    )
    names = {
        "patches.0": "encoder.patch_embeddings.0", "layers.": "encoder.block.0.",
        "norm_1": "before_norm", "norm_2": "after_norm", "scale_": "layer_scale_",
        "mlp.fc1": "output.conv1", "mlp.fc2": "output.conv2",
        "metaformer.norm": "norm", "metaformer.": "poolformer.",
    }  # fmt: skip
    ours.metaformer.patches[0].place.data.zero_()  # PoolFormer is not told where a patch lies
    state = {}
    for name, value in ours.state_dict().items():
        for mine, other in names.items():
            name = name.replace(mine, other)
        state[name] = value
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    del state["poolformer.encoder.patch_embeddings.0.place"]
    theirs.load_state_dict({name: value.reshape(shapes[name]) for name, value in state.items()})
    x = pictures()
    with torch.no_grad():
        torch.testing.assert_close(ours(**x).logits, theirs(**x).logits, rtol=1e-5, atol=1e-5)
    mixer, y = pooling.Mixer(6, (4, 4)), torch.randn(2, 16, 6)
    pattern = mixer.pattern(y)
    torch.testing.assert_close(torch.einsum("qk,bkd->bqd", pattern, y), mixer(y))
    assert float(pattern.sum(dim=-1).abs().max()) < 1e-6
    assert pattern[0, 2] == 0  # two columns away


def test_what_cannot_be_built_is_told() -> None:
    with pytest.raises(InputError, match="there is no mixer 'swirl'"):
        metaformer.build(stages=[{"mixer": "swirl"}])
    with pytest.raises(InputError, match="stage 1 cuts a side of 8 into patches of 3"):
        metaformer.build(stages=[{}, {"patch": 3}])
    with pytest.raises(InputError, match="norm 'rms': choose one of layer, group"):
        metaformer.build(norm="rms")
    with pytest.raises(InputError, match="a config was given, and norm beside it"):
        metaformer.build(metaformer.MetaFormerConfig(), norm="group")
