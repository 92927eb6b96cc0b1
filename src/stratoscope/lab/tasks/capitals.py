"""Capital facts: the capital of a country, from a fixed list."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from stratoscope.lab.tasks._task import Pair, Task, enough, fitted, next_token

CAPITALS = {
    "Afghanistan": "Kabul",
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Bangladesh": "Dhaka",
    "Belgium": "Brussels",
    "Brazil": "Brasília",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogotá",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "England": "London",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "India": "Delhi",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Lebanon": "Beirut",
    "Nepal": "Kathmandu",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Russia": "Moscow",
    "Scotland": "Edinburgh",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Syria": "Damascus",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Ukraine": "Kyiv",
}
TEMPLATES = ("The capital of {country} is", "The capital city of {country} is called")


def task(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Task:
    """n pairs of countries of equal token length. Raises InputError when fewer than four capitals
    are one token."""
    known = [
        country
        for country, city in CAPITALS.items()
        if next_token(tokenizer, "is", f" {city}") is not None
    ]
    enough(known, list(CAPITALS), "capitals", need=4)

    def draw(generator: random.Random) -> Pair:
        one, other = generator.sample(known, 2)
        template = generator.choice(TEMPLATES)
        clean, corrupt = (template.format(country=country) for country in (one, other))
        return Pair(clean, corrupt, f" {CAPITALS[one]}", f" {CAPITALS[other]}")

    story = """The answer is the country's capital. The corrupt prompt names another country, of as
        many tokens, whose capital is the foil. Capitals of several tokens are left out."""
    return fitted(
        "capitals",
        tokenizer,
        n,
        seed,
        draw,
        story=story,
        source="Meng et al. 2022, arXiv:2202.05262",
    )
