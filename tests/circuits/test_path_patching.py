"""Path patching finds the planted edges and no other, and equals plain hooks for sets of senders
and receivers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.circuits import path_patching
from stratoscope.errors import InputError, SiteError
from support import byhand, tiny
from support import circuits as subjects

EXAMPLE = {
    "measure": lambda case: {"corrupt": case.corrupt, "answer": case.answer, "foil": case.foil}
}
WHOLE_ANSWER = {"paths": [("embed", "logits")]}

# Of the difference between the two runs, which is about twice `Planted`'s; one for all models. By
# its definition true edges are above 0.4, opposing ones below -0.125, and all others within 0.025.
THRESHOLD = 0.1


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", subjects.NAMES)
def test_the_true_edges_are_found_with_precision_and_recall_one(name, seed):
    one = subjects.everything(seed)[name]
    found = path_patching.measure(subjects.lm_of(name, seed), one.clean, **subjects.options(one))
    effect = dict(zip(subjects.pairs(found), found.effect.values[0].tolist()))
    assert {edge for edge, value in effect.items() if value > THRESHOLD} == one.edges
    assert {edge for edge, value in effect.items() if value < -THRESHOLD} == one.opposing_edges
    assert one.edges  # there is something to find


@pytest.mark.parametrize("name", ["induction", "indirect_object"])
def test_restoring_finds_what_breaking_finds_where_nothing_is_redundant(name):
    """The edge into the read-out carries everything back; random directions carry little."""
    one = subjects.everything()[name]
    found = path_patching.measure(
        subjects.lm_of(name), one.clean, direction="denoise", **subjects.options(one)
    )
    effect = dict(zip(subjects.pairs(found), found.effect.values[0]))
    [last] = [edge for edge in one.edges if edge[1] == "logits"]
    assert effect[last] == pytest.approx(1, abs=0.05)
    assert float(abs(found.null).max()) < 0.3


def test_several_senders_to_several_receivers_equal_plain_hooks():
    """Each receiver is first run alone on its own new input; what it then sends is put into one
    last run."""
    name, senders, receivers = (
        "llama",
        ["embed", "L0H1", "L1 mlp"],
        ["L1H2.q", "L1H2.k", "L0 mlp", "L2H0.v", "logits"],
    )
    model = byhand.widened(name)
    p, lm = byhand.parts(name, model), tiny.lm(name)
    clean, corrupt = (torch.tensor(rows[:1]) for rows in (subjects.CLEAN, subjects.CORRUPT))
    base, source = byhand.sent(p, model, clean), byhand.sent(p, model, corrupt)
    delta = {name: source[name] - base[name] for name in senders}
    before = {
        "L1H2": ["embed", "L0H1"],
        "L0 mlp": ["embed", "L0H1"],
        "L2H0": senders,
        "logits": senders,
    }
    change = {to: sum(delta[u] for u in heard) for to, heard in before.items()}
    kept: dict[str, torch.Tensor] = {}

    def alone(feeds, module, key, pre):
        """Run with these feeds alone, keeping what passes at `module`."""

        def keep(module, args, output=None):
            kept[key] = (args[0] if pre else output).clone()

        with (
            byhand.hooked(
                *(h for f in feeds for h in byhand.receiving(p, *f)), (module, keep, pre)
            ),
            torch.no_grad(),
        ):
            model(clean)

    out = [layer.get_submodule(p.out) for layer in p.layers]
    alone([("L1H2.q", change["L1H2"]), ("L1H2.k", change["L1H2"])], out[1], "L1H2", True)
    alone([("L2H0.v", change["L2H0"])], out[2], "L2H0", True)
    alone([("L0 mlp", change["L0 mlp"])], p.layers[0].mlp, "L0 mlp", False)

    def put(head):
        here = slice(int(head[3]) * p.head_dim, (int(head[3]) + 1) * p.head_dim)

        def hook(module, args):
            x = args[0].clone()
            x[..., here] = kept[head][..., here]
            return (x,)

        return hook

    last = [(out[1], put("L1H2"), True), (out[2], put("L2H0"), True)]
    last += [(p.layers[0].mlp, lambda module, args, output: kept["L0 mlp"], False)]
    with byhand.hooked(*last, *byhand.receiving(p, "logits", change["logits"])), torch.no_grad():
        logits = model(clean).logits[0, -1]
    with torch.no_grad():
        ends = [model(ids).logits[0, -1] for ids in (clean, corrupt)]
    expected, first, second = (float(x[5] - x[9]) for x in (logits, *ends))
    found = path_patching.measure(
        lm,
        subjects.CLEAN[:1],
        corrupt=subjects.CORRUPT[:1],
        paths=[(senders, receivers)],
        **subjects.ASKED,
    )
    assert float(found.effect[0, 0]) == pytest.approx(
        (expected - first) / (second - first), rel=1e-4
    )
    assert abs(expected - first) > 0.05


def test_progress_counts_every_cell_and_the_same_seed_gives_the_same_null():
    lm, paths, told = tiny.lm("gpt2"), [("embed", "L0H1.v"), ("L0 mlp", "logits")], []
    runs = [
        path_patching.measure(
            lm,
            subjects.CLEAN,
            corrupt=subjects.CORRUPT,
            paths=paths,
            seed=seed,
            progress=lambda *n: told.append(n),
            **subjects.ASKED,
        )
        for seed in (0, 0, 1)
    ]
    assert told[3] == (8, 8)  # two paths, two examples, effect and null
    assert runs[0].identical(runs[1])
    np.testing.assert_array_equal(runs[0].effect, runs[2].effect)
    assert not np.allclose(runs[0].null, runs[2].null)


def test_bad_questions_are_refused():
    lm = tiny.lm("llama")
    with pytest.raises(InputError, match="L7H0"):
        path_patching.measure(
            lm, [subjects.CLEAN[0]], corrupt=[subjects.CORRUPT[0]], paths=[("L7H0", "logits")]
        )
    with pytest.raises(SiteError, match="ALiBi"):
        path_patching.measure(tiny.lm("bloom"), [subjects.CLEAN[0]], corrupt=[subjects.CORRUPT[0]])
