"""Copies of a program with something put in or replaced, at a place that its syntax tree knows."""

import ast
from collections.abc import Callable
from pathlib import Path

Place = Callable[[ast.stmt], bool]


def is_class(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ClassDef)


def is_main(statement: ast.stmt) -> bool:
    """Whether this is `if __name__ == "__main__":`."""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def calls_of(node: ast.AST, function: str) -> list[ast.Call]:
    """The calls of `function`, by its full name, in a statement's own line: not in the statements below it."""
    found = [node] if isinstance(node, ast.Call) and ast.unparse(node.func) == function else []
    inner = (child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt))
    return found + [call for child in inner for call in calls_of(child, function)]


def calls(function: str) -> Place:
    """The place of a statement that calls `function`."""
    return lambda statement: bool(calls_of(statement, function))


def the_only(found: list, what: str):
    assert len(found) == 1, f"{what} is there {len(found)} times"
    return found[0]


def put_before(script: Path, place: Place, code: str, copy: Path) -> Path:
    """Write a copy of the script with `code` before the only statement that `place` is true of, indented like it."""
    lines = script.read_text().splitlines(keepends=True)
    statements = (node for node in ast.walk(ast.parse("".join(lines))) if isinstance(node, ast.stmt))
    statement = the_only([node for node in statements if place(node)], "the place")
    start = min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", ()))]) - 1
    indent = " " * statement.col_offset
    lines[start:start] = [indent + line + "\n" if line else "\n" for line in code.splitlines()]
    copy.write_text("".join(lines))
    return copy


def replace_call(script: Path, function: str, code: str, copy: Path) -> Path:
    """Write a copy of the script with the only call of `function` replaced by the expression `code`."""
    lines = script.read_bytes().splitlines(keepends=True)  # a tree counts columns in bytes
    statements = (node for node in ast.walk(ast.parse(b"".join(lines))) if isinstance(node, ast.stmt))
    call = the_only([call for node in statements for call in calls_of(node, function)], f"a call of {function}")
    first, last = call.lineno - 1, call.end_lineno - 1
    before, after = lines[first][: call.col_offset], lines[last][call.end_col_offset :]
    lines[first : last + 1] = [before + code.encode() + after]
    copy.write_bytes(b"".join(lines))
    return copy
