"""ddp_tutorial.show.difference: how one script grows out of another."""

import random

import pytest

from ddp_tutorial.show.difference import difference, hunks
from tests.ranks import DDP, RESILIENT, SINGLE


def files(folder, old: list[str], new: list[str]):
    paths = folder / "old.py", folder / "new.py"
    for path, lines in zip(paths, (old, new), strict=True):
        path.write_text("".join(f"{line}\n" for line in lines))
    return paths


def patched(old: list[str], found: list[str]) -> list[str]:
    """The new file's lines, from the old one's and the hunks: each one's old lines stand once, after the last one's."""
    new, at = [], 0
    for hunk in found:
        lines = [(line[:1], line[2:]) for line in hunk.split("\n")]
        before = [text for sign, text in lines if sign in ("", " ", "-")]
        start = next(
            i for i in range(at, len(old) + 1) if [line.rstrip() for line in old[i : i + len(before)]] == before
        )
        new += old[at:start] + [text for sign, text in lines if sign in ("", " ", "+")]
        at = start + len(before)
    return new + old[at:]


def test_the_hunks_make_the_new_script_of_the_old_one():
    for old, new in ((SINGLE, DDP), (DDP, RESILIENT), (SINGLE, RESILIENT), (RESILIENT, SINGLE)):
        assert patched(old.read_text().splitlines(), hunks(old, new)) == new.read_text().splitlines()


def test_the_hunks_make_the_new_file_of_the_old_one(tmp_path):
    for seed in range(30):
        rng = random.Random(seed)
        old = [f"line {i}" if i % 5 else "" for i in range(rng.randrange(1, 60))]
        new = [line for line in old if rng.random() > 0.15]
        for _ in range(rng.randrange(9)):
            new.insert(rng.randrange(len(new) + 1), f"new {rng.random()}")
        assert patched(old, hunks(*files(tmp_path, old, new))) == new, f"seed {seed}"


def test_a_hunk_has_signs_and_one_line_around(tmp_path):
    old, new = list("abcdefghij"), list("aBcdefghiXj")
    assert hunks(*files(tmp_path, old, new)) == ["  a\n- b\n+ B\n  c", "  i\n+ X\n  j"]
    assert hunks(*files(tmp_path, old, old)) == []


def test_hunks_are_numbered(tmp_path):
    paths = files(tmp_path, list("abcdefghij"), list("aBcdefghiXj"))
    first, second = "**1 of 2**\n\n```diff\n  a\n- b\n+ B\n  c\n```", "**2 of 2**\n\n```diff\n  i\n+ X\n  j\n```"
    assert difference(*paths).data == f"{first}\n\n{second}"
    assert difference(*paths, 2).data == second
    assert difference(*paths, 2, 1).data == f"{second}\n\n{first}"
    with pytest.raises(IndexError):
        difference(*paths, 3)
    assert difference(*map(str, paths), 1).data == first
