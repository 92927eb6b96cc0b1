"""LEACE: concept-erasure's own numbers, the conditions that make it the least change, and a planted
word that a model no longer says while it says the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stratoscope.engine.generate import generate
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, LoadError
from stratoscope.features import leace
from stratoscope.features._erasure import Eraser, Erasure, probe
from stratoscope.lab import planted
from stratoscope.models import LM, wrap
from support.subjects import ROWS, close, lm_of, padded, untouched

SITE = "layers.1.resid_post"
EXAMPLE = {
    "fit": lambda case: {"inputs": case.rows * 2, "labels": [0, 1] * 2, "site": SITE},
    "edit": lambda case: {
        "request": leace.fit(
            case.lm, case.rows * 2, labels=[0, 1] * 2, site="layers.0.resid_post", tokens="every"
        )
    },
}
# concept_erasure 0.2.4, LeaceFitter(constrain_cov_trace=False, svd_tol=1e-9): the first two of
# sixty vectors (`published`), erased
PUBLISHED = {
    (True, False): [
        [0.5040564, 0.3558169, 0.6686484, 1.1502212],
        [-1.1310172, -1.0471322, 0.3660818, 0.6155301],
    ],
    (True, True): [
        [0.4969101, 0.3745708, 0.6390881, 1.1472834],
        [-1.1438041, -0.9825075, 0.2020007, 0.6542284],
    ],
    (False, False): [
        [0.4618508, 0.4553049, 0.5344073, 1.1169229],
        [-1.0939655, -1.0030896, 0.0137325, 0.8306403],
    ],
}


def drawn(n: int = 600, dim: int = 12, kinds: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated vectors whose mean hangs on their kind; kinds as columns of 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    number = torch.randint(0, kinds, (n,), generator=g)
    z = torch.nn.functional.one_hot(number, kinds).double()
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9)).double()
    far = torch.randn(kinds, dim, generator=torch.Generator().manual_seed(8)).double()
    return torch.randn(n, dim, generator=g).double() @ mix + 2 * z @ far, z


def erased(x: Tensor, z: Tensor, at: Tensor | None = None, **how: bool) -> Tensor:
    left, right = leace.closed_form(x, z, **how)
    at = x if at is None else at
    return at - (at - x.mean(dim=0)) @ right.T @ left.T


@pytest.mark.parametrize("how", list(PUBLISHED))
def test_it_gives_what_the_authors_package_gives(how: tuple[bool, bool]) -> None:
    i, z = torch.arange(1, 241, dtype=torch.double), torch.eye(3).double().repeat(20, 1)
    x = torch.sin(i * i).reshape(60, 4)
    x = (
        x
        + x[:, [1, 2, 3, 0]]
        + z @ torch.tensor([[1.0, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0]]).double()
    )
    found = erased(x, z, oblique=how[0], shrink=how[1])
    assert float((found[:2] - torch.tensor(PUBLISHED[how]).double()).abs().max()) < 1e-6


@pytest.mark.parametrize("how", list(PUBLISHED))
def test_nothing_linear_is_left_and_the_mean_stays(how: tuple[bool, bool]) -> None:
    x, z = drawn()
    after = erased(x, z, oblique=how[0], shrink=how[1])
    assert float(((after - after.mean(0)).T @ (z - z.mean(0))).abs().max()) < 1e-9 * len(x)
    close(after.mean(dim=0), x.mean(dim=0), 1e-9)
    # a probe fitted to convergence: the shares of the kinds, to the last row
    kinds = z.argmax(dim=1).numpy()
    said = probe(after.numpy(), kinds, 1e9).predict_proba(after.numpy())
    assert abs(said - z.mean(dim=0).numpy()).max() < 1e-2
    before = probe(x.numpy(), kinds, 1.0)
    assert before.score(x.numpy(), kinds) > 0.8
    fresh, labels = drawn(seed=1)
    asked = labels.argmax(dim=1).numpy()
    blind = erased(x, z, fresh, oblique=how[0], shrink=how[1]).numpy()
    right = probe(blind[:300], asked[:300], 1.0).score(blind[300:], asked[300:])
    share = np.bincount(asked[300:]).max() / 300
    assert right < share + 2 * (share * (1 - share) / 300) ** 0.5


def test_it_is_the_least_change_of_all() -> None:
    """The stationary condition of min E|x' - x|^2 under Cov[x', z] = 0 is that (1 - P) Cov[x] has
    its rows in the span of Cov[z, x]; and any other P that erases moves x more, in any norm."""
    x, z = drawn()
    about, labels = x - x.mean(0), z - z.mean(0)
    cross, covariance = about.T @ labels, about.T @ about
    left, right = leace.closed_form(x, z)
    rows = left @ right @ covariance
    span = torch.linalg.svd(cross, full_matrices=False).U[:, :2]
    close(rows, rows @ span @ span.T, 1e-7)
    least = (left @ right @ about.T).pow(2).sum()
    orthogonal = leace.closed_form(x, z, oblique=False)
    others = [orthogonal[0] @ orthogonal[1]]
    g = torch.Generator().manual_seed(5)
    for size in (0.01, 0.3, 3.0):  # (1 - P) + any D whose product with the cross covariance is 0
        d = size * torch.randn(12, 12, generator=g).double()
        others.append(left @ right + d @ (torch.eye(12) - span @ span.T))
    metric = torch.randn(12, 12, generator=g).double()
    for other in others:
        close(other @ cross, cross, 1e-7)  # it takes all of the concept as well
        assert (other @ about.T).pow(2).sum() > least
        assert (metric @ other @ about.T).pow(2).sum() > (metric @ left @ right @ about.T).pow(
            2
        ).sum()


def test_shrinking_by_hand() -> None:
    s = torch.diag(torch.tensor([3.0, 1.0]))  # |S|^2 = 10, tr^2 / 2 = 8
    close(leace.shrunk(s, 16), torch.diag(torch.tensor([2.5, 1.5])))  # a = 1 - 16 / 16 / 2
    close(leace.shrunk(s, 1), 2 * torch.eye(2))


def named(p: planted.Planted, words: set[str], n: int) -> tuple[list[str], list[str]]:
    """Prompts that hold one of these words, and which."""
    kept = [v for v in p.variants(40 * n, seed=1) if v.answer in words][:n]
    return [v.clean for v in kept], [v.answer for v in kept]


def test_a_planted_word_is_erased_and_the_others_stay(tmp_path: Path) -> None:
    """After "who" the model says the name of the prompt. Ada or Ben: no longer told apart; the
    other names are said as before."""
    p = planted.copy_head()
    lm = wrap(p.model, p.tokenizer)
    texts, names = named(p, {"Ada", "Ben"}, 60)
    eraser = leace.fit(lm, texts[:40], labels=names[:40], site=SITE)
    assert eraser.rank == 1
    eraser.save(tmp_path / "eraser")
    ada, ben = (p.tokenizer.convert_tokens_to_ids(w) for w in ("Ada", "Ben"))

    def gap() -> float:
        """Ada's lead over Ben on held-out prompts of Ada, less that on those of Ben."""
        said = last(lm, texts[40:])
        lead = said[:, ada] - said[:, ben]
        own = torch.tensor([name == "Ada" for name in names[40:]])
        return float(lead[own].mean() - lead[~own].mean())

    others, answers = named(p, {"Cleo", "Dan", "Eve"}, 30)
    ids = torch.tensor(p.tokenizer.convert_tokens_to_ids(answers))
    plain = gap()
    with untouched(lm), leace.edit(lm, tmp_path / "eraser", positions=-1):
        assert abs(gap()) < 0.05 * plain
        assert bool((last(lm, others).argmax(dim=1) == ids).all())
    assert plain > 10
    for held in ([], [p.clean]):
        with pytest.raises(InputError):
            leace.fit(lm, held, labels=["a"] * len(held), site=SITE)


@torch.no_grad()
def last(lm: LM, texts: list[str]) -> Tensor:
    batch = lm.batch(texts)
    logits = lm(batch).logits
    return logits[torch.arange(len(batch)), batch.lengths - 1]


def made(lm: LM, site: str, rank: int = 2) -> Eraser:
    g = torch.Generator().manual_seed(3)
    size = lm.dims.heads * lm.dims.head_dim if site.endswith("z") else lm.dims.dim
    left, right, mean = (
        torch.randn(*s, generator=g) for s in ((size, rank), (rank, size), (size,))
    )
    about = {"settings": {}, "seed": None, "provenance": lm.provenance}
    return Eraser(site=site, mean=mean, left=left, right=right, **about)


@pytest.mark.parametrize("site", [SITE, "layers.1.attn.z"])
@pytest.mark.parametrize("at", [None, -1, [0, 2]])
def test_the_edit_is_the_map_at_the_site(site: str, at: int | list[int] | None) -> None:
    """By what is captured behind it; padding on either side, saved and loaded, steps of
    generation."""
    lm = lm_of("llama")
    one = made(lm, site)
    before = capture(lm, ROWS, site)[site]
    with untouched(lm), leace.edit(lm, one, positions=at):
        after = capture(lm, ROWS, site)[site]
        left = capture(lm, padded(ROWS, "left"), site)[site]
        assert "a concept erased: 2 directions" in str(lm.provenance["changes"])
    for n, row in enumerate(ROWS):
        x = before[n, : len(row)].flatten(1)
        expected = one(x)
        kept = [] if at is None else [i for i in range(len(row)) if i not in here(at, len(row))]
        expected[kept] = x[kept]
        close(after[n, : len(row)].flatten(1), expected, 1e-4)
        close(left[n, : len(row)].flatten(1), expected, 1e-4)


def here(at: int | list[int], length: int) -> list[int]:
    return [length - 1] if at == -1 else list(at)


def test_it_is_kept_and_holds_while_generating(tmp_path: Path) -> None:
    lm = lm_of("gpt2")
    both = [made(lm, SITE), made(lm, "layers.0.attn.z", rank=1)]
    edit = leace.edit(lm, both)
    edit.save(tmp_path / "edit")
    with edit:
        inside, words = last(lm, [*ROWS]), generate(lm, ROWS, tokens=3)
        # a token at a time, without a cache
        rows = [list(row) for row in ROWS]
        for _ in range(3):
            rows = [[*r, int(t)] for r, t in zip(rows, last(lm, rows).argmax(dim=1))]
        assert [word.tolist()[-3:] for word in words] == [row[-3:] for row in rows]
    with Erasure.load(lm, tmp_path / "edit"):
        assert torch.equal(last(lm, [*ROWS]), inside)
    with pytest.raises(LoadError):
        Eraser.load(tmp_path)
    narrow = Eraser(
        **{
            **vars(both[0]), "mean": torch.zeros(7), "left": torch.zeros(7, 1),
            "right": torch.zeros(1, 7),
        }
    )  # fmt: skip
    with pytest.raises(InputError, match=r"7 numbers .* has 32"):
        leace.edit(lm, narrow)
    with pytest.raises(InputError, match="at least one eraser"):
        leace.edit(lm, [])


def test_every_token_may_have_its_own_label() -> None:
    lm = lm_of("llama")
    labels = [[i % 2 for i in range(len(row))] for row in ROWS]
    eraser = leace.fit(lm, ROWS, labels=labels, site=SITE, tokens="every", shrink=False)
    seen = capture(lm, ROWS, SITE)[SITE]
    x = torch.cat([x[: len(row)] for x, row in zip(seen, ROWS)]).double()
    z = torch.nn.functional.one_hot(torch.tensor([i for row in labels for i in row])).double()
    close(eraser(x), erased(x, z), 1e-4)
    left = leace.fit(
        lm, padded(ROWS, "left"), labels=labels, site=SITE, tokens="every", shrink=False
    )
    close(left(x), eraser(x), 1e-4)
    for wrong, said in (
        ({"labels": [[0, 1], [1, 0]]}, "2 labels for a text of 8"),
        ({"labels": [0]}, "one for each"),
        ({"labels": [0, 0]}, "two kinds or more"),
        ({"labels": [0, 1], "tokens": "read"}, "at least two vectors"),
    ):
        with pytest.raises(InputError, match=said):
            leace.fit(lm, ROWS, **{"site": SITE, "tokens": "every", **wrong})
    with pytest.raises(InputError, match="nothing at this site goes with the labels"):
        leace.closed_form(torch.ones(4, 3), torch.eye(2).repeat(2, 1))
