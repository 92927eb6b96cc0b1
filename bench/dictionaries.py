"""Our training of sparse dictionaries beside SAELens 6, on the same stored vectors, and its folders
read and written both ways.

    python bench/dictionaries.py make DIR    an environment for SAELens, outside the checkout
    python bench/dictionaries.py run DIR     both in one process there
    python bench/dictionaries.py splice      a spliced forward pass of SmolLM2 beside a plain one

What comes out is written to bench/dictionaries.json.

Vectors a second are of processor time on one thread, so that a busy machine changes the ratio
little; the two take turns, and the fastest turn of each counts. Both learn 4,608 features (8 for
each of 576 numbers) with batches of 2,048. SAELens runs as its own trainer runs, without logging.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

HERE = Path(__file__)
WHERE = HERE.with_suffix(".json")
DIM, WIDTH, K, BATCH, STEPS, TURNS = 576, 4608, 32, 2048, 2, 2
KINDS = ("topk", "relu", "jumprelu", "gated")


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("place", type=click.Path(path_type=Path))
def make(place: Path) -> None:
    """The environment, once."""
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, "sae-lens>=6,<7"], check=True)


@main.command()
@click.argument("place", type=click.Path(path_type=Path))
@click.option("--kind", "kinds", multiple=True, default=KINDS)
def run(place: Path, kinds: tuple[str, ...]) -> None:
    """Speed and folders."""
    ours = {"PYTHONPATH": str(HERE.parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    command = [str(place / "bin" / "python"), str(HERE), "inside", *kinds]
    subprocess.run(command, check=True, env=os.environ | ours)


def vectors(n: int = 8 * BATCH) -> torch.Tensor:
    """Sums of few of 2,000 directions and noise, as activations are: a mean, and norms that
    differ."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2000, DIM, generator=rng), dim=1)
    which = torch.randint(2000, (n, 20), generator=rng)
    size = torch.rand(n, 20, generator=rng)
    found = torch.randn(n, DIM, generator=rng) * 0.05 + 0.3
    return 3 * (found + torch.einsum("nk,nkd->nd", size, rows[which]))


def ours(x: torch.Tensor, kind: Any) -> float:
    from stratoscope.engine.sparse import learn

    begun = time.process_time()
    learn(x, width=WIDTH, kind=kind, steps=STEPS, batch_size=BATCH, site_in="layers.8.mlp.out")
    return time.process_time() - begun


def theirs(x: torch.Tensor, kind: str) -> float:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"topk": "TopK", "relu": "Standard", "jumprelu": "JumpReLU", "gated": "Gated"}[kind]
    shape: dict[str, Any] = {"d_in": DIM, "d_sae": WIDTH, "device": "cpu"}
    shape |= {"k": K} if kind == "topk" else {}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(**shape)
    begun = time.process_time()
    made = getattr(sae_lens, f"{name}TrainingSAE")(config)
    batches = itertools.cycle(x[torch.randperm(len(x))].split(BATCH))
    settings = SAETrainerConfig(STEPS * BATCH, BATCH, lr_end=3e-4)
    SAETrainer(settings, made, batches).fit()
    return time.process_time() - begun


def fastest(x: torch.Tensor, kind: str) -> dict[str, float]:
    """Vectors a second of each."""
    turns = [(ours(x, kind), theirs(x, kind)) for _ in range(TURNS)]
    spent = [min(one) for one in zip(*turns)]
    rate = [round(STEPS * BATCH / one) for one in spent]
    return {"ours": rate[0], "theirs": rate[1], "ratio": round(spent[1] / spent[0], 2)}


def gap(one: torch.Tensor, two: torch.Tensor) -> float:
    return float(((one - two).abs().max() / two.abs().max()).detach())


def folders(x: torch.Tensor) -> dict[str, dict[str, float]]:
    """Largest differences of encodings and outputs, of the largest: ours read by SAELens, and its
    own read by us."""
    import sae_lens

    from stratoscope.engine.dictionary import Dictionary
    from stratoscope.engine.sparse import learn

    found, out = {}, {"site_in": "layers.8.mlp.in", "site_out": "layers.8.mlp.out"}
    cases: dict[str, tuple[Any, Any, dict[str, str]]] = {
        kind: (kind, None, {"site_in": "layers.8.mlp.out"}) for kind in KINDS
    }
    cases |= {f"{kind} transcoder": (kind, x.roll(1, 1), out) for kind in ("relu", "jumprelu")}
    for name, (kind, y, sites) in cases.items():
        made = learn(x, y, width=96, kind=kind, steps=20, batch_size=256, **sites)
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            there = sae_lens.SAE.load_from_disk(made.save(first))
            z = there.encode(x)
            numbers = {
                "features a token": float((z > 0).sum(dim=1).float().mean()),
                "encoding": gap(z, made.encode(x)),
                "output": gap(there.decode(z), made(x)),
            }
            with torch.no_grad():
                for value in there.parameters():  # another dictionary than the one we wrote
                    value.mul_(1.1)
            there.save_model(second)
            back = Dictionary.load(second)
            z = there.encode(x)
            numbers |= {"encoding back": gap(back.encode(x), z),
                        "output back": gap(back(x), there.decode(z))}  # fmt: skip
        found[name] = {what: float(f"{value:.1e}") for what, value in numbers.items()}
    return found


@main.command(hidden=True)
@click.argument("kinds", nargs=-1)
@torch.no_grad()
def inside(kinds: tuple[str, ...]) -> None:
    import sae_lens

    torch.set_num_threads(1)
    x = vectors()
    with torch.enable_grad():
        there = {"folders": folders(x[:512])}
        keep({"sae_lens": sae_lens.__version__, "torch": torch.__version__} | there)
        speeds = {kind: fastest(x, kind) for kind in kinds}
    keep({"vectors_per_second": speeds})


@main.command()
@torch.no_grad()
def splice() -> None:
    """A pass of 4 x 64 tokens through SmolLM2, plain and with a transcoder of 2,304 features."""
    import stratoscope
    from stratoscope.engine.dictionary import Dictionary
    from stratoscope.features import splice as method

    lm = stratoscope.load("smollm2")
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng) / 24  # noqa: E731
    made = Dictionary(
        W_enc=draw(DIM, 4 * DIM), b_enc=draw(4 * DIM), W_dec=draw(4 * DIM, DIM), b_dec=draw(DIM),
        b_dec_out=draw(DIM), kind="topk", k=K, site_in="layers.8.mlp.in",
        site_out="layers.8.mlp.out",
    )  # fmt: skip
    batch = lm.batch(torch.randint(100, 9000, (4, 64), generator=rng).tolist())

    def spent(call: Callable[[], Any]) -> float:
        begun = time.process_time()
        call()
        return time.process_time() - begun

    turns = []
    for _ in range(5):
        plain = spent(lambda: lm(batch))
        with method.edit(lm, made, off=[3]):
            turns.append((plain, spent(lambda: lm(batch))))
    one, other = (min(each) for each in zip(*turns))
    keep({"spliced_over_plain": round(other / one, 3), "plain_seconds": round(one, 3)})


def keep(numbers: dict[str, Any]) -> None:
    there = json.loads(WHERE.read_text()) if WHERE.is_file() else {}
    for key, value in numbers.items():
        there[key] = there.get(key, {}) | value if isinstance(value, dict) else value
    WHERE.write_text(json.dumps(there, indent=2) + "\n")
    click.echo(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
