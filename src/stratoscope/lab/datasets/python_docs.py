"""The documentation of Python 3.11 as its authors write it: 497 files of reStructuredText."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets._data import Splits, cut
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "debian",
            "python3.11-doc",
            "3.11.2-6+deb12u8",
            "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
            12642400,
        ),
    ),
    inside=("usr/share/doc/python3.11/html/_sources/*.txt",),
)
LICENCE = "PSF-2.0"
SPLITS = "80, 10, 10 % of the files, by the hash of a file's name"


def load(folder: Path) -> Splits:
    """Lists of str, one for each file, in the order of their names."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.txt"))}
    return tuple([files[name].read_text("utf-8") for name in names] for names in cut(files))
