"""The world's 250 countries and territories: capital, languages, currency, region, neighbours,
people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stratoscope.lab.datasets._data import Splits, cut
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "npm",
            "world-countries",
            "5.1.0",
            "329eb6ef4099ffb590219c9beb634bf489a5e4b10d8ab0ac52a58ebf7b9f8495",
            5771113,
        ),
    ),
    inside=("package/countries.json",),
)
LICENCE = "ODbL-1.0"
SPLITS = "80, 10, 10 % of the countries, by the hash of the three-letter code"


def load(folder: Path) -> Splits:
    """Lists of {"country", "capital", "languages", "currencies", "region", "subregion", "borders",
    "demonym", ...}.

    capital and demonym are "" where there is none; of several capitals it is the first. borders are
    names of countries; independent is False for territories; area in square kilometres, place as
    (latitude, longitude) in degrees.
    """
    countries = json.loads((folder / "countries.json").read_text("utf-8"))
    called = {country["cca3"]: country["name"]["common"] for country in countries}
    parts = cut(countries, key=lambda country: country["cca3"])
    return tuple([_row(country, called) for country in part] for part in parts)


def _row(country: dict[str, Any], called: dict[str, str]) -> dict[str, Any]:
    return {
        "country": country["name"]["common"],
        "official": country["name"]["official"],
        "code": country["cca3"],
        "capital": next(iter(country["capital"]), ""),
        "languages": list(country["languages"].values()),
        "currencies": [currency["name"] for currency in country["currencies"].values()],
        "region": country["region"],
        "subregion": country["subregion"],
        "borders": [called[code] for code in country["borders"]],
        "demonym": country["demonyms"].get("eng", {}).get("m", ""),
        "independent": bool(country["independent"]),
        "landlocked": country["landlocked"],
        "area": country["area"],
        "place": tuple(country["latlng"]),
    }
