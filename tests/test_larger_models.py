"""Chapter 10's formula for what forward keeps, at sizes that the page does not have."""

import re
from pathlib import Path

import nbformat
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from ddp_tutorial.show import notebook

CHAPTER = Path(__file__).parents[1] / "notebooks" / "10_fit_larger_models.ipynb"


def chapter_names(width: int, heads: int, blocks: int, length: int) -> dict:
    """What the chapter's model file defines, for other sizes, and the page's `activation_bytes`."""
    source = notebook.written_file(CHAPTER, "small_transformer.py")
    sizes = f"WIDTH, HEADS, BLOCKS, LENGTH = {width}, {heads}, {blocks}, {length}"
    source, n = re.subn(r"^WIDTH, HEADS, BLOCKS, LENGTH = .*$", sizes, source, flags=re.M)
    assert n == 1
    exec(source, names := {})
    (cell,) = (c.source for c in nbformat.read(CHAPTER, 4).cells if c.source.startswith("def activation_bytes"))
    exec(cell.partition("\n\n\n")[0], names)
    return names


def kept_bytes(model: torch.nn.Module, loss) -> int:
    """What the forward pass `loss` keeps, without the weights."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = loss()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    result.backward()
    return sum(kept.values())


@pytest.mark.parametrize("sizes", [(64, 2, 1, 256), (128, 4, 6, 32), (256, 8, 2, 64)])
def test_the_formula_says_what_forward_keeps(sizes):
    names = chapter_names(*sizes)
    model, (x, y) = names["Transformer"](), names["batch"](0)
    kept = kept_bytes(model, lambda: names["loss_of"](model, x, y))
    assert names["activation_bytes"](x.numel()) == pytest.approx(kept, rel=0.03)
