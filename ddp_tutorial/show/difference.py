"""How one script grows out of another: the differences, as numbered hunks."""

import difflib
from pathlib import Path

from IPython.display import Markdown

CONTEXT = 1  # lines shown around a change; changes closer than twice that are one hunk


def hunks(old: str | Path, new: str | Path) -> list[str]:
    """The differences of two text files, from the top down. Each line starts with "+", "-" or a blank."""
    before, after = (Path(path).read_text().splitlines() for path in (old, new))
    found = []
    for group in difflib.SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(CONTEXT):
        lines = []
        for tag, i1, i2, j1, j2 in group:
            lines += [f"  {line}".rstrip() for line in before[i1:i2] if tag == "equal"]
            lines += [f"- {line}".rstrip() for line in before[i1:i2] if tag != "equal"]
            lines += [f"+ {line}".rstrip() for line in after[j1:j2] if tag != "equal"]
        found.append("\n".join(lines))
    return found


def difference(old: str | Path, new: str | Path, *numbers: int) -> Markdown:
    """Those hunks, all or the ones with these `numbers` (from 1), as a cell's output.

    GitHub colours them; in JupyterLab, and in greyscale, the signs say it. Raises `IndexError` for a hunk too far.
    """
    found = hunks(old, new)
    parts = []
    for number in numbers or range(1, len(found) + 1):
        parts.append(f"**{number} of {len(found)}**\n\n```diff\n{found[number - 1]}\n```")
    return Markdown("\n\n".join(parts))
