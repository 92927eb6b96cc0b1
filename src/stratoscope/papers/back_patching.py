"""Hopping Too Late: Exploring the Limitations of Large Language Models on Multi-Hop Queries.

Biran, Gottesman, Yang, Geva and Globerson, 2024. arXiv:2406.12775.
Claim: the bridge entity is resolved in early layers and the second hop in later ones, so that a
    state put back from a later layer into an earlier one answers many queries that failed.
Methods: layers.back_patching, layers.logit_lens
Protocol: the authors' two-hop queries and first hops (their data set), on the models of the paper
    by `load`; entities by Patchscopes and by the lens; every pair of layers, both places; 100
    failed queries a model at least, and the answer generated, not one token.

The paper decodes entities with Patchscopes, which has the model itself say what a vector stands
for; the first claims here read them with the logit lens, which shows less in early layers, and one
more does as the paper, with a shorter prompt. The paper lets the model generate; here the answer is
one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.engine.intervene import replaced
from stratoscope.engine.metric import last_logits
from stratoscope.engine.sweep import sweep
from stratoscope.engine.trace import capture
from stratoscope.lab import make
from stratoscope.lab.miniatures import tiny_twohop
from stratoscope.lab.planted.canvas import ANSWER, CARRIED, WORD, Canvas
from stratoscope.lab.planted.hops import CAPITALS, FIRST, HOMES, SECOND
from stratoscope.lab.tasks import capitals
from stratoscope.lab.tasks._task import next_token
from stratoscope.layers import back_patching, logit_lens
from stratoscope.models import LM

WHERE = {  # the country where ...
    "Australia": ("Sydney lies", "Perth lies", "kangaroos live", "the Great Barrier Reef lies"),
    "Austria": ("Salzburg lies", "Mozart was born", "Graz lies"),
    "Belgium": ("Antwerp lies", "Bruges lies", "Ghent lies"),
    "Canada": ("Toronto lies", "Vancouver lies", "Montreal lies", "Niagara Falls lies"),
    "China": (
        "Shanghai lies",
        "the Great Wall stands",
        "Confucius was born",
        "pandas live",
        "Huawei comes from",
    ),
    "Cuba": ("Fidel Castro ruled", "the best cigars come from"),
    "Denmark": ("Lego comes from", "Aarhus lies", "Hans Christian Andersen was born"),
    "Egypt": (
        "the Great Pyramid stands",
        "Alexandria lies",
        "the pharaohs ruled",
        "the Sphinx stands",
    ),
    "England": ("Manchester lies", "Shakespeare was born", "Big Ben stands", "Liverpool lies"),
    "Finland": ("Nokia comes from", "Tampere lies"),
    "France": (
        "the Eiffel Tower stands",
        "Lyon lies",
        "Napoleon ruled",
        "Marseille lies",
        "champagne comes from",
    ),
    "Germany": (
        "Munich lies",
        "Hamburg lies",
        "BMW comes from",
        "Beethoven was born",
        "Volkswagen comes from",
    ),
    "Greece": ("the Parthenon stands", "Socrates was born", "Crete lies", "Sparta lies"),
    "Hungary": ("Debrecen lies", "goulash comes from"),
    "India": (
        "the Taj Mahal stands",
        "Mumbai lies",
        "Gandhi was born",
        "Kolkata lies",
        "yoga comes from",
    ),
    "Iran": ("Isfahan lies", "Shiraz lies", "Persian is spoken"),
    "Iraq": ("Mosul lies", "Saddam Hussein ruled", "Basra lies"),
    "Ireland": ("Guinness comes from", "Cork lies", "Galway lies", "James Joyce was born"),
    "Italy": (
        "Venice lies",
        "pizza comes from",
        "Ferrari comes from",
        "Milan lies",
        "Leonardo da Vinci was born",
    ),
    "Japan": (
        "Osaka lies",
        "sushi comes from",
        "Toyota comes from",
        "Mount Fuji stands",
        "samurai fought",
    ),
    "Kenya": ("Mombasa lies", "the Maasai live"),
    "Norway": ("Bergen lies", "Edvard Munch was born", "the longest fjords lie"),
    "Peru": ("Machu Picchu lies", "Cusco lies", "the Incas ruled"),
    "Poland": ("Krakow lies", "Chopin was born", "Gdansk lies"),
    "Portugal": ("Porto lies", "Cristiano Ronaldo was born", "fado comes from"),
    "Russia": ("Siberia lies", "Tolstoy was born", "Putin rules", "vodka comes from"),
    "Scotland": ("Glasgow lies", "Loch Ness lies", "bagpipes are played"),
    "Spain": ("Barcelona lies", "flamenco comes from", "Seville lies", "paella comes from"),
    "Sweden": ("IKEA comes from", "Gothenburg lies", "Volvo comes from", "Spotify comes from"),
    "Syria": ("Aleppo lies", "Assad ruled"),
    "Turkey": ("Istanbul lies", "the Hagia Sophia stands", "Izmir lies"),
}
SCOPE, ASKS = "cat -> cat; 1135 -> 1135; hello -> hello; ?", " ->"  # "?" is replaced by the state
ENDS = (-2, -1)  # the last token of the first hop's description, and the last of the prompt, "is"
NOUNS = (-3, -1)  # the same in the miniature: Mira 's [teacher] 's [friend]
MOST = 60  # failed questions that are searched


class Hops(NamedTuple):
    """A two-hop prompt, its bridge and answer as ids, and whether the model knows each hop
    alone."""

    prompt: str
    bridge: int
    answer: int
    known: bool


def late_hop(seed: int = 0) -> tuple[LM, list[str], list[str]]:
    """A planted Llama that learns a person's country in layer 1, while what knows capitals sits in
    layer 0."""
    people, cities = list(HOMES), list(CAPITALS.values())
    canvas = Canvas(
        "llama", [*people, *CAPITALS, *cities, "unknown", "capital", "of"], seed, loudness=0.5
    )
    canvas.default("unknown")
    for person, country in HOMES.items():
        canvas.neuron(
            1, FIRST[person], WORD[canvas.ids[person]], {CARRIED[canvas.ids[country]]: 1.0}
        )
    for country, capital in CAPITALS.items():
        canvas.neuron(
            0, SECOND[country], CARRIED[canvas.ids[country]], {ANSWER[canvas.ids[capital]]: 2.0}
        )
    prompts = [f"capital of {person}" for person in people]
    return (
        models.wrap(canvas.model, canvas.tokenizer()),
        prompts,
        [CAPITALS[HOMES[person]] for person in people],
    )


@claim(
    says="A later state put back into an earlier layer finishes the work that the "
    "later layers cannot do",
    where="abstract",
    tier="identity",
    subject="a planted Llama whose second hop sits before its first",
    expect="before == 0 and fixed == 1 and elsewhere == 0 and stranger == 0",
    null={"stranger": "the state of another prompt with another answer"},
)
def a_planted_late_hop_is_repaired(seed: int) -> Measured:
    """Every prompt fails; put back from depth 2 into layer 0, and by no other pair, every answer is
    right."""
    lm, prompts, answers = late_hop()
    found = back_patching.measure(lm, prompts, answer=answers, seed=seed)
    here = (found.depth == 2) & (found.layer == 0)
    return Measured(
        values={
            "before": (found.unpatched > 0).mean(),
            "fixed": (found.margin.sel(depth=2, layer=0) > 0).mean(),
            "elsewhere": (found.margin.where(~here) > 0).sum(),
        },
        null={"stranger": (found.null > 0).sum()},
        n=len(prompts),
    )


@claim(
    says="The bridge entity is resolved in earlier layers than the answer",
    where="abstract",
    read="abstract",
    tier="small",
    subject="tiny-twohop 2",
    kind="miniature",
    n="20 questions",
    valid="answer_share >= 0.5",
    expect="bridge_depth < answer_depth and bridge_share > 2 * stranger_share",
    direction="bridge_depth < answer_depth",
    null={"stranger_share": "the bridge of another question, decoded in the same way"},
    thresholds="0.5: ours, a reader that does not see the answer which the model gives shows"
    " nothing of the bridge either; 2: the ledger's",
)
def the_bridge_comes_first_in_a_miniature(seed: int) -> Measured:
    """Questions the miniature answers right. The depth at which the logit lens first has the entity
    on top: the bridge at the end of the first hop or after it, the answer at the last token. Mean
    over questions in which both are seen."""
    lm, hops, right = _miniature(seed)
    return _decoding(
        lm,
        [hop for hop, good in zip(hops, right) if good and hop.known][:200],
        NOUNS,
        top=1,
        seed=seed,
    )


@claim(
    says="In many failed cases a back-patch exists that gives the answer",
    where="abstract (first version: up to 57 %; 66 % at EMNLP)",
    read="abstract",
    tier="small",
    subject="tiny-twohop 2",
    kind="miniature",
    n="20 failed questions",
    expect="fixed >= 0.2 and stranger <= 0.5 * fixed",
    direction="fixed > stranger",
    null={"stranger": "the same search with the state of another question"},
    thresholds="0.2 and half: the ledger's; fewer than one in five would not be `many`",
    found_there={"fixed": 0.57},
)
def back_patching_helps_a_miniature(seed: int) -> Measured:
    """Questions the miniature fails though it knows both facts alone; all pairs of layers, at both
    places.

    On version 1 of the miniature this failed (fixed 0.17, stranger 0.2): its word order, "friend of
    teacher of Mira", left the account no way to be right. There, a bridge put back at "Mira" asks
    for the friend of the bridge's teacher.
    """
    lm, hops, right = _miniature(seed)
    failed = [hop for hop, good in zip(hops, right) if not good and hop.known]
    return _repair(lm, failed, NOUNS, every=1, seed=seed, asked=len(hops))


@claim(
    says="The bridge entity is resolved in earlier layers than the answer",
    where="abstract",
    read="abstract",
    tier="small",
    subject="smollm2",
    kind="real",
    n="20 questions",
    valid="answer_share >= 0.5",
    expect="bridge_depth < answer_depth and bridge_share > 2 * stranger_share",
    direction="bridge_depth < answer_depth",
    null={"stranger_share": "the bridge of another question, decoded in the same way"},
    thresholds="0.5: ours, a reader that does not see the answer which the model gives shows"
    " nothing of the bridge either; 2: the ledger's",
)
def the_bridge_comes_first_in_smollm2(seed: int) -> Measured:
    """As in the miniature, on capitals of described countries whose two hops the model knows; among
    the top 10."""
    lm = models.load("smollm2")
    hops, _ = _described(lm)
    return _decoding(lm, [hop for hop in hops if hop.known][:30], ENDS, top=10, seed=seed)


@claim(
    says="The bridge entity is resolved in earlier layers than the answer",
    where="abstract",
    read="abstract",
    tier="small",
    subject="smollm2",
    kind="real",
    n="20 questions",
    valid="answer_share >= 0.5",
    expect="bridge_depth < answer_depth and bridge_share > 2 * stranger_share",
    direction="bridge_depth < answer_depth",
    null={"stranger_share": "the bridge of another question, decoded in the same way"},
    thresholds="0.5: ours, a reader that does not see the answer which the model gives shows"
    " nothing of the bridge either; 2: the ledger's",
)
def the_bridge_comes_first_through_a_patchscope(seed: int) -> Measured:
    """The same, read with a Patchscope: the state takes the place of "?" in a prompt that repeats
    words, at the layer it came from, and the model says the word. Added when a trial had shown that
    the logit lens sees both entities in the last layer only. On three prompts that name a country
    the same Patchscope does read it, up to the middle layers."""
    lm = models.load("smollm2")
    hops, _ = _described(lm)
    return _decoding(
        lm, [hop for hop in hops if hop.known][:30], ENDS, top=10, seed=seed, decode=_scope
    )


@claim(
    says="In many failed cases a back-patch exists that gives the answer",
    where="abstract (first version: up to 57 %; 66 % at EMNLP)",
    read="abstract",
    tier="small",
    subject="smollm2",
    kind="real",
    n="20 failed questions",
    expect="fixed >= 0.2 and stranger <= 0.5 * fixed",
    direction="fixed > stranger",
    null={"stranger": "the same search with the state of another question"},
    thresholds="0.2 and half: the ledger's; fewer than one in five would not be `many`",
    found_there={"fixed": 0.57},
)
def back_patching_helps_smollm2(seed: int) -> Measured:
    """As in the miniature, on capitals of described countries; every third layer, so that it takes
    minutes."""
    lm = models.load("smollm2")
    hops, right = _described(lm)
    failed = [hop for hop, good in zip(hops, right) if not good and hop.known]
    return _repair(lm, failed, ENDS, every=3, seed=seed, asked=len(hops))


def _lens(lm: LM, prompts: list[str], entity: list[int], place: int) -> np.ndarray:
    """Rank of an entity in the logit lens at a place counted from the end: (example, depth)."""
    rank = logit_lens.measure(lm, prompts, answer=entity, top=1)["answer_rank"].values
    ends = (~np.isnan(rank[:, 0])).sum(axis=1)
    return rank[np.arange(len(prompts)), :, ends + place]


def _scope(lm: LM, prompts: list[str], entity: list[int], place: int) -> np.ndarray:
    """The same through a Patchscope; depth 0, and the last, after which no layer is left to say
    anything, show nothing."""
    states = capture(lm, prompts, "layers.*.resid_post", positions=place).stack(
        "layers.*.resid_post"
    )
    blank = len(lm.tokenizer(SCOPE)["input_ids"]) - 1
    cells = [
        replaced(f"layers.{depth}.resid_pre", states[depth - 1][:, None], positions=blank)
        for depth in range(1, lm.dims.layers)
    ]
    ids = torch.tensor(entity)

    def rank(logits: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
        own = logits.gather(1, ids[example.cpu()].to(logits.device)[:, None])
        return (logits > own).sum(dim=1).float()

    found = sweep(lm, [SCOPE + ASKS] * len(prompts), cells, rank).T.numpy()
    return np.pad(found, ((0, 0), (1, 1)), constant_values=np.inf)


def _decoding(
    lm: LM,
    hops: Sequence[Hops],
    places: Sequence[int],
    *,
    top: int,
    seed: int,
    decode: Callable[[LM, list[str], list[int], int], np.ndarray] = _lens,
) -> Measured:
    """When bridge, answer and a stranger's bridge come among the top tokens; the answer at the last
    place only."""
    others = back_patching.strangers([hop.bridge for hop in hops], seed)
    if others is None:
        raise RuntimeError("no question is left to decode.")
    prompts = [hop.prompt for hop in hops]

    def depths(entity: list[int], where: Sequence[int]) -> np.ndarray:
        rows = np.stack([decode(lm, prompts, entity, place) for place in where]).min(axis=0)
        return back_patching.decoded_at(torch.tensor(rows), top).numpy()

    bridge, answer = (
        depths([hop.bridge for hop in hops], places),
        depths([hop.answer for hop in hops], places[1:]),
    )
    stranger = depths([hops[other].bridge for other in others], places)
    both = ~np.isnan(bridge) & ~np.isnan(answer)
    mean = lambda x: x[both].mean() if both.any() else np.nan  # noqa: E731
    earlier = answer - bridge
    return Measured(
        values={
            "bridge_depth": mean(bridge),
            "answer_depth": mean(answer),
            "bridge_share": (~np.isnan(bridge)).mean(),
            "answer_share": (~np.isnan(answer)).mean(),
        },
        null={"stranger_share": (~np.isnan(stranger)).mean()},
        n=len(hops),
        units={"earlier": earlier[both]} if both.any() else {},
        note=f"Both seen in {both.sum()} of {len(hops)} questions, among the top {top} tokens.",
    )


def _repair(
    lm: LM, failed: Sequence[Hops], places: Sequence[int], *, every: int, seed: int, asked: int
) -> Measured:
    """Share of failed questions that some back-patch answers, at either place."""
    some = np.random.default_rng(seed).permutation(len(failed))[:MOST]
    hops = [failed[i] for i in some]
    if len(hops) < 2:
        raise RuntimeError(f"{len(hops)} questions failed: there is nothing to repair.")
    prompts, answers = [hop.prompt for hop in hops], [hop.answer for hop in hops]
    runs = [
        back_patching.measure(lm, prompts, answer=answers, position=place, every=every, seed=seed)
        for place in places
    ]
    right = {name: np.stack([run[name].values > 0 for run in runs]) for name in ("margin", "null")}
    fixed, stranger = (found.any(axis=(0, 2, 3)) for found in right.values())
    single = right["margin"].mean(axis=1)
    figure: xr.DataArray = (runs[int(single.max(axis=(1, 2)).argmax())].margin > 0).mean("example")
    return Measured(
        values={
            "at_description": right["margin"][0].any(axis=(1, 2)).mean(),
            "at_last": right["margin"][1].any(axis=(1, 2)).mean(),
            "best_pair": single.max(),
        },
        null={"stranger": stranger.mean()},
        n=len(hops),
        units={"fixed": fixed},
        figure=figure.rename("fixed").assign_attrs(runs[0].attrs),
        note=f"{len(failed)} of {asked} questions fail though both hops are known; {len(hops)} "
        "were searched.",
    )


def _miniature(seed: int) -> tuple[LM, list[Hops], list[bool]]:
    """Two-hop questions of the world that the miniature learned, and whether it answers each."""
    lm = models.load(make("tiny-twohop", seed=seed))
    asked = tiny_twohop.questions(seed)
    word = lm.tokenizer.convert_tokens_to_ids
    said = [int(i) for i in _top(lm, [q.prompt for q in asked])]
    good = [i == word(q.answer) for i, q in zip(said, asked)]
    known = {q.prompt: ok for q, ok in zip(asked, good) if q.bridge is None}
    hops, right = [], []
    for q, ok in zip(asked, good):
        if q.bridge is not None:
            first, _, second = q.prompt.rpartition(" 's ")
            both = known[first] and known[f"{q.bridge} 's {second}"]
            hops.append(Hops(q.prompt, word(q.bridge), word(q.answer), both))
            right.append(ok)
    order = np.random.default_rng(seed).permutation(len(hops))
    return lm, [hops[i] for i in order], [right[i] for i in order]


def _described(lm: LM) -> tuple[list[Hops], list[bool]]:
    """Capitals of described countries, and whether the capital is the model's top token.

    A hop is known when, asked alone, the right token is above those of the other countries, or
    capitals.
    """
    token = {
        c: [next_token(lm.tokenizer, "is", f" {name}") for name in (c, capitals.CAPITALS[c])]
        for c in WHERE
    }
    token = {country: ids for country, ids in token.items() if None not in ids}
    countries, cities = (torch.tensor(column) for column in zip(*token.values()))
    asked = [(country, words) for country in token for words in WHERE[country]]
    seconds = last_logits(lm, [f"The capital of {country} is" for country in token])[
        :, cities
    ].argmax(dim=-1)
    firsts = last_logits(lm, [f"The country where {words} is" for _, words in asked])[
        :, countries
    ].argmax(dim=-1)
    prompts = [f"The capital of the country where {words} is" for _, words in asked]
    said, place = _top(lm, prompts, 64).tolist(), {country: i for i, country in enumerate(token)}
    hops, right = [], []
    for (country, _), prompt, first, top in zip(asked, prompts, firsts.tolist(), said):
        known = first == place[country] and int(seconds[place[country]]) == place[country]
        bridge, answer = token[country]
        hops.append(Hops(prompt, bridge, answer, known))
        right.append(top == answer)
    return hops, right


def _top(lm: LM, prompts: Sequence[str], size: int = 512) -> torch.Tensor:
    parts = [
        last_logits(lm, list(prompts[i : i + size])).argmax(dim=-1)
        for i in range(0, len(prompts), size)
    ]
    return torch.cat(parts).cpu()
