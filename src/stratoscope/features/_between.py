"""A change of one site by what stands at another, while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor

from stratoscope.engine.dictionary import flat
from stratoscope.engine.places import MLPInput, Place, heard
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.run import Run
from stratoscope.models.sites import Site

# what is read and what is there, (example, position, width) each -> what takes its place
Change = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def between(lm: LM, site_in: Place, site_out: Site, change: Change) -> Iterator[None]:
    """Inside the block `change` is made at `site_out`. What stands at `site_in` is what the model
    itself goes on with there, other changes made. Raises InputError, in the run, where `site_out`
    comes before `site_in`."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> None:
        seen[:] = [x]

    def read(x: Tensor, run: Run) -> None:
        keep(flat(x))

    def edit(y: Tensor, run: Run) -> Tensor:
        if site_in == site_out:
            return change(flat(y), flat(y)).reshape(y.shape)
        if not seen:
            raise InputError(
                f"a dictionary reads `{site_in}` and writes `{site_out}`, which this model "
                "computes first: give one that writes later than it reads."
            )
        x, flat_y = seen.pop(), flat(y)
        return change(x.reshape(*flat_y.shape[:-1], -1), flat_y).reshape(y.shape)

    with ExitStack() as listening:
        reads = {}
        if isinstance(site_in, MLPInput):
            listening.enter_context(heard(lm, site_in, keep))
        elif site_in != site_out:
            reads = {site_in: [read]}
        listening.enter_context(lm.taps.using(edits={site_out: [edit]}, reads=reads))
        yield
