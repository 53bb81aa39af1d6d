"""The scripts that a chapter's cells write, for whoever measures or tests them."""

import json
import re
from pathlib import Path

from benchmarks.store import ROOT


def scripts(chapter: str, *names: str) -> dict[str, str]:
    """The texts of files of a chapter, as "13". Some cells go on with a file that another one has begun."""
    (page,) = (ROOT / "notebooks").glob(f"{chapter}_*.ipynb")
    cells = ["".join(cell["source"]) for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]]
    heads = {name: re.compile(rf"%%writefile (-a )?{re.escape(name)}\n") for name in names}
    parts = {name: [head.sub("", cell, count=1) for cell in cells if head.match(cell)] for name, head in heads.items()}
    return {name: "\n".join(texts) + "\n" for name, texts in parts.items()}


def write_scripts(chapter: str, folder: Path, *names: str) -> None:
    """Write these files of a chapter into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts(chapter, *names).items():
        (folder / name).write_text(text)
