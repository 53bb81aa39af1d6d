"""A copy of the script's folder, in which the trial may write what it likes."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

MAX_FILES, MAX_BYTES = 3000, 100 * 2**20  # a folder with more of them is not copied
LARGE = 2**20  # bytes: a larger file is linked
LINKED = {".git", ".hg", ".svn", ".venv", "venv", "node_modules", ".tox", ".mypy_cache"}
LEFT_OUT = {"__pycache__"}
MANY = 1000  # entries of a folder above: then they are not linked
LEVELS = 3  # of folders above that a path such as ../../data may name


class Place(NamedTuple):
    """Where a trial runs."""

    original: Path  # the folder with the script
    copy: Path  # the same, if the script runs in place
    folder: Path  # the current folder of the ranks
    temporary: Path  # a folder for logs and for what the script takes for temporary

    def in_copy(self, path: Path) -> Path:
        return self.copy / path.relative_to(self.original) if path.is_relative_to(self.original) else path

    def in_original(self, path: str) -> str:
        """The path that the user knows."""
        is_inside = Path(path).is_relative_to(self.copy)
        return str(self.original / Path(path).relative_to(self.copy)) if is_inside else path


def is_small(folder: Path) -> bool:
    """Whether it can be copied quickly."""
    n_files = n_bytes = 0
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in LINKED | LEFT_OUT]
        n_files += len(files) + len(folders)
        for name in files:
            path = Path(parent, name)
            if path.is_file() and (size := path.stat().st_size) <= LARGE:
                n_bytes += size
        if n_files > MAX_FILES or n_bytes > MAX_BYTES:
            return False
    return True


def copy_folder(original: Path, copy: Path) -> None:
    """Small files are copied. Large ones, and folders such as .git, are linked."""
    copy.mkdir(parents=True)
    for entry in os.scandir(original):
        target = copy / entry.name
        if entry.name in LEFT_OUT:
            continue
        if entry.is_dir(follow_symlinks=False) and entry.name not in LINKED:
            copy_folder(Path(entry.path), target)
        elif entry.is_file() and not entry.is_symlink() and entry.stat().st_size <= LARGE:
            shutil.copy2(entry.path, target)
        else:
            target.symlink_to(os.path.realpath(entry.path))


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

    A folder that is too large for that is used itself, as it is with `in_place`.
    """
    temporary = Path(os.path.realpath(tempfile.mkdtemp(prefix="ddp-check-")))
    try:
        (temporary / "log").mkdir()
        (temporary / "tmp").mkdir()
        candidates = [current] * script_folder.is_relative_to(current) + [script_folder]
        chosen = next((folder for folder in candidates if not in_place and is_small(folder)), None)
        if chosen is None:
            yield Place(candidates[0], candidates[0], current, temporary)
            return
        copy = temporary / "copy" / chosen.relative_to(chosen.anchor)
        copy_folder(chosen, copy)
        link_neighbours(chosen, copy)
        place = Place(chosen, copy, current, temporary)
        yield place._replace(folder=place.in_copy(current))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
