"""Two facts in a row: the capital, or the main language, of a country that is described and not
named."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from stratoscope.lab.tasks._task import Pair, Task, enough, fitted, next_token
from stratoscope.lab.tasks.capitals import CAPITALS

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
LANGUAGES = {
    "Austria": "German",
    "China": "Chinese",
    "Cuba": "Spanish",
    "Denmark": "Danish",
    "Egypt": "Arabic",
    "England": "English",
    "Finland": "Finnish",
    "France": "French",
    "Germany": "German",
    "Greece": "Greek",
    "Hungary": "Hungarian",
    "Iran": "Persian",
    "Iraq": "Arabic",
    "Italy": "Italian",
    "Japan": "Japanese",
    "Norway": "Norwegian",
    "Peru": "Spanish",
    "Poland": "Polish",
    "Portugal": "Portuguese",
    "Russia": "Russian",
    "Spain": "Spanish",
    "Sweden": "Swedish",
    "Syria": "Arabic",
    "Turkey": "Turkish",
}
SECOND = {"The capital of {} is": CAPITALS, "The main language of {} is": LANGUAGES}


class Question(NamedTuple):
    """A two-hop prompt, each of its hops as a prompt of its own, and the bridge and the answer as
    words and as ids of the one token that they are."""

    prompt: str
    first: str
    second: str
    bridge: str
    answer: str
    bridge_id: int
    answer_id: int


def questions(tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """All questions of which bridge and answer are one token each after "is"."""
    return list(_questions(tokenizer))


def _questions(tokenizer: PreTrainedTokenizerBase) -> Iterator[Question]:
    for asks, answers in SECOND.items():
        for country, words in WHERE.items():
            answer = answers.get(country, "")
            ids = [next_token(tokenizer, "is", f" {word}") for word in (country, answer)]
            if not answer or None in ids:
                continue
            for described in words:
                yield Question(
                    asks.format(f"the country where {described}"),
                    f"The country where {described} is",
                    asks.format(country),
                    country,
                    answer,
                    *ids,
                )


def task(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Task:
    """n pairs of descriptions of equal token length. Raises InputError when fewer than four
    questions have answers of one token."""
    known = questions(tokenizer)
    enough(known, [c for words in WHERE.values() for c in words], "two-hop questions", need=4)

    def draw(generator: random.Random) -> Pair:
        one = generator.choice(known)
        asks = one.prompt.split("the country where")[0]
        other = generator.choice(
            [q for q in known if q.answer != one.answer and q.prompt.startswith(asks)]
        )
        return Pair(one.prompt, other.prompt, f" {one.answer}", f" {other.answer}")

    story = """The answer is the capital, or the main language, of a country that is described. The
        corrupt prompt describes another country, in as many tokens, whose answer is the foil."""
    return fitted(
        "two_hops",
        tokenizer,
        n,
        seed,
        draw,
        story=story,
        source="after Biran et al. 2024, arXiv:2406.12775",
    )
