"""Write `ddp_sample.py` from the cell of notebook 04 that holds it: ``python -m ddp_tutorial.script [PATH]``."""

import argparse
import json
import sys
from pathlib import Path

from ddp_tutorial.cli import UserError

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "04_train_with_ddp.ipynb"


def read_script(name: str = "ddp_sample.py", notebook: Path = NOTEBOOK) -> str:
    """The text of the file that a cell of `notebook` writes. Raises `UserError` if there is no such notebook."""
    magic = f"%%writefile {name}\n"
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except FileNotFoundError:
        raise UserError(f"{notebook} is missing: install the clone with 'pip install -e .'") from None
    (text,) = [text for cell in cells if (text := "".join(cell["source"])).startswith(magic)]
    return text.removeprefix(magic) + "\n"  # as %%writefile ends the file


def write_script(path: Path, force: bool = False) -> None:
    """Write the script to `path`. Raises `UserError` rather than replace a file that differs, unless `force`."""
    text = read_script()
    if path.exists() and path.read_text() != text and not force:
        raise UserError(f"{path} exists and differs from the tutorial's: name another file, or replace it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ddp_tutorial.script", description="Write the tutorial's script.")
    parser.add_argument("path", nargs="?", type=Path, default=Path("ddp_sample.py"), help="the file (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a file that differs")
    args = parser.parse_args()
    try:
        write_script(args.path, args.force)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(args.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
