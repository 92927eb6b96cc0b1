"""What the workbench shows at a moment, as one value: an address holds it, and so do ten lines of
Python.

    State(model="smollm2", prompt="The capital of France is", unit="L5H3").address
    # model=smollm2&prompt=The+capital+of+France+is&unit=L5H3
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import urlencode

from stratoscope.errors import InputError
from stratoscope.workbench.unit import Unit

LONGEST = 20_000  # characters of a prompt: an address has to hold it


@dataclass(frozen=True, slots=True)
class State:
    """A question to one model, and what is looked at.

    answer, foil, corrupt: empty where they are chosen by `explain`. quick: without what takes
    longest. unit: a name that `unit.parse` reads, or empty.
    """

    model: str
    prompt: str
    answer: str = ""
    foil: str = ""
    corrupt: str = ""
    seed: int = 0
    quick: bool = False
    unit: str = ""

    @classmethod
    def read(cls, query: Mapping[str, str], models: tuple[str, ...]) -> State:
        """The state of an address. Raises InputError for a model that is not open to it, an empty
        prompt, and a seed that is no number."""
        given = {f.name: query.get(f.name, "") for f in fields(cls)}
        model = given["model"] or models[0]
        if model not in models:
            raise InputError(
                f"model {model!r}: this workbench was started with {', '.join(models)}. Start it "
                "again with --model for another."
            )
        if not given["prompt"].strip():
            raise InputError("the prompt is empty: there is no token to explain.")
        if len(given["prompt"]) > LONGEST:
            raise InputError(f"the prompt has more than {LONGEST:,} characters.")
        if given["corrupt"] == given["prompt"]:
            raise InputError("the corrupt prompt is the prompt itself: exchange a word of it.")
        seed = given["seed"] or "0"
        if not seed.isascii() or not seed.isdigit() or len(seed) > 9:
            raise InputError(f"seed {seed!r:.40}: give a whole number, 0 or more.")
        typed: dict[str, Any] = {"model": model, "seed": int(seed), "quick": given["quick"] == "1"}
        return cls(**given | typed)

    @property
    def address(self) -> str:
        """What stands behind the question mark; what is as it always is is left out."""
        said = {k: v for k, v in asdict(self).items() if v}
        return urlencode(said | ({"quick": "1"} if self.quick else {}))

    @property
    def question(self) -> dict[str, Any]:
        """What `report.explain.explain` takes beside model and prompt."""
        words = {name: getattr(self, name) or None for name in ("answer", "foil", "corrupt")}
        return words | {"seed": self.seed}

    def python(self) -> str:
        """The lines that compute what is shown, with the same words."""
        given = {name: value for name, value in self.question.items() if value}
        more = "".join(f", {name}={value!r}" for name, value in given.items())
        lines = ["import stratoscope as st"]
        if self.quick:
            lines.append("from stratoscope.report.steps import FAST")
            more += ", skip=FAST"
        lines += ["", f"lm = st.load({self.model!r})", f"prompt = {self.prompt!r}"]
        lines += [
            f"explanation = st.explain(lm, prompt{more})",
            'st.report.page.write(explanation, "report.html")',
        ]
        if self.unit:
            lines += ["", *Unit.parse(self.unit).python()]
        return "\n".join(lines) + "\n"

    def notebook(self) -> str:
        """The same as a Jupyter notebook (format 4.5), a cell for each paragraph."""
        parts = self.python().strip().split("\n\n")
        cells = [
            {
                "cell_type": "code",
                "id": f"cell-{number}",
                "execution_count": None,
                "metadata": {},
                "outputs": [],
                "source": part,
            }
            for number, part in enumerate(parts)
        ]
        python = {"name": "python3", "display_name": "Python 3", "language": "python"}
        whole = {"cells": cells, "metadata": {"kernelspec": python}, "nbformat": 4}
        return json.dumps(whole | {"nbformat_minor": 5}, indent=1, ensure_ascii=False)
