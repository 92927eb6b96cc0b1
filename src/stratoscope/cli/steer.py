"""Steer a model: fit vectors to pairs of texts, see what they do at every layer and strength, apply
one.

Examples:

stratoscope steer fit --model smollm2 --pairs pairs.jsonl --out calm

stratoscope steer grid --model smollm2 --vectors calm --strength 1 --strength 2 --prompts asked.txt
--answer " good" --foil " bad"

stratoscope steer apply --model smollm2 --vectors calm --layer 12 --strength 2 --prompt "I feel"
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _files, _options
from stratoscope.errors import InputError

if TYPE_CHECKING:
    import xarray as xr


@click.group(help=__doc__)
def command() -> None:
    pass


_vectors = click.option(
    "--vectors",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="A folder of `steer fit`, a control vector (.gguf), or lm-eval's steering file (.pt).",
)
_foreign = click.option("--foreign", is_flag=True, help="Take vectors fitted on other weights.")


@command.command("fit")
@_options.model
@_options.device
@click.option(
    "--pairs",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help='A .jsonl of {"positive": ..., "negative": ...}, or of [positive, negative].',
)
@click.option("--site", "sites", multiple=True, default=("layers.*.resid_post",), show_default=True)
@click.option("--how", default="mean", show_default=True, help="mean, pca or attribution.")
@click.option("--answer", help="For attribution: the word that the one side is for.")
@click.option("--foil", help="For attribution: the word that the other side is for.")
@click.option("--mean-of-tokens", is_flag=True, help="Read all tokens, not each text's last.")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder of the vectors.",
)
def fit_command(
    model: str,
    device: str,
    pairs: Path,
    sites: tuple[str, ...],
    how: str,
    answer: str | None,
    foil: str | None,
    mean_of_tokens: bool,
    out: Path,
) -> None:
    """Fit a vector at each site to pairs of texts that differ in one thing."""
    use_free_cores()
    import stratoscope

    _files.refuse_no_folder(out)
    rows = _files.rows(pairs)
    lm = stratoscope.load(model, device=device)
    fitted = stratoscope.editing.steer.fit(
        lm,
        rows,
        site=list(sites),
        how=how,
        positions=None if mean_of_tokens else -1,
        answer=answer,
        foil=foil,
    )
    fitted.save(out)
    click.echo(f"Saved to {out}: vectors of {len(rows)} pairs")
    for site, vector in fitted.vectors.items():
        share = fitted.agreement[site]
        click.echo(f"  {site}: norm {float(vector.norm()):.2f}, {share:.0%} of the pairs agree")


@command.command("grid")
@_options.model
@_options.device
@_vectors
@_foreign
@click.option("--strength", "strengths", multiple=True, required=True, type=float)
@click.option("--layer", "layers", multiple=True, type=int, help="Default: all that there are.")
@click.option(
    "--prompts",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="What is asked: a .txt with a prompt on each line, or a .jsonl.",
)
@click.option("--answer", required=True, help="The word that a push is meant to raise.")
@click.option("--foil", help="The word that it is compared with; without one, log p(answer).")
@click.option(
    "--texts",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Unrelated texts, whose perplexity and KL are counted too.",
)
@click.option("--last", is_flag=True, help="Push at each prompt's last token only.")
@click.option("--draws", default=2, show_default=True, help="Directions of each null.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Keep it (netCDF).")
def grid_command(
    model: str,
    device: str,
    vectors: Path,
    foreign: bool,
    strengths: tuple[float, ...],
    layers: tuple[int, ...],
    prompts: Path,
    answer: str,
    foil: str | None,
    texts: Path | None,
    last: bool,
    draws: int,
    seed: int,
    out: Path | None,
) -> None:
    """What the vectors do at every layer and strength, beside directions that mean nothing."""
    use_free_cores()
    import stratoscope

    _files.refuse_no_folder(out)
    asked, others = _files.rows(prompts), None if texts is None else _files.rows(texts)
    lm = stratoscope.load(model, device=device)
    grid = stratoscope.editing.steering_grid
    words = {"answer": answer, "foil": foil}
    if foil is None:
        words = {"metric": grid.log_probability(lm, [answer])}
    result = grid.measure(
        lm,
        asked,
        vectors=_read(lm, vectors, foreign),
        strengths=strengths,
        layers=list(layers) or "all",
        positions=-1 if last else None,
        texts=others,
        draws=draws,
        seed=seed,
        **words,
    )
    _show(result, grid.response(result))
    _files.save(result, out)


@command.command("apply")
@_options.model
@_options.device
@_vectors
@_foreign
@click.option("--layer", "layers", multiple=True, type=int, help="Whose vectors; repeat it.")
@click.option("--strength", default=1.0, show_default=True)
@click.option("--keep-norm", is_flag=True, help="Every token's vector keeps its length.")
@click.option("--prompt", "prompts", multiple=True, help="What is gone on with; repeat it.")
@click.option("--tokens", default=20, show_default=True, help="New tokens for each prompt.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep the edit: .safetensors, a control vector (.gguf) or lm-eval's file (.pt).",
)
def apply_command(
    model: str,
    device: str,
    vectors: Path,
    foreign: bool,
    layers: tuple[int, ...],
    strength: float,
    keep_norm: bool,
    prompts: tuple[str, ...],
    tokens: int,
    out: Path | None,
) -> None:
    """Generate with vectors added and without, and keep the edit."""
    use_free_cores()
    import stratoscope
    from stratoscope.engine.generate import generate
    from stratoscope.engine.metric import last_logits

    _files.refuse_no_folder(out)
    if not prompts and out is None:
        raise InputError("nothing to do: give --prompt, --out, or both.")
    if keep_norm and out is not None and out.suffix in (".gguf", ".pt", ".pth"):
        raise InputError(f"{out}: this file can say what is added, not that norms are kept.")
    lm = stratoscope.load(model, device=device)
    fitted = _read(lm, vectors, foreign)
    which = list(layers) or None
    edit = stratoscope.editing.steer.edit(
        lm, fitted, strength=strength, layers=which, keep_norm=keep_norm, foreign=foreign
    )
    for prompt in prompts:
        plain = generate(lm, prompt, tokens=tokens)
        with edit:
            try:
                last_logits(lm, prompt)
            except InputError as error:
                raise InputError(f"{edit.note}, that is too far: {error}") from error
            steered = generate(lm, prompt, tokens=tokens)
        for name, [ids] in (("as it is", plain), ("steered ", steered)):
            said = lm.tokenizer.decode(ids) if lm.tokenizer else ids.tolist()
            click.echo(f"{name}: {prompt}{said}")
    if out is not None:
        _keep(lm, edit, fitted, out, which, strength)
        click.echo(f"Saved to {out}: {edit.note}")


def _keep(
    lm: Any, edit: Any, fitted: Any, out: Path, layers: list[int] | None, strength: float
) -> None:
    import stratoscope

    files = stratoscope.editing.control_vectors
    if out.suffix == ".gguf":
        kind = lm.model.config.model_type
        files.write_gguf(fitted, out, layers=layers, strength=strength, model_type=kind)
    elif out.suffix in (".pt", ".pth"):
        files.write_lm_eval(lm, fitted, out, layers=layers, strength=strength)
    else:
        edit.save(out)


def _read(lm: Any, path: Path, foreign: bool) -> Any:
    """Vectors from whichever of the three they stand in."""
    import stratoscope

    files = stratoscope.editing.control_vectors
    if path.suffix == ".gguf":
        return files.read_gguf(path, lm, foreign=foreign)
    if path.suffix in (".pt", ".pth"):
        return files.read_lm_eval(lm, path)
    return stratoscope.editing.steer.read(lm, path, foreign=foreign)


def _show(result: xr.Dataset, said: xr.Dataset) -> None:
    """A line for each layer."""
    click.echo("layer: slope of the effect [95 %], over the steepest control; perplexity, times")
    far = int(abs(result.strength.values).argmax())
    for n, layer in enumerate(said.layer.values):
        line = (
            f"{layer:5}: {float(said.slope[n]):+.3f} "
            f"[{float(said.slope_low[n]):+.3f}, {float(said.slope_high[n]):+.3f}], "
            f"{float(said.selectivity[n]):.1f}x"
        )
        if "perplexity" in result:
            times = (result.perplexity[n, far] / result.base_perplexity).mean()
            line += f"; {float(times):.2f}x at strength {float(result.strength[far]):g}"
        click.echo(line)
