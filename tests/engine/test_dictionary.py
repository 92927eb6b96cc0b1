"""Every kind equals its formula in numpy; a folder written by hand as SAELens writes it is read as
SAELens reads it and written back as it was; what is not known is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from stratoscope.engine.dictionary import Dictionary
from stratoscope.engine.saelens import KINDS, hook_name
from stratoscope.errors import InputError, LoadError, SiteError
from support import tiny
from support.dictionaries import drawn

DIM, FEATURES, OUT, K = 6, 10, 4, 8  # of 10 features 8 are seldom all above 0
NAMES = [n for n in KINDS if n not in ("topk_transcoder", "topk_skip_transcoder")]
NAMES = [n for n in NAMES if not n.startswith("gated_")]  # SAELens has none of these
X = np.random.default_rng(7).normal(size=(2, 5, DIM)).astype(np.float32) + 0.3


def by_hand(name: str, **config: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A config and weights of SAELens 6, key for key."""
    rng, transcoder = np.random.default_rng(3), "transcoder" in name
    out = OUT if transcoder else DIM

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    weights = {"W_enc": draw(DIM, FEATURES), "W_dec": draw(FEATURES, out), "b_dec": draw(out)}
    if name == "gated":
        weights |= {key: draw(FEATURES) / 2 for key in ("b_gate", "b_mag", "r_mag")}
    else:
        weights["b_enc"] = draw(FEATURES)
    if "jumprelu" in name:
        weights["threshold"] = np.abs(draw(FEATURES))
    if "batchtopk" in name:
        weights["topk_threshold"] = np.array(0.8)
    if "skip" in name:
        weights["W_skip"] = draw(out, DIM)
    hooks = {"hook_name": "blocks.1.hook_resid_mid", "hook_name_out": "blocks.1.hook_mlp_out"}
    cfg = {
        "architecture": name, "d_in": DIM, "d_sae": FEATURES, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": not transcoder, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.18.0", "model_name": "gpt2", "hook_head_index": None}
        | (hooks if transcoder else {"hook_name": "blocks.1.hook_mlp_out"}),
    }  # fmt: skip
    cfg |= {"d_out": out} if transcoder else {}
    if "topk" in name:
        cfg |= {"k": K, "rescale_acts_by_decoder_norm": True}
    return cfg | config, weights


def folder(path: Path, cfg: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(cfg))
    save_file(weights, path / "sae_weights.safetensors")
    return path


def expected(
    cfg: dict[str, Any], w: dict[str, np.ndarray], x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Encodings and output by SAELens's formulas, in numpy and double."""
    w, given, name = (
        {k: v.astype(float) for k, v in w.items()},
        x.astype(float),
        cfg["architecture"],
    )
    x, back = given, lambda y: y
    if cfg["normalize_activations"] == "layer_norm":
        mu = x.mean(-1, keepdims=True)
        std = (x - mu).std(-1, keepdims=True, ddof=1)
        x, back = (x - mu) / (std + 1e-5), lambda y: y * std + mu
    elif cfg["normalize_activations"] == "constant_norm_rescale":
        c = np.sqrt(DIM) / np.linalg.norm(x, axis=-1, keepdims=True)
        x, back = x * c, lambda y: y / c
    transcoder = "transcoder" in name
    x = x - w["b_dec"] * cfg["apply_b_dec_to_input"] if not transcoder else x
    norm = np.linalg.norm(w["W_dec"], axis=1)
    if name == "gated":
        z = np.maximum(x @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"], 0)
        z = z * (x @ w["W_enc"] + w["b_gate"] > 0)
    else:
        pre = x @ w["W_enc"] + w["b_enc"]
        pre = pre * norm if cfg.get("rescale_acts_by_decoder_norm") else pre
        z = np.maximum(pre, 0)
        if name == "topk":
            least = np.sort(pre, axis=-1)[..., -K, None]
            z = z * (pre >= least)
        elif "jumprelu" in name:
            z = z * (pre > w["threshold"])
        elif "batchtopk" in name:
            z = z * (pre > w["topk_threshold"])
    y = (z / norm if cfg.get("rescale_acts_by_decoder_norm") else z) @ w["W_dec"] + w["b_dec"]
    y = y if transcoder else back(y)
    return z, y + given @ w["W_skip"].T if "skip" in name else y


def same(found: torch.Tensor, wanted: np.ndarray) -> None:
    gap = np.abs(found.double().numpy() - wanted)
    assert gap.max() <= 1e-5 * max(1.0, np.abs(wanted).max())
    assert np.linalg.norm(gap) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_written_by_hand_is_read_as_saelens_reads_it(name: str, tmp_path: Path) -> None:
    cfg, weights = by_hand(name)
    read = Dictionary.load(folder(tmp_path / "a", cfg, weights))
    z, y = expected(cfg, weights, X)
    assert 0.05 < (z != 0).mean() < 0.95
    same(read.encode(torch.tensor(X)), z)
    same(read(torch.tensor(X)), y)
    transcoder = "transcoder" in name
    assert read.site_in == ("layers.1.resid_mid" if transcoder else "layers.1.mlp.out")
    assert read.site_out == "layers.1.mlp.out"
    # and what is written is what was there
    read.save(tmp_path / "b")
    again = json.loads((tmp_path / "b" / "cfg.json").read_text())
    there = load_file(tmp_path / "b" / "sae_weights.safetensors")
    if "batchtopk" in name:  # as SAELens does at the end of a training
        norm = np.linalg.norm(weights["W_dec"], axis=1)
        assert again["architecture"] == "jumprelu"
        assert "k" not in again
        assert np.allclose(there["threshold"], weights["topk_threshold"])
        assert np.allclose(there["W_enc"], weights["W_enc"] * norm, rtol=1e-5)
    else:
        assert {k: again[k] for k in cfg if k != "metadata"} == {
            k: v for k, v in cfg.items() if k != "metadata"
        }
        assert again["metadata"] | cfg["metadata"] | {"sae_lens_version": ""} == again[
            "metadata"
        ] | {"sae_lens_version": "", "hook_head_index": None}
        assert there.keys() == weights.keys()
        assert all(np.array_equal(there[key], weights[key]) for key in weights)
    back = Dictionary.load(tmp_path / "b")
    same(back.encode(torch.tensor(X)), z)
    assert back.kind == read.kind


@pytest.mark.parametrize("normal", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["standard", "topk", "gated", "jumprelu", "transcoder"])
def test_normalising_and_the_bias_are_read_as_saelens_does(
    name: str, shared: bool, normal: str, tmp_path: Path
) -> None:
    shared = shared and name != "transcoder"
    cfg, weights = by_hand(name, normalize_activations=normal, apply_b_dec_to_input=shared)
    read = Dictionary.load(folder(tmp_path, cfg, weights))
    z, y = expected(cfg, weights, X)
    x = torch.tensor(X)
    same(read.encode(x), z)
    same(read(x), y)
    change = torch.zeros(2, 5, FEATURES)
    change[..., 3] = 2.0
    difference = read.decode(read.encode(x) + change, x) - read(x)
    assert torch.allclose(read.moved(change, x), difference, atol=1e-5)
    if name != "transcoder":
        with pytest.raises(InputError, match="needs the x"):
            read.decode(read.encode(x))


@pytest.mark.parametrize("kind", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
@pytest.mark.parametrize("site_out", ["", "layers.0.mlp.out"])
def test_what_is_saved_is_the_same_function(kind: Any, site_out: str, tmp_path: Path) -> None:
    """Also where a folder has no word for it, and it is folded: a transcoder's input bias."""
    made = drawn(DIM, "layers.0.resid_mid", kind=kind, out=OUT if site_out else DIM,
                 site_out=site_out, rescale=kind == "topk")  # fmt: skip
    read = Dictionary.load(made.save(tmp_path))
    x = torch.tensor(X)
    assert torch.allclose(read.encode(x), made.encode(x), atol=1e-5)
    assert torch.allclose(read(x), made(x), atol=1e-5)
    assert (read.kind, read.site_in, read.site_out) == (made.kind, made.site_in, made.site_out)
    second = Dictionary.load(read.save(tmp_path))
    same_bits = {
        name: torch.equal(x, read.parts()[0][name]) for name, x in second.parts()[0].items()
    }
    assert all(same_bits.values()), same_bits
    assert second.parts()[1] == read.parts()[1]


def test_a_scale_that_was_never_folded_in_is_asked_for(tmp_path: Path) -> None:
    cfg, weights = by_hand("standard", normalize_activations="expected_average_only_in")
    place = folder(tmp_path, cfg, weights)
    with pytest.raises(LoadError, match=r"expected_average_only_in.*scale="):
        Dictionary.load(place)
    z, y = expected(cfg, weights, 2.5 * X)
    read = Dictionary.load(place, scale=2.5)
    same(read.encode(torch.tensor(X)), z)
    same(read(torch.tensor(X)), y / 2.5)


def test_a_folder_of_saelens_before_6(tmp_path: Path) -> None:
    new, weights = by_hand("topk")
    old = {
        "architecture": "standard", "d_in": DIM, "d_sae": FEATURES, "dtype": "torch.float32",
        "hook_point": "blocks.2.hook_resid_post", "activation_fn_str": "topk", "lr": 3e-4,
        "activation_fn_kwargs": {"k": K}, "normalize_activations": False, "model_name": "gpt2",
        "finetuning_scaling_factor": False,
    }  # fmt: skip
    read = Dictionary.load(folder(tmp_path, old, weights))
    wanted = new | {"rescale_acts_by_decoder_norm": False}
    same(read.encode(torch.tensor(X)), expected(wanted, weights, X)[0])
    assert read.site_in == "layers.2.resid_post"
    for key, value in {"activation_fn_str": "tanh-relu", "finetuning_scaling_factor": True}.items():
        with pytest.raises(LoadError, match=key.removesuffix("_str")):
            Dictionary.load(folder(tmp_path, old | {key: value}, weights))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal'"),
        ({"relu_power": 2}, "`relu_power` is 2"),
        ({"normalize_activations": "batch_norm"}, "`normalize_activations` is 'batch_norm'"),
        ({"reshape_activations": "hook_q"}, "`reshape_activations`"),
        ({"metadata": {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 3}}, "head_index"),
        ({"d_in": 7}, "d_in = 7, and by sae_weights.safetensors it is 6"),
        ({"dtype": "float7"}, "float7"),
        ({"metadata": {}}, "site_in="),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    cfg, weights = by_hand("standard")
    assert Dictionary.load(folder(tmp_path, cfg | {"l1_coefficient": 4, "new_key": None}, weights))
    with pytest.raises(LoadError, match=said):
        Dictionary.load(folder(tmp_path, cfg | change, weights))


def test_tensors_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    cfg, weights = by_hand("jumprelu")
    with pytest.raises(LoadError, match=r"differs in threshold"):
        Dictionary.load(folder(tmp_path, cfg, {k: v for k, v in weights.items() if k[0] != "t"}))
    with pytest.raises(LoadError, match=r"differs in scaling_factor"):
        Dictionary.load(folder(tmp_path, cfg, weights | {"scaling_factor": weights["b_enc"]}))
    with pytest.raises(LoadError, match=r"cannot be read"):
        Dictionary.load(tmp_path / "nowhere")


@pytest.mark.usefixtures("without_type_checks")
def test_parts_that_do_not_fit_are_refused() -> None:
    good = drawn(DIM, "layers.0.mlp.out").parts()[0]
    for change, said in (
        ({"kind": "softplus"}, "softplus"),
        ({"kind": "jumprelu"}, "needs `threshold`"),
        ({"kind": "topk", "k": 99}, "k=99"),
        ({"b_enc": torch.zeros(3)}, r"`b_enc` is \(3,\)"),
        ({"W_dec": torch.zeros(24, 9)}, "`b_dec` is"),
    ):
        with pytest.raises(InputError, match=said):
            Dictionary(**{**good, "site_in": "layers.0.mlp.out", **change})


def test_a_wrong_width_or_site_is_said_with_both() -> None:
    lm = tiny.lm("gpt2")
    assert [str(s) for s in drawn(32, "blocks.1.hook_mlp_out").sites(lm)] == [
        "layers.1.mlp.out"
    ] * 2
    assert drawn(32, "layers.0.attn.z").sites(lm)
    with pytest.raises(InputError, match=r"6 numbers a token at `layers.0.mlp.out`.*has 32"):
        drawn(DIM, "layers.0.mlp.out").sites(lm)
    with pytest.raises(SiteError, match="one vector at each token"):
        drawn(DIM, "layers.0.attn.pattern").sites(lm)
    with pytest.raises(SiteError, match="layer 9"):
        drawn(32, "layers.9.mlp.out").sites(lm)


def test_sites_have_transformer_lens_s_names() -> None:
    names = {
        "layers.3.resid_pre": "blocks.3.hook_resid_pre",
        "layers.0.mlp.out": "blocks.0.hook_mlp_out",
        "layers.1.mlp.act": "blocks.1.mlp.hook_post", "layers.2.attn.z": "blocks.2.attn.hook_z",
        "layers.2.attn.q": "blocks.2.attn.hook_rot_q", "vision.layers.1.mlp.out":
        "vision.layers.1.mlp.out", "blocks.8.ln2.hook_normalized": "blocks.8.ln2.hook_normalized",
    }  # fmt: skip
    assert {site: hook_name(site) for site in names} == names
