"""A circuit as a graph: networkx to think with, JSON for circuit-tracer's viewer, orders of edges,
and pruning.

A circuit is any labelled result with an `edge` axis, whose coordinates `sender` and `receiver` name
the ends; select from it what belongs: `found.isel(edge=abs(found.effect[0]) > 0.2)`. Pairs
[("L0H1", "L1H2.k"), ...] are taken as well.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stratoscope.engine.wiring import Wiring
from stratoscope.errors import InputError

Circuit = xr.Dataset | xr.DataArray | Sequence[tuple[str, str]]


def component(receiver: str) -> str:
    """The component that a receiver is an input of: "L3H2" of "L3H2.k"."""
    return receiver.partition(".")[0]


def pairs(circuit: Circuit) -> list[tuple[str, str]]:
    """(sender, receiver) of every edge that belongs to the circuit. Raises InputError when it has
    no `edge` axis."""
    if not isinstance(circuit, xr.Dataset | xr.DataArray):
        return [(str(sender), str(receiver)) for sender, receiver in circuit]
    if "edge" not in circuit.dims or not {"sender", "receiver"} <= set(circuit.coords):
        raise InputError(
            "a circuit has an `edge` axis with coordinates sender and receiver; got axes "
            f"{circuit.dims}."
        )
    return list(zip(circuit["sender"].values.tolist(), circuit["receiver"].values.tolist()))


def to_networkx(circuit: Circuit, variable: str = "effect") -> nx.MultiDiGraph:
    """Components as nodes, one edge for each input that is fed (key "q", "k", "v", or "").

    Edges carry `effect` (the mean over examples) when the circuit has that variable.
    """
    graph = nx.MultiDiGraph()
    for sender, receiver in pairs(circuit):
        graph.add_edge(sender, component(receiver), key=receiver.partition(".")[2])
    if isinstance(circuit, xr.Dataset | xr.DataArray):
        values = circuit if isinstance(circuit, xr.DataArray) else circuit.get(variable)
        for (sender, receiver), value in _effects(circuit, values).items():
            place = (sender, component(receiver), receiver.partition(".")[2])
            if graph.has_edge(*place):
                graph.edges[place]["effect"] = value
    return graph


def prune(circuit: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges that lie on a path from "embed" to "logits"; the others cannot carry anything of
    the prompt there."""
    edges = list(circuit)
    graph = nx.DiGraph([(sender, component(receiver)) for sender, receiver in edges])
    graph.add_nodes_from(("embed", "logits"))
    down = {"embed", *nx.descendants(graph, "embed")}
    up = {"logits", *nx.ancestors(graph, "logits")}
    return [
        (sender, receiver)
        for sender, receiver in edges
        if sender in down and component(receiver) in up
    ]


def growth(wires: Wiring, strength: Float[Tensor, "receiver sender"]) -> Int[Tensor, "edge ends=2"]:
    """Every edge (receiver, sender) in the order in which a circuit grows: greedily, backwards from
    the logits.

    Next is always the strongest edge into a component that has a way to the logits already.
    """
    value, order = strength.tolist(), []
    waiting: list[tuple[float, int, int]] = []
    reached, opened = {0}, [len(wires.receivers) - 1]  # the embedding has no inputs
    while waiting or opened:
        for receiver in opened:
            for sender in range(wires.before(receiver)):
                heapq.heappush(waiting, (-value[receiver][sender], receiver, sender))
        opened = []
        _, receiver, sender = heapq.heappop(waiting)
        order.append((receiver, sender))
        if sender not in reached:
            reached.add(sender)
            opened = wires.inputs(sender)
    return torch.tensor(order)


def ranking(
    wires: Wiring, strength: Float[Tensor, "receiver sender"]
) -> Int[Tensor, "edge ends=2"]:
    """Every edge (receiver, sender), strongest first, whatever it connects to."""
    edges = wires.mask.nonzero()
    return edges[strength[wires.mask].argsort(descending=True, stable=True)]


def first(
    wires: Wiring, order: Int[Tensor, "edge ends=2"], size: int
) -> Bool[Tensor, "receiver sender"]:
    """The circuit of the first `size` edges."""
    chosen = torch.zeros_like(wires.mask)
    chosen[order[:size, 0], order[:size, 1]] = True
    return chosen


def to_circuit_tracer(
    circuit: xr.Dataset, path: str | Path | None = None, *, slug: str = "circuit"
) -> dict[str, Any]:
    """The graph in circuit-tracer's JSON (metadata, qParams, nodes, links), also written to `path`
    if one is given.

    Its nodes stand at token positions; ours act at all of them and are put at the last. A link's
    weight is the sum of the effects through q, k and v, which `inputs` lists. Embedding and logits
    are one node each.
    """
    graph = to_networkx(circuit)
    words = circuit["text"].values[0].tolist() if "text" in circuit.coords else []
    words = [word for word in words if word]
    depth = int(circuit["receiver_layer"].max()) if "receiver_layer" in circuit.coords else 0
    ends = [
        str(circuit[name].values[0]) if name in circuit.coords else ""
        for name in ("answer", "foil")
    ]
    nodes = [_node(name, max(len(words) - 1, 0), depth, ends) for name in graph.nodes]
    number = {node["clerp_name"]: node["node_id"] for node in nodes}
    links: dict[tuple[str, str], dict[str, Any]] = {}
    for sender, receiver, side, held in graph.edges(keys=True, data=True):
        effect = float(held.get("effect", 1.0))
        link = links.setdefault(
            (sender, receiver),
            {"source": number[sender], "target": number[receiver], "weight": 0.0, "inputs": {}},
        )
        link["weight"] += effect
        link["inputs"][side or "input"] = effect
    made = {
        "metadata": {
            "slug": slug,
            "scan": json.loads(circuit.attrs.get("provenance", "{}")).get("model", "unknown"),
            "transcoder_list": [],
            "prompt_tokens": words,
            "prompt": "".join(words),
            "node_threshold": None,
            "schema_version": 1,
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [
            {key: value for key, value in node.items() if key != "clerp_name"} for node in nodes
        ],
        "links": list(links.values()),
    }
    if path is not None:
        Path(path).write_text(json.dumps(made, indent=1, allow_nan=False), "utf-8")
    return made


def _node(name: str, position: int, depth: int, ends: list[str]) -> dict[str, Any]:
    is_head = "H" in name
    layer = {"embed": "E", "logits": str(depth + 1)}.get(name) or name[1:].replace(
        "H", " "
    ).split()[0]
    kind = {"embed": "embedding", "logits": "logit"}.get(
        name, "attention head" if is_head else "mlp"
    )
    feature = (
        int(name.partition("H")[2]) if is_head else 0 if layer == "E" or name == "logits" else -1
    )
    text = f'Output "{ends[0]}" over "{ends[1]}"' if name == "logits" and any(ends) else name
    return {
        "node_id": f"{layer}_{feature}_{position}",
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": name == "logits",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{feature}-0",
        "clerp": text,
        "influence": None,
        "activation": None,
        "clerp_name": name,
    }


def _effects(
    circuit: xr.Dataset | xr.DataArray, values: xr.DataArray | None
) -> dict[tuple[str, str], float]:
    if values is None:
        return {}
    mean = values.mean([axis for axis in values.dims if axis != "edge"]).values.tolist()
    return dict(
        zip(zip(circuit["sender"].values.tolist(), circuit["receiver"].values.tolist()), mean)
    )
