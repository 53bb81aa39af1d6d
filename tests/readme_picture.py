"""The README's picture is a figure of notebook 04: ``python -m tests.readme_picture`` takes it from the stored output."""

import base64
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "notebooks" / "images" / "one_curve.png"
TITLE = "One, two and four ranks give one curve"


def stored_figure() -> bytes:
    """The PNG of the cell that draws the figure with this title."""
    cells = json.loads((ROOT / "notebooks" / "04_train_with_ddp.ipynb").read_text())["cells"]
    (cell,) = [c for c in cells if c["cell_type"] == "code" and f'"{TITLE}"' in "".join(c["source"])]
    (png,) = [o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {})]
    return base64.b64decode(png)


if __name__ == "__main__":
    PICTURE.write_bytes(stored_figure())
    print(PICTURE.relative_to(ROOT))
