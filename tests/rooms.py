"""python -m tests.rooms: the rooms of the project and what each imports, as the picture in CONTRIBUTING.md.

GitHub draws the block that it prints. The arrows are read from the programs; `test_project.py` compares.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from tests.ranks import DDP, RESILIENT, SINGLE

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ddp_tutorial"
FOLDERS = ("data_gen", "benchmarks", "tests")  # each is one room
MODULES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = [*MODULES, SINGLE, DDP, RESILIENT]
STRANGE = ROOT / "tests" / "check" / "styles"  # scripts of other people's kinds, which know nothing of this project
PROGRAMS += [
    path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if STRANGE not in path.parents
]
LESSON = {"data", "model", "training", "history", "flags", "console", "files", "npy"}


class Room(NamedTuple):
    """Modules that know of the same things."""

    knows: str  # what that is, in three to six words
    may_import: set[str]  # the law: these rooms


ROOMS = {
    "lesson": Room("how one process trains", {"lesson"}),
    "process": Room("how one of several processes ends", {"lesson"}),
    "ranks": Room("what ranks do together", {"lesson", "process", "ranks"}),
    "show": Room("what a page needs", {"lesson", "launcher", "show"}),
    "__init__": Room("what PyTorch must import early", set()),
    "__main__": Room("the first command", {"lesson", "show"}),
    "launcher": Room("how to start ranks quickly", set()),
    "check": Room("how to check any script", {"lesson", "launcher", "check"}),
    "single_sample": Room("the loop of one process", {"lesson", "process"}),
    "ddp_sample": Room("the same loop, with DDP", {"lesson", "process"}),
    "ddp_resilient": Room("the same, for long jobs", {"lesson", "process", "ranks"}),
    "data_gen": Room("how the files are made", {"data_gen"}),
    "benchmarks": Room(
        "how fast, beside other programs",
        {"lesson", "process", "ranks", "show", "launcher", "data_gen", "benchmarks"},
    ),
    "tests": Room(
        "what must stay true",
        {"lesson", "process", "ranks", "show", "launcher", "check", "data_gen", "benchmarks", "tests"},
    ),
}


def room_of(path: Path) -> str:
    """Where a program stands."""
    if path.parent == PACKAGE:
        return "lesson" if path.stem in LESSON else path.stem
    if path.is_relative_to(PACKAGE):
        return path.relative_to(PACKAGE).parts[0]
    folder = path.relative_to(ROOT).parts[0]
    return folder if folder in FOLDERS else path.stem


def imported(text: str) -> set[str]:
    """What a program imports: "a.b" for `import a.b`, "a.b" and "a.b.c" for `from a.b import c`."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(names: set[str]) -> set[str]:
    """The rooms in which these names stand."""
    second = {name.split(".")[1] for name in names if name.startswith("ddp_tutorial.")}
    folders = {name.split(".")[0] for name in names} & set(FOLDERS)
    return {"lesson" if name in LESSON else name for name in second} | folders


def imports() -> dict[str, set[str]]:
    """For each room the other rooms that its programs import."""
    arrows = {room_of(path): set() for path in PROGRAMS}
    for path in PROGRAMS:
        arrows[room_of(path)] |= rooms_of(imported(path.read_text()))
    return {room: others - {room} for room, others in arrows.items()}


def reached(room: str, arrows: dict[str, set[str]]) -> set[str]:
    """The rooms to which arrows lead from `room`, over any number of others. There is no circle."""
    return arrows[room].union(*(reached(other, arrows) for other in arrows[room]))


def direct(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows without those that a longer way makes needless: of a -> b, b -> c and a -> c the last one goes."""
    longer = {room: set().union(*(reached(other, arrows) for other in others)) for room, others in arrows.items()}
    return {room: others - longer[room] for room, others in arrows.items()}


def picture() -> str:
    """The block for CONTRIBUTING.md: a box for each room, an arrow from it to each that it imports."""
    arrows = {room: others for room, others in direct(imports()).items() if room != "__init__"}
    drawn = [room for room in ROOMS if room in arrows]
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {room.strip("_")}["{room}: {ROOMS[room].knows}"]' for room in drawn]
    lines += [f"    {room.strip('_')} --> {other}" for room in drawn for other in sorted(arrows[room])]
    return "\n".join([*lines, "```"])


if __name__ == "__main__":
    print(picture())
