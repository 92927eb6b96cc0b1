"""Our merges beside PEFT's `merge_utils` and mergekit's methods and command, and what we read of
PEFT's adapters beside its `merge_and_unload`.

    python bench/merge.py make DIR    an environment for both, outside the checkout
    python bench/merge.py run DIR     numbers on random tensors, adapters of tiny models
    python bench/merge.py whole DIR   SmolLM2 with two models of it by TIES, both, as folders

What comes out is written to bench/merge.json. A gap is the largest difference over the largest
value. Seconds are of processor time on one thread, memory the most that was resident, files that
are mapped included, of a process that does nothing else.

mergekit differs in two definitions, and is asked in words that mean ours. Its DARE makes what is
left as long (in the sum of sizes) as it was before dropping; without that and with lambda = 1 /
density it is DARE's paper's, PEFT's and ours. Its dare_ties divides by nothing unless told
`normalize`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

HERE = Path(__file__)
WHERE = HERE.with_suffix(".json")
SHAPES = ((40, 30), (200,), (3, 4, 5, 6))
WEIGHTS = ((1.0, 1.0, 1.0), (0.3, 1.7, 0.6), (1.0, -0.5, 2.0))
DENSITIES = (0.2, 0.5, 0.83)


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("place", type=click.Path(path_type=Path))
def make(place: Path) -> None:
    """The environment, once."""
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "torch==2.13.0", "peft==0.21.2", "mergekit==0.1.5"], check=True)
    subprocess.run([*pip, str(HERE.parents[1])], check=True)


def inside(place: Path, *words: Any) -> dict[str, Any]:
    """One of our hidden commands there; what it prints last is JSON."""
    ours = {"PYTHONPATH": str(HERE.parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    command = [str(place / "bin" / "python"), str(HERE), *map(str, words)]
    done = subprocess.run(command, check=True, env=os.environ | ours, stdout=subprocess.PIPE)
    return json.loads(done.stdout.decode().splitlines()[-1])


@main.command()
@click.argument("place", type=click.Path(path_type=Path))
def run(place: Path) -> None:
    """Numbers, in a minute."""
    keep(inside(place, "numbers") | inside(place, "adapters"))


def gap(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


# --- on random tensors ----------------------------------------------------------------------------


def of_peft(method: str, taus: Tensor, weights: Tensor, density: float) -> Tensor:
    from peft.utils import merge_utils

    given: dict[str, Any] = {} if method == "task_arithmetic" else {"density": density}
    return getattr(merge_utils, method)(list(taus), weights, **given)


def of_mergekit(method: str, taus: Tensor, weights: Tensor, density: float) -> Tensor:
    """Of models that are the base 0 and these."""
    from mergekit.merge_methods import base, registry

    function: Any = registry.get(method)
    if method == "linear":
        batch = base.TensorBatch(tuple(x[None] for x in taus))
        return function.merge_batch(batch, weight=weights[None], normalize=True)[0]
    dare = method.startswith("dare")
    group = base.TensorGroup.from_tensors([torch.zeros_like(taus[0]), *taus], base_index=0)
    options = {
        "weight": dict(enumerate(weights.tolist(), 1)),
        "density": dict.fromkeys(range(1, len(taus) + 1), density),
        "normalize": method.endswith("ties"),
        "lambda": 1 / density if dare else 1.0,
        "rescale": False,
        "int8_mask": False,
    }
    return function.merge_group(group, **options)


PEERS: dict[str, tuple[Callable[..., Tensor], bool, tuple[str, ...]]] = {
    "peft": (
        of_peft,
        False,
        ("task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties"),
    ),
    "mergekit": (
        of_mergekit,
        True,
        ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"),
    ),
}


@main.command(hidden=True)
@torch.no_grad()
def numbers() -> None:
    """The largest gap of each method over shapes, weights and densities; one seed for both."""
    from importlib.metadata import version

    from stratoscope.editing import _merge_rules as rules

    found: dict[str, dict[str, float]] = {}
    for peer, (function, shares, methods) in PEERS.items():
        worst = dict.fromkeys(methods, 0.0)
        for number, (shape, share, density) in enumerate(
            (a, b, c) for a in SHAPES for b in WEIGHTS for c in DENSITIES
        ):
            taus = torch.randn(3, *shape, generator=torch.Generator().manual_seed(number))
            weights = torch.tensor(share)
            for method in methods:
                torch.manual_seed(number)
                theirs = function(method, taus, weights, density)
                ours = rules.mixed(
                    taus, weights, method, density=density, shares=shares,
                    generator=torch.Generator().manual_seed(number),
                )  # fmt: skip
                worst[method] = max(worst[method], gap(ours, theirs))
        found[peer] = {method: float(f"{x:.1e}") for method, x in worst.items()}
    versions = {name: version(name) for name in ("torch", "peft", "mergekit")}
    click.echo(json.dumps({"versions": versions, "gaps": found}))


# --- adapters -------------------------------------------------------------------------------------


def tiny(kind: str) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    if kind == "gpt2":
        config = hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        return hf.GPT2LMHeadModel(config).eval()
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "up_proj"]}),
    "lora of conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "rank-stabilised": ("llama", {"target_modules": ["v_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"k_proj": 3},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "o_proj"]}),
    "a module saved whole": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
}


@main.command(hidden=True)
def adapters() -> None:
    """Gaps between the vector of an adapter, in memory and as a folder, and merge_and_unload()."""
    import peft

    from stratoscope.editing import task_vector
    from stratoscope.errors import InputError

    found: dict[str, dict[str, Any]] = {}
    for name, (kind, options) in LORAS.items():
        base = tiny(kind)
        start = {key: x.clone() for key, x in base.state_dict().items()}
        made = peft.get_peft_model(
            deepcopy(base),
            peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, task_type="CAUSAL_LM", **options),
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in made.parameters():
                if value.requires_grad:
                    value.add_(torch.randn(value.shape, generator=generator) * 0.05)
        row: dict[str, Any] = {"in memory": task_vector.between(base, made)}
        with tempfile.TemporaryDirectory() as folder:
            made.save_pretrained(folder)
            try:
                row["folder"] = task_vector.between(base, folder)
            except InputError as error:
                row["folder"] = str(error)
            merged = deepcopy(made).merge_and_unload().state_dict()
            for where, tau in row.items():
                if not isinstance(tau, str):
                    gaps = [
                        float((tau[k] - (merged[k] - start[k])).abs().max()) for k in tau.shapes
                    ]
                    row[where] = float(f"{max(gaps):.1e}")
        found[name] = row
    click.echo(json.dumps({"adapters, largest difference": found}))


# --- whole models ---------------------------------------------------------------------------------


@main.command()
@click.argument("place", type=click.Path(path_type=Path))
@click.option("--model", default="smollm2")
def whole(place: Path, model: str) -> None:
    """Two models of noise around a real one, merged as folders."""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        inside(place, "noise", model, there)
        names = [there / name for name in ("base", "first", "second")]
        rows = {
            "ours": inside(place, "ours", *names, there / "ours"),
            "mergekit": inside(place, "theirs", *names, there / "theirs"),
        }
        names += [there / "ours", there / "theirs"]
        rows["beside mergekit"] = differing(*(opened(name) for name in names))
    keep({"whole": {model: rows}})


def opened(folder: Path) -> dict[str, Any]:
    """Of each tensor of a folder what reads it."""
    from safetensors import safe_open

    handles = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
    return {name: partial(h.get_tensor, name) for h in handles for name in h.keys()}  # noqa: SIM118


def differing(*models: dict[str, Any]) -> dict[str, Any]:
    """How many numbers differ by more than 1e-6, and how many of them not because several of a
    task vector are as large as the smallest that is kept: of these any may be."""
    count, odd, total, worst = 0, 0, 0, 0.0
    for name in models[-1]:
        base, first, second, ours, theirs = (one[name]().flatten() for one in models)
        equal = torch.zeros_like(base, dtype=torch.bool)
        for tau in (first - base, second - base):
            least = tau.abs().topk(max(1, int(0.2 * len(tau)))).values[-1]
            equal |= tau.abs() == least
        apart = (ours - theirs).abs()
        total, count = total + len(base), count + int((apart > 1e-6).sum())
        odd += int(((apart > 1e-6) & ~equal).sum())
        worst = max(worst, float(apart[~equal].max())) if bool((~equal).any()) else worst
    told = {"tensors": len(models[-2]), "numbers": total, "differ": count}
    return told | {"not for a tie": odd, "largest difference without ties": worst}


@main.command(hidden=True)
@click.argument("model")
@click.argument("there", type=click.Path(path_type=Path))
@torch.no_grad()
def noise(model: str, there: Path) -> None:
    import stratoscope

    lm = stratoscope.load(model)
    for seed, name in enumerate(("base", "first", "second")):
        generator = torch.Generator().manual_seed(seed)
        for value in lm.model.parameters() if seed else ():
            value.add_(torch.randn(value.shape, generator=generator) * 1e-3)
        lm.model.save_pretrained(there / name)
        lm.tokenizer.save_pretrained(there / name)
    click.echo("{}")


def spent(call: Callable[[], Any]) -> None:
    begun = time.process_time()
    call()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = {"cpu_seconds": round(time.process_time() - begun, 1), "most_resident_mb": round(most)}
    click.echo(json.dumps(told))


@main.command(hidden=True)
@click.argument("places", nargs=4, type=click.Path(path_type=Path))
def ours(places: tuple[Path, ...]) -> None:
    from stratoscope.editing import merge

    torch.set_num_threads(1)
    base, first, second, out = places
    spent(lambda: merge.write(base, [first, second], out, method="ties", density=0.2))


@main.command(hidden=True)
@click.argument("places", nargs=4, type=click.Path(path_type=Path))
def theirs(places: tuple[Path, ...]) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    torch.set_num_threads(1)
    base, first, second, out = map(str, places)
    options = {"weight": 1.0, "density": 0.2}
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "ties",
            "base_model": base,
            "dtype": "float32",
            "models": [{"model": one, "parameters": options} for one in (first, second)],
        }
    )
    quiet = MergeOptions(write_model_card=False, quiet=True, copy_tokenizer=False)
    spent(lambda: run_merge(config, out, quiet))


def keep(numbers: dict[str, Any]) -> None:
    there = json.loads(WHERE.read_text()) if WHERE.is_file() else {}
    for key, value in numbers.items():
        there[key] = there.get(key, {}) | value if isinstance(value, dict) else value
    WHERE.write_text(json.dumps(there, indent=2) + "\n")
    click.echo(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
