"""What a rule is, and what it says."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Finding(NamedTuple):
    """What a rule has seen. Levels: BROKEN, SUSPECT, NOTE, and "holds"."""

    level: str
    rule: str
    seen: str
    at: tuple[str, int] | None = None  # file, line
    fix: str = ""
    chapter: int | None = None
    explains: tuple[str, ...] = ()  # besides those of its rule


class Rule(NamedTuple):
    name: str
    function: Callable[..., Iterator[Finding]]
    chapter: int
    fix: str
    explains: tuple[str, ...]  # the rules that are broken, too, wherever this one is
    is_remark: bool  # it has nothing to say where all is well


@dataclass
class Verdict:
    findings: list[Finding] = field(default_factory=list)
    holds: list[Finding] = field(default_factory=list)
    not_seen: list[str] = field(default_factory=list)  # rules that the run gave no occasion for
    consequences: dict[str, list[str]] = field(default_factory=dict)  # broken rule -> what follows from it

    @property
    def is_broken(self) -> bool:
        return any(finding.level == "BROKEN" for finding in self.findings)


RULES: list[Rule] = []  # in the order in which they are asked: a cause before its consequences


def rule(name: str, chapter: int, fix: str = "", explains: tuple[str, ...] = (), is_remark: bool = False):
    """Make a function of the evidence a rule. It yields what it has found, or `holds(...)`, or nothing: not seen."""

    def register(function: Callable[..., Iterator[Finding]]):
        RULES.append(Rule(name, function, chapter, fix, explains, is_remark))
        return function

    return register


def place(event: dict | list | None) -> tuple[str, int] | None:
    """The line of an event, or a line as events have it."""
    at = event.get("at") if isinstance(event, dict) else event
    return (at[0], at[1]) if at else None


def broken(seen: str, event: dict | list | None = None, fix: str = "") -> Finding:
    """What was seen proves that the rule is broken."""
    return Finding("BROKEN", "", seen, place(event), fix)


def suspect(seen: str, event: dict | list | None = None, fix: str = "") -> Finding:
    """It is likely, and may be meant."""
    return Finding("SUSPECT", "", seen, place(event), fix)


def note(seen: str, event: dict | list | None = None, fix: str = "") -> Finding:
    return Finding("NOTE", "", seen, place(event), fix)


def holds(seen: str = "") -> Finding:
    return Finding("holds", "", seen)
