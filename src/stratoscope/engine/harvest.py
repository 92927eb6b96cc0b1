"""Harvest: what stands at some sites, token by token, over many texts, kept for training on.

    kept = harvest(lm, texts, ["layers.8.mlp.out"], tokens=200_000, folder="acts")
    kept["layers.8.mlp.out"]        # (token, dim), in a random order of windows
    kept.ids, kept.window, kept.position

Texts are cut into windows of `context` tokens, and the windows are shuffled. The token that the
tokenizer begins every text with (BOS) stands before each window, is run, and is left out: its
vector is as no other's. Padding is never kept. A window is a function of texts, context and seed
alone, so that a harvest killed at any moment goes on in its folder where it stopped, and is the
unbroken one to the bit. The forward pass ends at the last of the sites.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.dictionary import width_at
from stratoscope.engine.memory import available, refuse_above
from stratoscope.engine.pieces import before
from stratoscope.engine.places import Place, places, seen
from stratoscope.engine.progress import Progress, shown
from stratoscope.errors import InputError, MemoryRefusal, ResultError
from stratoscope.models import source
from stratoscope.models.inputs import rows_of
from stratoscope.models.lm import LM
from stratoscope.store import tensors as files

ROWS = 16  # windows that run at the same time
SHARD = 16  # such runs in one file


@dataclass(frozen=True, eq=False)
class Harvest:
    """Vectors by site, and of each token its id, its window, and its place in it (BOS is -1).

    shards: the files, or the tensors themselves where no folder was given. tokens: how many
    vectors there are; left_out: how many BOS were run and not kept.
    """

    sites: tuple[str, ...]
    tokens: int
    left_out: int
    shards: Sequence[Path | Mapping[str, Tensor]]

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        """One shard after another: vectors by site, and `ids`, `window`, `position`."""
        for shard in self.shards:
            yield files.read(shard, kind="harvest")[0] if isinstance(shard, Path) else shard

    def __getitem__(self, site: str) -> Float[Tensor, "token dim"]:
        """All vectors of a site, on the CPU. Raises InputError for a site that was not harvested,
        MemoryRefusal when they would not fit."""
        if site not in self.sites:
            raise InputError(f"`{site}` was not harvested; there are {', '.join(self.sites)}.")
        if self.shards and isinstance(self.shards[0], Path):
            needed = sum(shard.stat().st_size for shard in self.shards if isinstance(shard, Path))
            what = f"reading {self.tokens:,} vectors at `{site}`"
            refuse_above(needed, available(torch.device("cpu")), what, "go through it by shards")
        return torch.cat([shard[site] for shard in self])

    @property
    def ids(self) -> Int[Tensor, " token"]:
        return torch.cat([shard["ids"] for shard in self])

    @property
    def window(self) -> Int[Tensor, " token"]:
        return torch.cat([shard["window"] for shard in self])

    @property
    def position(self) -> Int[Tensor, " token"]:
        return torch.cat([shard["position"] for shard in self])


def harvest(
    lm: LM,
    texts: Any,
    sites: Sequence[str],
    *,
    tokens: int,
    context: int = 64,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Harvest:
    """`tokens` vectors at each site, from windows of `context` tokens (BOS included).

    texts: a list of texts, or of token ids. seed: of the order of windows. folder: where shards
    are kept; a harvest that stands there in part is gone on with. Raises InputError for texts with
    fewer tokens, or a context that the model does not have; SiteError for a site it lacks;
    MemoryRefusal where they would not fit in memory, or on the disk of the folder; ResultError for
    a folder with another harvest.
    """
    source.refuse(lm, "windows of one text are run here")
    at = places(lm, sites)
    widths = {site: width_at(lm, site) for site in at}
    bos = begins(lm)
    windows = _windows(lm, texts, bos, tokens, context, seed)
    total = tokens * sum(widths.values()) * torch.finfo(lm.model.dtype).bits // 8
    place = None if folder is None else Path(folder)
    _refuse_too_large(total, place)
    key = _fingerprint(lm, at, windows) if place is not None else ""
    runs = [windows[i : i + ROWS] for i in range(0, len(windows), ROWS)]
    shards: list[Path | Mapping[str, Tensor]] = []
    number, done = 0, 0
    with shown("harvesting", progress) as say:
        for start in range(0, len(runs), SHARD):
            path = None if place is None else place / f"harvest-{start // SHARD:05d}.safetensors"
            if path is None or not _there(path, key):
                made = [_run(lm, run, at, bos, number + i * ROWS)
                        for i, run in enumerate(runs[start : start + SHARD])]  # fmt: skip
                joined = {name: torch.cat([one[name] for one in made]) for name in made[0]}
                shards.append(joined if path is None else _written(path, joined, key))
            else:
                shards.append(path)
            some = runs[start : start + SHARD]
            number += sum(map(len, some))
            done += sum(len(row) for run in some for row in run)
            say(done, tokens, f"{done:,} of {tokens:,} tokens")
    return Harvest(tuple(map(str, at)), tokens, len(windows) * len(bos), shards)


def begins(lm: LM) -> list[int]:
    """What stands before every window: what the tokenizer begins with; without one the config's."""
    if lm.tokenizer is not None:
        return before(lm)
    own = getattr(lm.layout.config(), "bos_token_id", None)
    return [own] if isinstance(own, int) else []


def _windows(
    lm: LM, texts: Any, bos: list[int], tokens: int, context: int, seed: int
) -> list[list[int]]:
    """Ids of each window without BOS, in the order of the run; together `tokens` of them."""
    room = context - len(bos)
    limit = lm.context
    if room < 1 or (limit is not None and context > limit):
        raise InputError(
            f"context={context}: a window has at least one token beside BOS, and this model takes "
            f"{limit or 'any number of'} tokens at most."
        )
    if tokens < 1:
        raise InputError(f"tokens={tokens}: harvest 1 or more.")
    rows = [row[len(bos) :] if bos and row[: len(bos)] == bos else row
            for row in rows_of(texts, lm.tokenizer)]  # fmt: skip
    there = sum(map(len, rows))
    if there < tokens:
        raise InputError(
            f"{tokens:,} tokens were asked for, and these texts have {there:,} (BOS not counted): "
            "give more text, or ask for fewer."
        )
    cut = [row[i : i + room] for row in rows for i in range(0, len(row), room)]
    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, left = [], tokens
    for number in order:
        chosen.append(cut[number][:left])
        left -= len(chosen[-1])
        if not left:
            break
    return chosen


@torch.no_grad()
def _run(
    lm: LM, rows: list[list[int]], sites: list[Place], bos: list[int], first: int
) -> dict[str, Tensor]:
    """One forward pass: the vectors of all real tokens but BOS, row after row."""
    found = seen(lm, [[*bos, *row] for row in rows], *sites)
    lengths = torch.tensor([len(row) for row in rows])
    position = torch.arange(int(lengths.max()))
    real = position < lengths[:, None]
    columns = {
        "ids": torch.tensor([token for row in rows for token in row]),
        "window": torch.arange(first, first + len(rows)).repeat_interleave(lengths),
        "position": position.expand(len(rows), -1)[real],
    }
    values = {str(site): found[site][:, len(bos) :].cpu()[real] for site in sites}
    return values | columns


def _refuse_too_large(total: int, folder: Path | None) -> None:
    if folder is None:
        narrow = "ask for fewer tokens or sites, or give `folder=`, where they are kept in shards"
        refuse_above(total, available(torch.device("cpu")), "this harvest", narrow)
        return
    folder.mkdir(parents=True, exist_ok=True)
    kept = sum(path.stat().st_size for path in folder.glob("harvest-*.safetensors"))
    free = shutil.disk_usage(folder).free
    if total - kept > 0.9 * free:
        raise MemoryRefusal(
            f"this harvest would take {total / 2**30:.1f} GiB in {folder}, and "
            f"{(free + kept) / 2**30:.1f} GiB are free there: ask for fewer tokens or sites, or "
            "give another folder."
        )


def _fingerprint(lm: LM, sites: list[Place], windows: list[list[int]]) -> str:
    """Of the weights, whatever changes them now, the sites and every window."""
    about = lm.provenance
    told = [about["weights"], about["dtype"], about.get("changes"), [*map(str, sites)], windows]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def _there(path: Path, key: str) -> bool:
    """Whether a shard is kept. Raises ResultError where the file is of another harvest."""
    if not path.is_file():
        return False
    _, about = files.read(path, kind="harvest")
    if about != key:
        raise ResultError(
            f"{path} is of another harvest (other weights, sites, texts, tokens, context or seed): "
            "give another folder, or delete this one."
        )
    return True


def _written(path: Path, tensors: Mapping[str, Tensor], key: str) -> Path:
    try:
        files.write(path, tensors, kind="harvest", about=key)
    except OSError as error:
        raise ResultError(
            f"{path} cannot be written ({error}): free some space, and start again; what is there "
            "is gone on with."
        ) from error
    return path
