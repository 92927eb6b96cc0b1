"""See, measure and change what a transformer represents, on the Hugging Face model you already
have.

    import stratoscope as st

    lm = st.load("HuggingFaceTB/SmolLM2-135M")
    lens = st.layers.logit_lens.measure(lm, ["The Eiffel Tower is in the city of"])
    print(lens["token"].isel(example=0, position=-1, rank=0))
    st.results.save(lens, "lens.nc")

The rooms (`models`, `results`, `layers`, `heads`, ...) are opened when they are first named:
importing this package loads neither torch nor xarray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stratoscope._lazy import lazy
from stratoscope._threads import wait_passively

wait_passively()

if TYPE_CHECKING:
    from stratoscope.models import load as load
    from stratoscope.models import wrap as wrap

    __version__: str
else:  # a type checker that saw this `__getattr__` would accept every misspelled name
    _room, __dir__ = lazy(__name__, __path__, load="stratoscope.models", wrap="stratoscope.models")

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("stratoscope")
        return _room(name)
