"""Archives of the registries: the right client is asked, only a trusted archive is used, and it
writes where it may."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from stratoscope.errors import LoadError
from stratoscope.store.packages import Package, forget, obtain, unpack


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """A folder in the place of every registry; npm and apt-get, which write down what they are
    asked, copy from it."""
    for name in [key for key in os.environ if key.startswith(("PIP_", "STRATOSCOPE_"))]:
        monkeypatch.delenv(name)
    folder, programs = tmp_path / "registry", tmp_path / "programs"
    folder.mkdir()
    programs.mkdir()
    fake = (
        f"#!{sys.executable}\n"
        "import pathlib, shutil, sys\n"
        f"with open({str(tmp_path / 'asked')!r}, 'a') as log: log.write(' '.join(sys.argv[1:]) + "
        "'\\n')\n"
        f"found = sorted(pathlib.Path({str(folder)!r}).glob('*.tgz' if 'npm' in sys.argv[0] else "
        "'*.deb'))\n"
        "to = [word.partition('=')[2] for word in sys.argv if "
        "word.startswith('--pack-destination=')] or ['.']\n"
        "if not found: sys.exit('npm error code E404\\nnpm error 404 Not Found: nothing\\nnpm "
        "error A complete log of "
        "this run can be found in: x')\n"
        "for file in found: shutil.copy(file, to[0])\n"
    )
    for name in ("npm", "apt-get"):
        (programs / name).write_text(fake)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def tarred(contents: dict[str, bytes], mode: str = "w:gz") -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode=mode) as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return whole.getvalue()


def debian(contents: dict[str, bytes]) -> bytes:
    """A .deb as dpkg writes it: an `ar` archive of three members, each padded to an even length."""
    whole = b"!<arch>\n"
    for name, data in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        ("data.tar.xz", tarred(contents, "w:xz")),
    ):
        whole += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
            + data
            + b"\n" * (len(data) % 2)
        )
    return whole


def publish(folder: Path, name: str, data: bytes) -> str:
    (folder / name).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def npm(registry: Path, contents: dict[str, bytes], name: str = "@some/words") -> Package:
    file = f"{name.lstrip('@').replace('/', '-')}-1.0.tgz"
    return Package("npm", name, "1.0", publish(registry, file, tarred(contents)), 2_000_000)


def test_npm_is_asked_for_one_version_and_runs_no_script(registry, tmp_path):
    package, said = npm(registry, {"package/a.json": b"[1]"}), []
    archive = obtain(package, tmp_path / "workshop", said.append)
    assert said == ["downloading @some/words@1.0 (2 MB) from the package registry"]
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("pack @some/words@1.0 --pack-destination=")
    assert "--ignore-scripts" in asked
    assert archive == tmp_path / "cache" / "downloads" / "some-words-1.0.tgz"
    [file] = unpack([archive], tmp_path / "out", ["package/*.json"])
    assert (file, file.read_text()) == (tmp_path / "out" / "a.json", "[1]")


def test_a_debian_package_with_an_epoch_is_downloaded_and_unpacked(registry, tmp_path):
    data = debian({"./usr/share/x/a/b.txt": b"deep", "./usr/share/doc/copyright": b"no"})
    package = Package(
        "debian", "words", "1:3.0-37", publish(registry, "words_1%3a3.0-37_all.deb", data)
    )
    archive = obtain(package, tmp_path / "workshop", print)
    assert (tmp_path / "asked").read_text().startswith("download words=1:3.0-37")
    assert unpack([archive], tmp_path / "out", ["usr/share/x/*"]) == [
        tmp_path / "out" / "a" / "b.txt"
    ]


def test_a_wheel_for_another_python_can_be_had(registry, tmp_path):
    name = "words-1.0-cp39-cp39-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(registry / name, "w") as archive:
        archive.writestr(
            "words-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: words\nVersion: 1.0\n"
        )
        archive.writestr(
            "words-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n"
        )
        archive.writestr("words-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256((registry / name).read_bytes()).hexdigest()
    package = Package(
        "pypi", "words", "1.0", digest, python="3.9", platform="manylinux_2_28_x86_64"
    )
    assert obtain(package, tmp_path / "workshop", print).name == name


@pytest.mark.parametrize("right", [True, False])
def test_a_source_archive_of_another_hash_is_never_asked_anything(
    right, registry, tmp_path, monkeypatch
):
    """pip runs a source archive's own code to learn its metadata; it must not come to that."""
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "backend"))
    (tmp_path / "backend").mkdir()
    ran = tmp_path / "ran"
    (tmp_path / "backend" / "planted_backend.py").write_text(
        "import pathlib\n"
        "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        f"    pathlib.Path({str(ran)!r}).touch()\n"
        "    info = pathlib.Path(folder, 'words-1.0.dist-info')\n"
        "    info.mkdir()\n"
        "    (info / 'METADATA').write_text('Metadata-Version: 2.1\\nName: words\\nVersion: "
        "1.0\\n')\n"
        "    return info.name\n"
        "def build_wheel(*_): raise SystemExit\n"
    )
    build = b'[build-system]\nrequires = []\nbuild-backend = "planted_backend"\n'
    about = b"Metadata-Version: 2.1\nName: words\nVersion: 1.0\n"
    source = tarred(
        {
            "words-1.0/pyproject.toml": build,
            "words-1.0/PKG-INFO": about,
            "words-1.0/data.txt": b"text",
        }
    )
    digest = publish(registry, "words-1.0.tar.gz", source)
    package = Package("pypi", "words", "1.0", digest if right else "0" * 64, sdist=True)
    if right:
        archive = obtain(package, tmp_path / "workshop", print)
        assert unpack([archive], tmp_path / "out", ["words-1.0/data.txt"])[0].read_text() == "text"
    else:
        with pytest.raises(LoadError, match=r"DO NOT MATCH THE HASHES.*" + digest):
            obtain(package, tmp_path / "workshop", print)
    assert ran.exists() == right


def test_what_was_fetched_before_an_interruption_is_not_fetched_again(registry, tmp_path):
    package = npm(registry, {"package/a.json": b"[1]"})
    first = obtain(package, tmp_path / "workshop", print)
    assert (
        obtain(package, tmp_path / "workshop", lambda words: pytest.fail("downloaded again"))
        == first
    )
    forget([package])
    assert not first.exists()
    forget([package])


def test_what_lies_in_downloads_is_checked_again(registry, tmp_path):
    package = npm(registry, {"package/a.json": b"[1]"})
    kept = obtain(package, tmp_path / "workshop", print)
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(LoadError, match="sha256"):
        obtain(package, tmp_path / "workshop", print)
    # the damaged one is gone: it comes anew
    assert obtain(package, tmp_path / "workshop", print) == kept


def test_another_hash_is_refused_and_what_was_downloaded_removed(registry, tmp_path):
    package = npm(registry, {"package/a.json": b"[1]"})
    (registry / package.file).write_bytes(b"something else")
    with pytest.raises(LoadError, match=f"is not the one stratoscope trusts.*{package.sha256}"):
        obtain(package, tmp_path / "workshop", print)
    assert not [file for file in tmp_path.rglob("*.tgz") if file.parent != registry]


@pytest.mark.parametrize("by", ["file", "folder", "environment"])
def test_an_archive_of_ones_own_is_taken_and_left_where_it_is(by, registry, tmp_path, monkeypatch):
    package = npm(registry, {"package/a.json": b"[1]"})
    own = tmp_path / "own" / "renamed.tgz" if by == "file" else tmp_path / "own" / package.file
    own.parent.mkdir()
    (registry / package.file).rename(own)
    path = {"file": own, "folder": own.parent}.get(by)
    if by == "environment":
        monkeypatch.setenv("STRATOSCOPE_WHEELS", str(own.parent))
    assert obtain(package, tmp_path / "workshop", print, path=path) == own
    own.write_bytes(b"changed")
    with pytest.raises(LoadError, match="sha256"):
        obtain(package, tmp_path / "workshop", print, path=path)
    forget([package])
    assert own.exists()


@pytest.mark.parametrize(
    ("place", "says"), [("absent.tgz", "does not exist"), ("", r"holds no some-words-1\.0\.tgz")]
)
def test_a_path_that_does_not_have_it_is_refused_not_passed_over(place, says, registry, tmp_path):
    package = npm(registry, {"package/a.json": b"[1]"})
    (tmp_path / "own").mkdir()
    with pytest.raises(LoadError, match=says):
        obtain(package, tmp_path / "workshop", print, path=tmp_path / "own" / place)


@pytest.mark.parametrize("registry_name", ["npm", "debian"])
def test_a_missing_client_says_so_and_names_the_way_round(
    registry_name, registry, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    package = Package(registry_name, "words", "1.0", "0" * 64)
    client = "npm" if registry_name == "npm" else "apt-get"
    with pytest.raises(LoadError, match=rf"there is no {client} here.*STRATOSCOPE_WHEELS"):
        obtain(package, tmp_path / "workshop", print)


def test_a_package_that_is_not_to_be_had_quotes_the_client(registry, tmp_path):
    with pytest.raises(LoadError) as caught:
        obtain(Package("npm", "words", "1.0", "0" * 64), tmp_path / "workshop", print)
    assert "words@1.0 could not be downloaded by npm: E404 404 Not Found: nothing. Check" in str(
        caught.value
    )
    assert "`npm pack words@1.0 --pack-destination=FOLDER`" in str(caught.value)
    with pytest.raises(
        LoadError,
        match=r"by pip: No matching distribution found for words==1.0\. .*`pip download --no",
    ):
        obtain(Package("pypi", "words", "1.0", "0" * 64), tmp_path / "workshop", print)


@pytest.mark.parametrize(
    "entry", ["package/../../evil.json", "package//evil.json", "package/a/../../../evil.json"]
)
@pytest.mark.parametrize("ending", [".tgz", ".whl", ".deb"])
def test_no_archive_writes_outside_its_folder(entry, ending, tmp_path):
    archive = tmp_path / f"words{ending}"
    if ending == ".whl":
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr(entry, b"{}")
    else:
        archive.write_bytes((tarred if ending == ".tgz" else debian)({entry: b"{}"}))
    with pytest.raises(LoadError, match="would be written elsewhere"):
        unpack([archive], tmp_path / "deep" / "out", ["package/*"])
    assert not list(tmp_path.rglob("evil.json"))


def test_links_in_an_archive_are_not_followed(tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        link = tarfile.TarInfo("package/a.json")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(link)
    (tmp_path / "words.tgz").write_bytes(whole.getvalue())
    with pytest.raises(LoadError, match=r"should hold package/\*"):
        unpack([tmp_path / "words.tgz"], tmp_path / "out", ["package/*"])


@pytest.mark.parametrize("ending", [".tgz", ".whl", ".deb"])
@pytest.mark.parametrize("kept", [0, 5, 90, -200])
def test_a_damaged_archive_is_a_load_error(ending, kept, tmp_path):
    archive, noise = tmp_path / f"words{ending}", {"package/a.json": os.urandom(5000)}
    if ending == ".whl":
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr("package/a.json", noise["package/a.json"])
    else:
        archive.write_bytes((tarred if ending == ".tgz" else debian)(noise))
    archive.write_bytes(archive.read_bytes()[:kept])
    with pytest.raises(LoadError, match=r"is damaged|should hold"):
        unpack([archive], tmp_path / "out", ["package/*"])


def test_members_keep_their_place_below_what_the_patterns_share(tmp_path):
    (tmp_path / "w.tgz").write_bytes(
        tarred({"p/data/a/1.txt": b"1", "p/data/b/1.txt": b"2", "p/other/1.txt": b"3"})
    )
    written = unpack([tmp_path / "w.tgz"], tmp_path / "out", ["p/data/a/1.txt", "p/data/b/*.txt"])
    assert {path.relative_to(tmp_path / "out").as_posix() for path in written} == {
        "a/1.txt",
        "b/1.txt",
    }
