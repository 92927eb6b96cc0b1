"""save and load: one file, exact, atomic, and readable where there is no torch."""

from __future__ import annotations

import builtins
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stratoscope.errors import ResultError
from stratoscope.results import dataset, label, load, save

AWKWARD = [
    "",
    " Paris",
    'say "hi"',
    "it's",
    "two\nlines\r\n\t",
    "\x00",
    "a\x00",
    "é 日本 🜁",
    "\\u0000",
    "nan",
    "‮",
]


def exact(result: xr.DataArray | xr.Dataset) -> list[object]:
    """All there is to a result, to the bit: also dtypes, order and attribute types, which xarray
    forgives."""
    data = {result.name: result} if isinstance(result, xr.DataArray) else result.data_vars
    found: list[object] = [type(result), repr(result.attrs)]
    for kind, group in (("data", data), ("coord", result.coords)):
        for name, array in group.items():
            content = array.values.tolist() if array.dtype == object else array.values.tobytes()
            found.append(
                (kind, name, array.dims, array.shape, array.dtype, repr(array.attrs), content)
            )
    return found


def roles() -> xr.Dataset:
    return dataset(
        {
            "score": (
                ("layer", "head", "role"),
                np.random.default_rng(0).random((2, 3, 2), dtype=np.float32),
            ),
            "found": (("layer", "head"), np.array([[True, False, True], [False, False, True]])),
            "token": ("rank", AWKWARD),
            "count": ((), 2**40),
            "nothing": ("step", np.zeros(0, np.float32)),
            "no_text": ("draw", np.zeros(0, object)),
            "half": ("unit", np.array([1.5, np.nan, -0.0, np.inf])),
        },
        method="heads.roles",
        provenance={"model": "tiny é"},
        settings={"quoted": '"', "none": None},
        seed=3,
        coords={
            "role": ["induction", "copying"],
            "layer": [4, 7],
            "kind": ("head", ["", "x", "\x00"]),
        },
        definition="says\nso\x00",
        numbers=[1, 2.5, None, True],
        nested={"a": [""]},
        empty="",
    )


def test_dataset_round_trip(tmp_path: Path) -> None:
    save(roles(), tmp_path / "roles.nc")
    assert exact(load(tmp_path / "roles.nc")) == exact(roles())
    assert os.listdir(tmp_path) == ["roles.nc"]


def test_array_round_trip_with_another_variables_name_and_none(tmp_path: Path) -> None:
    for array in (
        roles()["score"],
        roles()["layer"],
        roles()["token"].rename(None),
        roles()["count"],
    ):
        save(array, tmp_path / "a.nc")
        assert exact(load(tmp_path / "a.nc")) == exact(array)


def test_exact_sees_small_differences() -> None:
    """The comparison above must itself be able to fail."""
    assert exact(roles()) == exact(roles())
    for other in (
        roles().assign(score=roles()["score"].astype("f8")),
        roles().assign(found=roles()["found"].astype("i1")),
        roles().assign(half=roles()["half"] * 1.0000000000000002),
        roles().assign_attrs(seed=3.0),
        roles().reset_coords("kind"),
        roles().assign_coords(kind=("head", ["", "x", ""])),
        roles()["score"],
    ):
        assert exact(roles()) != exact(other)


@pytest.mark.parametrize(
    "dtype", ["i1", "u1", "i2", "u8", "i8", "f2", "f4", "f8", ">f4", "?", "U5", "O"]
)
def test_dtype_round_trip(dtype: str, tmp_path: Path) -> None:
    array = xr.DataArray(
        np.array([0, 1, 100]).astype(dtype if dtype != "O" else "U3").astype(dtype), dims="dim"
    )
    save(array, tmp_path / "a.nc")
    assert exact(load(tmp_path / "a.nc")) == exact(array)


texts = st.text(max_size=6) | st.sampled_from(AWKWARD)
words = st.sampled_from(["layer", "head", "position", "rank"])
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)


@st.composite
def results(draw: st.DrawFn) -> xr.DataArray | xr.Dataset:
    sizes = draw(st.dictionaries(words, st.integers(0, 3), max_size=3))

    def variable() -> tuple[tuple[str, ...], np.ndarray]:
        dims = tuple(draw(st.permutations(list(sizes)))[: draw(st.integers(0, len(sizes)))])
        shape = tuple(sizes[word] for word in dims)
        if draw(st.booleans()):
            return dims, draw(hnp.arrays(object, shape, elements=texts))
        return dims, draw(hnp.arrays(draw(st.sampled_from(["?", "i8", "i4", "f4", "f8"])), shape))

    names = draw(
        st.lists(
            st.from_regex(r"[a-z_é][\w .]{0,5}", fullmatch=True),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    given_coords = {
        name: variable() for name in names[1:] if name not in sizes and draw(st.booleans())
    }
    data = {
        name: variable() for name in names if name not in given_coords and name not in sizes
    } or {"x": ((), np.ones(()))}
    attrs = draw(st.dictionaries(texts, plain, max_size=3))
    whole = xr.Dataset(data, given_coords, attrs=attrs)
    if draw(st.booleans()):
        return whole
    return whole[next(iter(data))].assign_attrs(attrs)


@settings(max_examples=60, deadline=None)
@given(result=results())
def test_round_trip_of_anything(
    result: xr.DataArray | xr.Dataset, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "result.nc"
    save(result, path)
    assert exact(load(path)) == exact(result)


def test_other_tools_see_plain_variables(tmp_path: Path) -> None:
    save(roles(), tmp_path / "roles.nc")
    with xr.open_dataset(tmp_path / "roles.nc", engine="h5netcdf") as file:
        assert file["score"].dims == ("layer", "head", "role")
        assert file["score"].values.tobytes() == roles()["score"].values.tobytes()


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    save(roles(), tmp_path / "roles.nc")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from stratoscope.results import load\n"
        f"found = load({str(tmp_path / 'roles.nc')!r})\n"
        "assert found['token'].values[6] == 'a\\x00', found\n"
        "assert found.sel(role='copying', layer=7)['score'].dtype == 'float32'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    failure: BaseException, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "r.nc"
    save(roles(), target)
    before = target.read_bytes()

    def fail(*_: object) -> None:
        raise failure

    if step == "write":
        real = builtins.open

        def opened(path: object, mode: str = "r", *rest: object, **more: object) -> object:
            file = real(path, mode, *rest, **more)
            if mode == "xb":
                file.write(b"half")
                file.close()
                fail()
            return file

        monkeypatch.setattr(builtins, "open", opened)
    else:
        monkeypatch.setattr(os, step, fail)
    expected = ResultError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save(label([1.0], "dim", name="x", method="m"), target)
    monkeypatch.undo()
    if expected is ResultError:
        assert "No space left on device" in str(caught.value)
        assert "Make room" in str(caught.value)
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.nc"]


def test_a_really_full_disk(tmp_path: Path) -> None:
    """The kernel refuses the bytes, as on a full disk: the process lives, and says so."""
    program = (
        "import os, resource, signal, numpy as np\n"
        "from stratoscope.errors import ResultError\n"
        "from stratoscope.results import label, load, save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "save(label([1.0], 'dim', name='x', method='m'), 'r.nc')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        "    save(label(np.random.rand(100_000), 'dim', name='x', method='m'), 'r.nc')\n"
        "except ResultError as error:\n"
        "    assert 'File too large' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('saved')\n"
        "assert os.listdir() == ['r.nc'] and load('r.nc').values.tolist() == [1.0]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_saving_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "link.nc").symlink_to(tmp_path / "real.nc")
    save(roles(), tmp_path / "link.nc")
    assert (tmp_path / "link.nc").is_symlink()
    assert exact(load(tmp_path / "real.nc")) == exact(roles())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (xr.DataArray([1j], dims="dim", name="x"), "'x' has dtype complex128"),
        (xr.DataArray(np.array(["2020"], "M8[D]"), dims="dim", name="x"), "has dtype datetime64"),
        (xr.DataArray(np.array([{}]), dims="dim", name="x"), "holds objects that are not text"),
        (
            xr.DataArray([1], dims="dim", name="x", attrs={"a": (1,)}),
            "Attribute 'a' of 'x' is a tuple",
        ),
        (xr.Dataset(attrs={"a": {1: 2}}), "Attribute 'a' of the dataset is a dict"),
        (xr.Dataset({"a/b": ("dim", [1])}), "'a/b' cannot name anything"),
        (xr.Dataset({"a": ("", [1])}), "'' cannot name anything"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_by_name(
    result: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ResultError, match=re.escape(message)):
        save(result, tmp_path / "r.nc")
    assert not os.listdir(tmp_path)


def test_bad_targets(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="No such file or directory"):
        save(roles(), tmp_path / "none" / "r.nc")
    with pytest.raises(ResultError, match="Is a directory"):
        save(roles(), tmp_path)
    assert not os.listdir(tmp_path)


def test_bad_sources(tmp_path: Path) -> None:
    path = tmp_path / "r.nc"
    for missing in (path, tmp_path):
        with pytest.raises(ResultError, match="There is no result file at"):
            load(missing)
    for content in (b"", b"not netCDF at all", b"\x89HDF\r\n\x1a\n", b"CDF\x01"):
        path.write_bytes(content)
        with pytest.raises(ResultError, match="cannot be read as netCDF"):
            load(path)
    save(roles(), path)
    whole = path.read_bytes()
    for part in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ResultError, match="damaged, cut short"):
            load(path)
    xr.Dataset({"a": ("x", [1.0])}).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ResultError, match="stratoscope did not write it"):
        load(path)


def test_a_damaged_file_prints_nothing(tmp_path: Path) -> None:
    """h5netcdf complains from a destructor when the checksum of the file's attributes is wrong."""
    save(roles(), tmp_path / "r.nc")
    content = (tmp_path / "r.nc").read_bytes()
    (tmp_path / "r.nc").write_bytes(content.replace(b"OHDR", b"OHDR\xff", 1)[: len(content)])
    program = (
        "from stratoscope.errors import ResultError\n"
        "from stratoscope.results import load\n"
        f"try: load({str(tmp_path / 'r.nc')!r})\n"
        "except ResultError: pass\n"
        "import gc; gc.collect()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("header", ["{", "[]", '{"format": 1}', '{"format": 2}', "{}"])
def test_bad_headers(header: str, tmp_path: Path) -> None:
    xr.Dataset({"a": ("x", [1.0])}, attrs={"stratoscope": header}).to_netcdf(
        tmp_path / "r.nc", engine="h5netcdf"
    )
    with pytest.raises(ResultError, match=r"header of .* is damaged|has result format 2"):
        load(tmp_path / "r.nc")
