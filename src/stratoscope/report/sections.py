"""The sections of the report: each function picks its results, draws them and says in a sentence
what they show.

Sentences and what may be called a cause are in `words`; what never changes stands in `page.html`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stratoscope.plots import bars, choose, graph, heatmap, lines, tokens
from stratoscope.plots.text import number
from stratoscope.report import words
from stratoscope.report.explanation import Explanation
from stratoscope.report.layers import direct, patching, prediction
from stratoscope.report.section import Section, missing, spaced
from stratoscope.report.sheet import panel
from stratoscope.report.units import heads, neurons

CIRCUIT_EDGES = 40
ATTRIBUTIONS = ("shapley", "occlusion")


def section_of(e: Explanation, name: str) -> Section:
    keys, build = SECTIONS[name]
    section = build(e)
    section.missing = [missing(e, key) for key in keys if key not in e.results]
    return section


def _tokens(e: Explanation) -> Section:
    section = Section()
    results = {name: e.one(f"tokens.{name}") for name in ATTRIBUTIONS}
    given = {
        spaced(name): result["attribution"]
        for name, result in results.items()
        if result is not None
    }
    section.more["strips"] = [
        {
            "name": name,
            "strip": tokens.strip(value),
            "largest": heatmap.largest(value),
            "sum": float(value.sum()),
        }
        for name, value in given.items()
    ]
    section.more["error"] = None
    if (sampled := results["shapley"]) is not None:
        names = {"passes": "passes", "whole": "logit_difference", "absent": "absent_difference"}
        sizes = {key: float(sampled[name]) for key, name in names.items()}
        sizes["error"] = float(sampled["standard_error"].max())
        if np.isfinite(list(sizes.values())).all():
            section.more |= sizes
    if not given:
        return section
    drawn = bars.grouped(given, dim="position", unit="attribution (logits)")
    size = next(iter(given.values())).sizes["position"]
    section.panels["bars"] = panel(
        drawn, "The same numbers as bars, on one axis", width=28 * size + 80
    )
    tops = {
        name: choose.strongest(value, 1)[0]
        for name, value in given.items()
        if np.isfinite(value.values).any()
    }
    where = {name: words.token(given[name], top["position"]) for name, top in tops.items()}
    if len(tops) > 1 and len(set(where.values())) == 1:
        listed = ", ".join(f"{name} {number(top['value'])}" for name, top in tops.items())
        section.finding = f"Both methods single out {next(iter(where.values()))}: {listed}."
    elif tops:
        listed = ", ".join(
            f"{name} {where[name]} ({number(top['value'])})" for name, top in tops.items()
        )
        section.finding = f"The strongest token by each method: {listed}."
    return section


def _circuit(e: Explanation) -> Section:
    section, circuit = Section(), e.one("circuits.discover")
    if circuit is None or not np.isfinite(circuit["effect"].values).any():
        return section
    title = (
        f"The strongest {min(CIRCUIT_EDGES, circuit.sizes['edge'])} of its "
        f"{circuit.sizes['edge']:,} edges"
    )
    section.panels["graph"] = panel(graph.graph(circuit["effect"], limit=CIRCUIT_EDGES), title, 700)
    sizes = [f"{int(size):,}" for size in circuit["size"].values]
    for name in ("faithfulness", "completeness", "minimality"):
        curve = circuit[name].drop_vars("size").assign_coords(step=sizes)
        drawn = lines.line(curve, dim="step", unit=name)
        section.panels[name] = panel(drawn, f"{name.capitalize()} by number of edges", 330)
    faithful = circuit["faithfulness"].values
    at = next((i for i, value in enumerate(faithful) if abs(value - 1) <= 0.1), len(faithful) - 1)
    section.more["null"] = number(float(circuit["null_faithfulness"].isel(step=at).max()))
    section.finding = (
        f"{sizes[at]} of {int(circuit.attrs['of']):,} edges keep {number(float(faithful[at]))} of "
        "the logit difference; "
        f"random circuits of that size keep at most {section.more['null']}."
    )
    return section


TITLES = {
    "prediction": "Prediction",
    "direct": "Direct logit attribution",
    "patching": "Activation patching",
    "heads": "Top heads",
    "neurons": "Top neurons",
    "tokens": "Input tokens",
    "circuit": "Circuit",
}
SECTIONS: dict[str, tuple[tuple[str, ...], Callable[[Explanation], Section]]] = {
    "prediction": (("layers.logit_lens",), prediction),
    "direct": (("layers.direct_logit_attribution",), direct),
    "patching": (("layers.activation_patching", "heads.activation_patching"), patching),
    "heads": (("heads.roles", "heads.attention_pattern"), heads),
    "neurons": (("neurons.contribution", "neurons.vocabulary", "clamp"), neurons),
    "tokens": (tuple(f"tokens.{name}" for name in ATTRIBUTIONS), _tokens),
    "circuit": (("circuits.discover",), _circuit),
}
