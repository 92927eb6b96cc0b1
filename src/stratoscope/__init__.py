"""See, measure and change what a transformer represents, on the Hugging Face model you already
have.

    import stratoscope as st

    lm = st.load("HuggingFaceTB/SmolLM2-135M")
    lens = st.layers.logit_lens.measure(lm, ["The Eiffel Tower is in the city of"])
    st.show(lens)  # in a notebook or a terminal; st.show(lens).save("lens.svg")
    st.results.save(lens, "lens.nc")

What most programs begin with stands here: `load`, `wrap`; `capture`, `intervene`, `ablate`,
`generate`; `explain`, `show`. The rooms (`models`, `results`, `layers`, `heads`, ...) are opened
when they are first named: importing this package loads neither torch nor xarray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stratoscope._lazy import lazy
from stratoscope._threads import wait_passively

wait_passively()

if TYPE_CHECKING:
    from stratoscope.engine.generate import generate as generate
    from stratoscope.engine.intervene import ablate as ablate
    from stratoscope.engine.intervene import intervene as intervene
    from stratoscope.engine.trace import capture as capture
    from stratoscope.models import load as load
    from stratoscope.models import wrap as wrap
    from stratoscope.report.explain import explain as explain
    from stratoscope.report.show import show as show

    __version__: str
else:  # a type checker that saw this `__getattr__` would accept every misspelled name
    _room, __dir__ = lazy(
        __name__,
        __path__,
        load="stratoscope.models",
        wrap="stratoscope.models",
        capture="stratoscope.engine.trace",
        intervene="stratoscope.engine.intervene",
        ablate="stratoscope.engine.intervene",
        generate="stratoscope.engine.generate",
        explain="stratoscope.report.explain",
        show="stratoscope.report.show",
    )

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("stratoscope")
        return _room(name)
