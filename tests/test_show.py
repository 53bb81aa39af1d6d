"""What a page says to those who cannot see its figures."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from ddp_tutorial.show import notebook

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb")) + sorted(FOLDER.glob("solutions/*.ipynb"))


def silent_figures(cells: list[dict]) -> list[str]:
    """The cells, by the end of their source, that show a picture without a text alternative."""
    silent = []
    for cell in cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            alternatives = re.findall(r"<img\b(?:[^>]*?\balt=\"([^\"]*)\")?", "".join(data.get("text/html", "")))
            if "image/png" in data:
                alternatives.append(output["metadata"].get("image/png", {}).get("alt", ""))
            silent += ["".join(cell["source"])[-60:] for alternative in alternatives if not alternative.strip()]
    return silent


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_every_figure_has_a_text_alternative(path):
    assert silent_figures(json.loads(path.read_text(encoding="utf-8"))["cells"]) == []


def test_a_silent_figure_is_found():
    shown = [
        {"data": {"image/png": "AAAA"}, "metadata": {}},
        {"data": {"image/png": "AAAA"}, "metadata": {"image/png": {"alt": "A finding"}}},
        {"data": {"text/html": ["<img id=a>\n", '<img alt="A finding" id=b>\n']}, "metadata": {}},
    ]
    assert silent_figures([{"source": ["x\n", "y"], "outputs": [one]} for one in shown]) == ["x\ny", "x\ny"]


def test_a_figure_is_told_by_its_titles():
    figure, (left, right) = plt.subplots(2, label="a ring")
    assert notebook.text_alternative(figure) == "a ring"
    left.set_title("One breaks,", loc="left")
    right.set_title("another\ndrifts")
    assert notebook.text_alternative(figure) == "One breaks; another drifts"
    figure.suptitle("Both fail")
    assert notebook.text_alternative(figure) == "Both fail"
    assert notebook.text_alternative(plt.figure()) == ""
    plt.close("all")
