"""`stratoscope lab`: what there is, made and described, in 80 columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stratoscope import cli
from stratoscope.lab import datasets, miniatures, nets
from stratoscope.store.cache import cache_root
from stratoscope.store.named import NAMED


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path / "cache"


def lab(*words: str) -> Result:
    return CliRunner().invoke(cli.main, ["lab", *words])


def keep(kind: str, name: str, origin: str, files: dict[str, str], **card: object) -> Path:
    """A ready folder in the cache, as `cached` would have left it."""
    folder = cache_root() / kind / name
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text)
    sizes = {file: len(text) for file, text in files.items()}
    (folder / "card.json").write_text(
        json.dumps({**card, "origin_sha256": origin, "format": 1, "bytes": sizes})
    )
    return folder


def test_the_list_shows_everything_in_80_columns():
    done = lab("list")
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80 or str(cache_root()) in max(
        done.output.splitlines(), key=len
    )
    words = set(done.output.split())
    names = {*datasets.names(), *NAMED, *nets.names(), *miniatures.names()}
    assert names <= words
    assert "ODbL-1.0" in words


def test_the_list_of_one_kind_says_what_is_here():
    keep("data", "capitals", datasets.capitals.SOURCE.origin, {"countries.json": "x" * 2_500_000})
    done = lab("list", "datasets")
    row = next(line for line in done.output.splitlines() if line.strip().startswith("capitals"))
    assert row.split()[-4:] == ["3", "MB", "6", "MB"] or row.split()[-4:] == ["2", "MB", "6", "MB"]
    assert "smollm2" not in done.output
    other = next(line for line in done.output.splitlines() if line.strip().startswith("boolq"))
    assert other.split()[-3:] == ["-", "86", "MB*"]


def test_make_prints_the_folder_of_what_is_there():
    folder = keep("data", "capitals", datasets.capitals.SOURCE.origin, {"countries.json": "[]"})
    assert lab("make", "capitals").output == f"{folder}\n"
    folder = keep("models", "smollm2", NAMED["smollm2"].origin, {"config.json": "{}"})
    assert lab("make", "smollm2").output == f"{folder}\n"
    folder = keep("models", "mobilenetv2", nets.mobilenetv2.SOURCE.origin, {"config.json": "{}"})
    assert lab("make", "mobilenetv2").output == f"{folder}\n"


def test_make_refuses_in_one_paragraph(tmp_path):
    done = lab("make", "capitals", "--path", str(tmp_path / "absent"))
    assert done.exit_code == 2
    assert "does not exist" in " ".join(done.output.split())
    done = lab("make", "capitols")
    assert done.exit_code == 2
    assert "Did you mean capitals" in " ".join(done.output.split())
    done = lab("card", "zzzzzz")
    assert "`stratoscope lab list` shows them" in " ".join(done.output.split())


@pytest.mark.parametrize("name", ["imdb", "gemma3-270m", "resnet56-cifar10"])
def test_card_of_what_is_not_here_yet(name):
    done = lab("card", name)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert {"licence", "packages", "sha256"} <= {
        line.split("  ")[0] for line in done.output.splitlines()
    }
    whole = json.loads(lab("card", name, "--json").output)
    assert (whole["name"], bool(whole["folder"])) == (name, False)


def test_card_of_a_miniature_is_the_one_in_its_folder(monkeypatch):
    from stratoscope import lab as room

    told = {
        "name": "tiny-gpt",
        "results": {"loss": 3.14159},
        "held_out": {"9": {"loss": 3.14159}},
        "curve": [[i, 1 / (i + 1)] for i in range(100)],
    }
    monkeypatch.setattr(room, "card", lambda name, seed: told | {"seed": seed}, raising=False)
    done = lab("card", "tiny-gpt", "--seed", "3")
    assert "loss: 3.142" in done.output
    assert done.output.splitlines()[-2].split() == ["99", "0.01"]
    assert "held out" not in done.output  # one judgement, which stands under results
    assert "92 more" in done.output
    assert len(done.output.splitlines()) < 20
    assert json.loads(lab("card", "tiny-gpt", "--json").output)["curve"] == told["curve"]
    folder = cache_root() / "miniatures" / "tiny-gpt-seed0-x"
    monkeypatch.setattr(room, "make", lambda name, seed: folder, raising=False)
    assert lab("make", "tiny-gpt").output == f"{folder}\n"
    assert "not been trained" in " ".join(_untrained(monkeypatch).output.split())


def _untrained(monkeypatch) -> Result:
    monkeypatch.undo()
    return lab("card", "tiny-gpt", "--seed", "987654")
