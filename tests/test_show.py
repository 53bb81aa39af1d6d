"""What a page says to those who cannot see its figures, and how it attacks a program."""

import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from ddp_tutorial import launcher
from ddp_tutorial.show import notebook
from ddp_tutorial.show.attack import attack


def test_a_small_red_star_stays_red():
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    axes[0].plot(range(9), color="#12355b")
    axes[0].plot(3, 7, "*", ms=16, color="#d1495b", mec="black")
    axes[1].imshow(np.sqrt(np.random.default_rng(0).random((32, 32))), cmap="Blues")
    figure.savefig(png := io.BytesIO(), format="png")
    plt.close(figure)
    stored = Image.open(io.BytesIO(notebook.fewer_colors(png.getvalue(), 64))).convert("RGB")
    assert np.abs(np.asarray(stored, int) - (209, 73, 91)).max(axis=2).min() < 25
    assert stored.getpixel((0, 0)) == (255, 255, 255)


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


SAYS_EPOCHS = """
import os, sys, time
print("1 x cpu: of a script", flush=True)
if sys.argv[1:] == [os.environ.get("FAILS")]:
    sys.exit("it fails")
for epoch in range(1, 1000):
    print(f"epoch {epoch:3} ", flush=True)
    time.sleep(0.02)
"""


def test_an_attack_ends_what_it_has_started(tmp_path, monkeypatch):
    """It says how its victim ended; and if another program fails, or nobody was attacked, that is an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "say.py").write_text(SAYS_EPOCHS)
    said = []
    assert attack("SIGTERM", "0", 3, "say.py", say=said.append).codes == [143]
    assert re.search("epoch   3.*attack: SIGTERM to rank 0", "".join(said))
    nodes = {name: launcher.inherited_environment() | {"FAILS": word} for name, word in (("A", "now"), ("B", ""))}
    with pytest.raises(RuntimeError, match=r"exit codes \[1, -15\][^$]*it fails"):
        attack("SIGKILL", "B", 10**6, "say.py now", nodes, said.append)
    with pytest.raises(RuntimeError, match=r"exit codes \[1\]"):
        attack("SIGKILL", "0", 10**6, "say.py now", {"": nodes["A"]}, said.append)
