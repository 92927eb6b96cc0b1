"""A circuit as networkx, as circuit-tracer's JSON and as a picture: the same edges with the same
numbers."""

from __future__ import annotations

import json

import networkx as nx
import numpy as np
import pytest
import xarray as xr

from stratoscope.circuits import graph, path_patching
from stratoscope.errors import InputError, ResultError
from stratoscope.plots import graph as picture
from stratoscope.results import load, save
from support import circuits as subjects


@pytest.fixture(scope="module")
def found() -> xr.Dataset:
    one = subjects.everything()["indirect_object"]
    return path_patching.measure(
        subjects.lm_of("indirect_object"), one.clean, **subjects.options(one)
    )


@pytest.fixture(scope="module")
def circuit(found: xr.Dataset) -> xr.Dataset:
    return found.isel(edge=np.abs(found.effect.values[0]) > 0.2)


def test_networkx_has_the_edges_and_their_effects(circuit):
    made = graph.to_networkx(circuit)
    assert nx.shortest_path(made, "embed", "logits") == ["embed", "L0H2", "L1H0", "L2H3", "logits"]
    assert made.edges["L1H0", "L2H3", "q"]["effect"] == pytest.approx(
        float(circuit.effect.sel(edge="L1H0 -> L2H3.q")[0])
    )
    assert (
        graph.to_networkx([("embed", "L0H1.k"), ("embed", "L0H1.v")]).number_of_edges(
            "embed", "L0H1"
        )
        == 2
    )


def test_pruning_keeps_what_lies_on_a_way_from_the_embedding_to_the_logits():
    chain = [("embed", "L0H1.v"), ("L0H1", "logits")]
    loose = [("embed", "L0H2.k"), ("L0 mlp", "logits"), ("L0H3", "L1H1.q")]
    assert graph.prune(chain + loose) == chain
    assert graph.prune(loose) == []
    assert graph.prune([]) == []


def test_the_result_saves_and_loads(circuit, tmp_path):
    save(circuit, tmp_path / "circuit.nc")
    xr.testing.assert_identical(load(tmp_path / "circuit.nc"), circuit)


def test_circuit_tracer_reads_it(circuit, tmp_path):
    """The fields of circuit-tracer's own models (frontend/graph_models.py), and links that join
    nodes."""
    made = graph.to_circuit_tracer(circuit, tmp_path / "g.json", slug="ioi")
    assert json.loads((tmp_path / "g.json").read_text("utf-8")) == made
    assert set(made) == {"metadata", "qParams", "nodes", "links"}
    needed = {
        "node_id": str,
        "feature": int,
        "layer": str,
        "ctx_idx": int,
        "feature_type": str,
        "jsNodeId": str,
    }
    needed |= {"clerp": str, "is_target_logit": bool, "token_prob": float}
    for node in made["nodes"]:
        assert {key: type(node[key]) for key in needed} == needed
        assert 0 <= node["ctx_idx"] < len(made["metadata"]["prompt_tokens"])
    ids = {node["node_id"]: node for node in made["nodes"]}
    assert len(ids) == len(made["nodes"]) == 5
    assert {link["source"] for link in made["links"]} | {
        link["target"] for link in made["links"]
    } == set(ids)
    [last] = [node for node in made["nodes"] if node["is_target_logit"]]
    assert (last["layer"], last["feature_type"]) == ("5", "logit")
    assert "Ben" in last["clerp"]
    weights = {ids[link["source"]]["clerp"]: link["weight"] for link in made["links"]}
    assert weights["L2H3"] == pytest.approx(float(circuit.effect.sel(edge="L2H3 -> logits")[0]))
    types = {
        "slug": str,
        "scan": str,
        "transcoder_list": list,
        "prompt_tokens": list,
        "prompt": str,
    }
    assert {key: type(made["metadata"][key]) for key in types} == types


def test_what_is_no_circuit_is_refused():
    with pytest.raises(InputError, match="edge"):
        graph.pairs(xr.DataArray(np.zeros(3), dims="layer"))


def test_the_picture_has_one_line_for_each_edge_as_wide_as_its_effect(circuit):
    drawn = picture.graph(circuit.effect[0])
    lines = [trace for trace in drawn.data if trace.mode == "lines"]
    assert len(lines) == circuit.sizes["edge"] == 4
    widths = {trace.hovertext.partition("<br>")[0]: trace.line.width for trace in lines}
    effect = dict(zip(circuit.edge.values, np.abs(circuit.effect.values[0])))
    for name, value in effect.items():
        shown = name.replace("->", "→")
        assert widths[shown] == pytest.approx(9 * value / max(effect.values()))
    [boxes] = [trace for trace in drawn.data if trace.mode == "markers+text"]
    height = dict(zip(boxes.text, boxes.y))
    assert height["embed"] < height["L0H2"] < height["L1H0"] < height["L2H3"] < height["logits"]
    assert list(drawn.layout.yaxis.ticktext) == [
        "embedding",
        "layer 0",
        "layer 1",
        "layer 2",
        "read-out",
    ]


def test_the_picture_takes_the_strongest_and_says_so(found):
    drawn = picture.graph(found.effect[0], limit=7)
    lines = [trace for trace in drawn.data if trace.mode == "lines"]
    assert len(lines) == 7
    assert drawn.layout.annotations[0].text == "the 7 strongest of 479 edges"
    signs = {
        trace.line.color
        for trace in picture.graph(found.effect[0], limit=60).data
        if trace.mode == "lines"
    }
    assert len(signs) == 2  # towards and against


def test_the_picture_refuses_other_shapes_and_empty_circuits(circuit):
    with pytest.raises(ResultError, match="example"):
        picture.graph(circuit.effect)
    with pytest.raises(ResultError, match="nothing to draw"):
        picture.graph(circuit.effect[0].isel(edge=slice(0, 0)))


def test_markup_in_names_is_text():
    array = xr.DataArray(
        [1.0], dims="edge", coords={"sender": ("edge", ["<b>x"]), "receiver": ("edge", ["logits"])}
    )
    drawn = picture.graph(array)
    told = " ".join(str(trace.hovertext) + str(trace.text) for trace in drawn.data)
    assert "<b>x" not in told.replace("<b>&lt;b&gt;x</b>", "")
