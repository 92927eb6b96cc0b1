"""The edit of `tokens.kv_retrieval`: attention that reads retrieved keys, in a run and a file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from stratoscope.engine.edit import Edit
from stratoscope.errors import LoadError
from stratoscope.models.lm import LM
from stratoscope.models.run import Run
from stratoscope.models.sites import Site
from stratoscope.store import tensors as files
from stratoscope.tokens import _kv_blocks as kv
from stratoscope.tokens import _kv_windows as windows


class Retrieval(Edit):
    """An edit under which attention reads retrieved keys. Nests; undone on any exit."""

    def __init__(self, lm: LM, budget: int, **options: Any) -> None:
        super().__init__(lm, note=f"{budget} past keys read ({options})")
        self.budget, self.options = budget, options
        self.sizes = [options[name] for name in ("block", "local", "first")]
        self._sites = windows.sites(lm)
        self._seen: dict[Site, tuple[Tensor, Tensor]] = {}
        self._entropy: dict[int, Tensor] = {}  # of each layer, over the prompt's last window

    def __enter__(self) -> Retrieval:
        with ExitStack() as opening:
            super().__enter__()
            opening.callback(super().__exit__)
            edits, reads = {}, {}
            for number, (q, k, scores) in enumerate(self._sites):
                reads |= {q: [self._keep(q)], k: [self._keep(k)]}
                edits[scores] = [self._masked(number)]
            opening.enter_context(self.lm.taps.using(edits=edits, reads=reads))
            self._open.append(opening.pop_all())
        return self

    def save(self, path: str | Path) -> None:
        """One safetensors file. Raises LoadError when it cannot be written."""
        try:
            about = {"budget": self.budget, "options": self.options}
            files.write(path, {}, kind="kv-retrieval", about=about)
        except OSError as error:
            raise LoadError(
                f"The edit could not be written to {path}: {error}. Give another path."
            ) from error

    @classmethod
    def load(cls, lm: LM, path: str | Path) -> Retrieval:
        """Read what `save` wrote. Raises LoadError for another file."""
        _, about = files.read(path, kind="kv-retrieval")
        return cls(lm, about["budget"], **about["options"])

    def _keep(self, site: Site) -> Any:
        def keep(x: Tensor, run: Run) -> None:
            self._seen[site] = x

        return keep

    def _masked(self, number: int) -> Any:
        q_at, k_at, _ = self._sites[number]

        def masked(scores: Tensor, run: Run) -> Tensor:
            q, k = self._seen.pop(q_at), self._seen.pop(k_at)
            seen = self._readable(number, q, k, run)
            return scores.masked_fill(~seen[:, None], -torch.inf)

        return masked

    def _readable(
        self, number: int, q: Tensor, k: Tensor, run: Run
    ) -> Bool[Tensor, "example query key"]:
        """Which keys each query may read."""
        block, local, first = self.sizes
        place, key, real = windows.places(run, q, k)
        begin = place.div(local, rounding_mode="floor") * local if run.step == 0 else place[:, :1]
        seen = (key < first)[:, None] | (
            key[:, None] >= (begin - local).expand_as(place)[..., None]
        )
        room = torch.full((len(q),), self.budget - first - local, device=q.device)
        if run.step == 0:
            self._entropy[number] = torch.zeros(len(q), device=q.device)
        elif self.options["layered"]:
            shares = torch.stack([self._entropy[i] for i in range(len(self._sites))])
            room = kv.by_entropy(shares, len(self._sites) * int(self.budget - first - local))[
                number
            ]
        count = 1 if run.step else -(-q.shape[1] // local)
        for window in range(count):
            inside = real if run.step else real & (begin == window * local)
            edge = (begin[:, 0] if run.step else torch.full_like(room, window * local)) - local
            held = kv.blocks(k, key, edge, first=first, block=block, groups=windows.groups(q, k))
            score = kv.scores(q.flatten(2).float(), inside, held, self.options["probe"])
            seen |= kv.read(score, held, room)[:, None] & inside[..., None]
            if run.step == 0:  # of the last window there is
                flat = kv.entropy(score / q.flatten(2).shape[2] ** 0.5)
                last = inside.any(dim=1)
                self._entropy[number] = torch.where(last, flat, self._entropy[number])
        return seen
