"""The README's pictures are figures of notebook 04: ``python -m tests.readme_picture`` takes them from its outputs."""

import base64
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
TITLES = {
    "ddp.png": "A step of DDP: each rank its own samples, all ranks one gradient",
    "one_curve.png": "One, two and four ranks give one curve",
}


def picture(name: str) -> Path:
    """Where the README has it."""
    return ROOT / "notebooks" / "images" / name


def stored_figure(name: str) -> bytes:
    """The PNG of the cell that draws the figure with this picture's title."""
    cells = json.loads((ROOT / "notebooks" / "04_train_with_ddp.ipynb").read_text())["cells"]
    (cell,) = [c for c in cells if c["cell_type"] == "code" and f'"{TITLES[name]}"' in "".join(c["source"])]
    (png,) = [o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {})]
    return base64.b64decode(png)


if __name__ == "__main__":
    for name in TITLES:
        picture(name).write_bytes(stored_figure(name))
        print(picture(name).relative_to(ROOT))
