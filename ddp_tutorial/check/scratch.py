"""A copy of the script's folder, in which the trial may write what it likes."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

MAX_ENTRIES = 20_000  # files and folders: a folder with more of them is not copied
MAX_FILES, MAX_BYTES = 3000, 100 * 2**20  # files that are copied, besides code: the others are linked
LINKED = {".git", ".hg", ".svn", ".venv", "venv", "node_modules", ".tox", ".mypy_cache"}
LEFT_OUT = {"__pycache__"}
MANY = 1000  # entries of a folder above: then they are not linked
LEVELS = 3  # of folders above that a path such as ../../data may name


class Place(NamedTuple):
    """Where a trial runs."""

    original: Path  # the folder with the script
    copy: Path  # the same, if the script runs in place
    folder: Path  # the current folder of the ranks
    temporary: Path  # a folder for logs, for the copy, and for what the script takes for temporary
    linked: dict[str, tuple[int, int]]  # file of the user's to which the copy leads -> its size, and its time

    @property
    def is_copy(self) -> bool:
        return self.copy != self.original

    def in_copy(self, path: Path) -> Path:
        return self.copy / path.relative_to(self.original) if path.is_relative_to(self.original) else path

    def in_original(self, path: str) -> str:
        """The path that the user knows."""
        is_inside = Path(path).is_relative_to(self.copy)
        return str(self.original / Path(path).relative_to(self.copy)) if is_inside else path

    def changed(self) -> list[str]:
        """Files that are linked, and are not as they were: `watch.files` does not see each way to write."""
        return [path for path, before in self.linked.items() if size_and_time(path) != before]


def size_and_time(path: str) -> tuple[int, int]:
    """(-1, 0) if there is no such file any more."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def is_entered(entry: os.DirEntry) -> bool:
    return entry.is_dir(follow_symlinks=False) and entry.name not in LINKED


def entries_of(folder: Path) -> list[os.DirEntry] | None:
    """What is in it and below, a folder before what is in that; None if it is too much to copy."""
    found, folders = [], [str(folder)]
    for parent in folders:  # it grows
        entries = []
        with suppress(OSError):  # nobody may look into it
            entries = [entry for entry in os.scandir(parent) if entry.name not in LEFT_OUT]
        found += entries
        if len(found) > MAX_ENTRIES:
            return None
        folders += [entry.path for entry in entries if is_entered(entry)]
    return found


def copy_folder(original: Path, entries: list[os.DirEntry], copy: Path) -> list[str]:
    """Folders are made anew, and files are copied while there is room. All else is linked: the files that are."""
    copy.mkdir(parents=True)
    files, real = [], os.path.realpath(original)
    for entry in entries:
        target = copy / os.path.relpath(entry.path, original)
        if is_entered(entry):
            target.mkdir()
            continue
        leads_to = Path(os.path.realpath(entry.path))
        if entry.is_symlink() and leads_to.is_relative_to(real):
            target.symlink_to(copy / leads_to.relative_to(real))
        elif entry.is_file() and os.access(entry.path, os.R_OK):
            files.append((entry, target))
        else:
            target.symlink_to(leads_to)
    return copy_files(files)


def copy_files(files: list[tuple[os.DirEntry, Path]]) -> list[str]:
    """All code, and the smallest others. Returns those for which there is no room: they are linked."""
    linked, n_bytes = [], 0
    files.sort(key=lambda pair: pair[0].stat().st_size)
    for i, (entry, target) in enumerate(files):
        n_bytes += entry.stat().st_size
        if (i < MAX_FILES and n_bytes <= MAX_BYTES) or entry.name.endswith(".py"):
            shutil.copy2(entry.path, target)
        else:
            linked.append(os.path.realpath(entry.path))
            target.symlink_to(linked[-1])
    return linked


def link_neighbours(original: Path, copy: Path) -> None:
    """So that a path such as ../data leads where it leads from the original."""
    for _ in range(LEVELS):
        parent = original.parent
        if parent == parent.parent:
            return
        entries = list(os.scandir(parent))
        if len(entries) > MANY:
            return
        for entry in entries:
            if entry.path != str(original):
                (copy.parent / entry.name).symlink_to(entry.path)
        original, copy = parent, copy.parent


@contextmanager
def place_for(script_folder: Path, current: Path, in_place: bool = False) -> Iterator[Place]:
    """Where to run a script: in a copy of the current folder if the script is below it, else in one of its own folder.

    A folder that has too much in it for that is used itself, as it is with `in_place`.
    """
    temporary = Path(os.path.realpath(tempfile.mkdtemp(prefix="ddp-check-")))
    try:
        (temporary / "log").mkdir()
        (temporary / "tmp").mkdir()
        candidates = [current] * script_folder.is_relative_to(current) + [script_folder]
        for folder in () if in_place else candidates:
            if (entries := entries_of(folder)) is not None:
                copy = temporary / "copy" / folder.relative_to(folder.anchor)
                linked = {path: size_and_time(path) for path in copy_folder(folder, entries, copy)}
                link_neighbours(folder, copy)
                place = Place(folder, copy, current, temporary, linked)
                yield place._replace(folder=place.in_copy(current))
                return
        yield Place(candidates[0], candidates[0], current, temporary, {})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
