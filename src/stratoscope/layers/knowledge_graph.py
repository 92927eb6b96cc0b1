"""Knowledge graph by depth: the facts that a claim's states say, as a graph for each depth.

Paper: latent-knowledge-graph

    graph[depth]        = the predicates of text[depth] (`layers.patched_predicates`), arguments as
                          nodes, joined by what is said of them
    entity_share[depth] = share of the claim's entities that some node names
    word_share[depth]   = share of predicates that hold no word but the claim's own
    jaccard[depth]      = common edges / all edges of this graph and the one before
    central[depth]      = the node with most neighbours, by degree centrality

example_share is the share of nodes that the prompt's worked examples name and the claim does not: a
small model copies them. null_other, null_random: entity_share where another claim's states, or
random vectors of equal length, stand in place of the claim's.
Reads as: what of the claim can be read out, and how it changes from layer to layer. Does not show
that the facts are right, nor that the model uses them; entities that are read with another claim's
states as well are no reading.
Cost: `layers.patched_predicates`, nothing beside.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import networkx as nx
import numpy as np
import xarray as xr

from stratoscope.errors import InputError
from stratoscope.layers import patched_predicates
from stratoscope.layers._predicates import graph, parse, plain
from stratoscope.models.lm import LM
from stratoscope.results import dataset


def graphs(texts: Iterable[str]) -> list[nx.MultiDiGraph]:
    """The graph of each text."""
    return [graph(parse(text)) for text in texts]


def measure(
    lm: LM,
    inputs: Any,
    *,
    entities: Sequence[Sequence[str]] | None = None,
    depths: Sequence[int] | None = None,
    words: Sequence[Sequence[str]] | None = None,
    into: str | Sequence[int] = patched_predicates.INTO,
    pool: str = "sum",
    new: int = 48,
    seed: int = 0,
) -> xr.Dataset:
    """text, central (example, depth), what is written and the most central node; predicates,
    entity_share, word_share, example_share, jaccard, centrality, null_other, null_random (example,
    depth); plain_predicates (example), of the claim in words.

    entities: of each claim, default its words with a capital letter, or all where it has none. The
    rest as in `layers.patched_predicates`, and raises as it does; InputError too for entities of
    another number of claims.
    """
    said = patched_predicates.measure(
        lm, inputs, depths=depths, words=words, into=into, pool=pool, new=new, seed=seed
    )
    claims = [str(text) for text in said.example_text.values]
    named = [_entities(claim) for claim in claims] if entities is None else list(entities)
    if len(named) != len(claims):
        raise InputError(f"entities of {len(named)} claims for {len(claims)}: a list for each.")
    shown = _shown(lm, into)
    axes, numbers = ("example", "depth"), {name: [] for name in (*_NUMBERS, "central")}
    for example, (claim, names) in enumerate(zip(claims, named)):
        own = graphs(said.text.values[example])
        rows = {
            "predicates": [float(len(parse(text))) for text in said.text.values[example]],
            "entity_share": [_mentioned(one, names) for one in own],
            "word_share": [_repeated(text, claim) for text in said.text.values[example]],
            "example_share": [_copied(one, shown, claim) for one in own],
            "jaccard": [float("nan"), *(_alike(one, two) for one, two in pairwise(own))],
            "null_other": _each(said.null_other_text.values[example], names),
            "null_random": _each(said.null_random_text.values[example], names),
        }
        first = [_central(one) for one in own]
        rows |= {
            "centrality": [value for _, value in first],
            "central": [node for node, _ in first],
        }
        for name, row in rows.items():
            numbers[name].append(row)
    counted = [float(len(parse(text))) for text in said.plain_text.values]
    return dataset(
        {name: (axes, rows) for name, rows in numbers.items()}
        | {"text": (axes, said.text.values), "plain_predicates": (("example",), counted)},
        method="layers.knowledge_graph",
        provenance=lm.provenance,
        settings={"new": new, "pool": pool, "into": into if isinstance(into, str) else list(into)},
        seed=seed,
        coords={"depth": said.depth.values.tolist(), "example_text": (("example",), claims)},
        null_kind="states of the next claim, and random vectors of equal length",
    )


_NUMBERS = (
    "predicates entity_share word_share example_share jaccard centrality null_other null_random"
).split()


def _entities(claim: str) -> list[str]:
    every = re.findall(r"\w+", claim)
    return [word for word in every if word[0].isupper()] or every


def _shown(lm: LM, into: str | Sequence[int]) -> set[str]:
    """What the worked examples name."""
    if not isinstance(into, str):
        ids = [token for token in into if token >= 0]
        into = "" if lm.tokenizer is None else str(lm.tokenizer.decode(ids))
    return {plain(word) for _, arguments, _ in parse(into) for word in arguments}


def _mentioned(made: nx.MultiDiGraph, names: Sequence[str]) -> float:
    if not names:
        return float("nan")
    return float(np.mean([any(plain(name) in node for node in made.nodes) for name in names]))


def _each(texts: Iterable[str], names: Sequence[str]) -> list[float]:
    return [_mentioned(one, names) for one in graphs(texts)]


def _repeated(text: str, claim: str) -> float:
    """NaN where there is no predicate."""
    own = {*re.findall(r"\w+", plain(claim))}
    held = [{*re.findall(r"\w+", plain(" ".join(one.arguments)))} <= own for one in parse(text)]
    return float(np.mean(held)) if held else float("nan")


def _copied(made: nx.MultiDiGraph, shown: set[str], claim: str) -> float:
    held = [node in shown and node not in plain(claim) for node in made.nodes]
    return float(np.mean(held)) if held else float("nan")


def _alike(one: nx.MultiDiGraph, two: nx.MultiDiGraph) -> float:
    edges = [{(a, b, key) for a, b, key in made.edges(keys=True)} for made in (one, two)]
    both = edges[0] | edges[1]
    return len(edges[0] & edges[1]) / len(both) if both else float("nan")


def _central(made: nx.MultiDiGraph) -> tuple[str, float]:
    if not made:
        return "", float("nan")
    value = nx.degree_centrality(nx.Graph(made))
    node = max(value, key=lambda name: (value[name], name))
    return node, float(value[node])
