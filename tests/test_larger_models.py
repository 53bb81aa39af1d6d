"""Chapter 10's formula for what forward keeps, at sizes that the page does not have, and what it measures with."""

import re
from pathlib import Path

import nbformat
import pytest
import torch

from ddp_tutorial.show import memory, notebook

CHAPTER = Path(__file__).parents[1] / "notebooks" / "10_fit_larger_models.ipynb"


def chapter_names(width: int, heads: int, blocks: int, length: int) -> dict:
    """What the chapter's files of model and task define, for other sizes, and the page's `activation_bytes`."""
    model, task = (notebook.written_file(CHAPTER, name) for name in ("small_transformer.py", "next_byte.py"))
    sizes = f"WIDTH, HEADS, BLOCKS, LENGTH = {width}, {heads}, {blocks}, {length}"
    model, n = re.subn(r"^WIDTH, HEADS, BLOCKS, LENGTH = .*$", sizes, model, flags=re.M)
    task, n_imports = re.subn(r"^from small_transformer import LENGTH\n", "", task, flags=re.M)
    assert (n, n_imports) == (1, 1)
    exec(model, names := {})
    exec(task, names)
    (cell,) = (c.source for c in nbformat.read(CHAPTER, 4).cells if c.source.startswith("def activation_bytes"))
    exec(cell.partition("\n\n\n")[0], names)
    return names


@pytest.mark.parametrize("sizes", [(64, 2, 1, 256), (128, 4, 6, 32), (256, 8, 2, 64)])
def test_the_formula_says_what_forward_keeps(sizes):
    names = chapter_names(*sizes)
    model, (x, y) = names["Transformer"](), names["batch"](0)
    with memory.kept_by_forward() as kept:
        loss = names["loss_of"](model, x, y)
    weights_at = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    n_bytes = sum(n_bytes for at, n_bytes in kept.items() if at not in weights_at)
    assert names["activation_bytes"](x.numel()) == pytest.approx(n_bytes, rel=0.03)
    loss.backward()  # what is noted is still there


def test_views_of_one_memory_are_kept_once():
    x = torch.ones(10, 10, requires_grad=True)
    with memory.kept_by_forward() as kept:
        x.sin().sum(), x.t().cos().sum()
    assert sum(kept.values()) == 4 * 100


def test_what_a_step_allocates_has_a_peak(tmp_path):
    weight = torch.ones(500, 500, requires_grad=True)
    with memory.recording() as recorded:
        optimizer = torch.optim.SGD([weight], lr=0.1)
        held = torch.ones(1_000_000)
        with memory.step():
            (weight * 2).sum().backward()
            more = torch.ones(3_000_000)
            del more
            optimizer.step()
    allocated = memory.allocations(recorded, tmp_path / "trace.json")
    assert allocated.before == held.nbytes and allocated.end == held.nbytes + weight.nbytes, "the gradient is left"
    assert allocated.peak() == pytest.approx(held.nbytes + weight.nbytes + 12e6, rel=0.01)
    assert 0 < allocated.parts["backward"] < allocated.parts["optimizer"]
    assert allocated.peak("optimizer") < allocated.peak() / 2
    assert allocated.shifted(held.nbytes).peak() == allocated.peak() - held.nbytes
