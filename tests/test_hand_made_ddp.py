"""Chapter 05's HandMadeDDP, seen from outside: on two ranks it has to train as one process with the full batch does.

Each wrong variant is the chapter's own text with one mistake put in, and has to be caught: else the check is none.
"""

import pytest

from ddp_tutorial.show.notebook import written_file
from tests.ranks import NOTEBOOKS, reports_of

MISTAKES = {  # name -> (what stands in the chapter, what stands there instead)
    "averages the weights": ("weight.grad", "weight.data"),
    "does not broadcast": ("dist.broadcast(tensor, src=0)", "pass"),
    "leaves the sum": ("weight.grad /= dist.get_world_size()", "pass"),
    "skips a weight": ("in module.parameters()", "in list(module.parameters())[1:]"),
    "takes all weights for trained": ("if weight.requires_grad:", "if True:"),
}
PROGRAM = """
import importlib, json, sys
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.out.weight = self.into.weight

    def forward(self, x):
        return self.out(self.into(x).tanh())

class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 6)
        self.last.requires_grad_(False)

    def forward(self, x):
        return self.last(self.first(x).tanh())

def plain():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))

def train(model, optimized, x):
    optimizer, seen = torch.optim.SGD(optimized.parameters(), lr=0.5, momentum=0.9), []
    for batch in x:
        optimizer.zero_grad()
        optimized(batch).square().mean().backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.step()
        seen.append({"gradients": gradients, "weights": [p.detach().clone() for p in model.parameters()]})
    return seen

def fault(wrap, make):
    x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = make()
    exact = train(model, model, x)
    torch.manual_seed(rank)  # the ranks begin with weights of their own; those of rank 0 are the exact run's
    model = make()
    try:
        wrapped = wrap(model)
        assert wrapped.module is model  # DDP's name for it
        steps = train(model, wrapped, x[:, rank::2])
    except RuntimeError as error:
        return str(error)
    for step, (mine, theirs) in enumerate(zip(steps, exact)):
        for what in ("gradients", "weights"):
            for a, b in zip(mine[what], theirs[what], strict=True):
                if (a is None) != (b is None) or a is not None and not torch.allclose(a, b, rtol=1e-4, atol=1e-6):
                    return f"{what} of step {step}"

dist.init_process_group("gloo")
rank = dist.get_rank()
sys.path.insert(0, sys.argv[1])
found = {}
for variant in sys.argv[2:]:
    wrap = importlib.import_module(variant).HandMadeDDP
    found[variant] = {make.__name__: fault(wrap, make) for make in (plain, Tied, Frozen)}
print(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """What each of two ranks finds: {variant: {model: None, or what differs first}}."""
    folder = tmp_path_factory.mktemp("hand_made")
    text = written_file(NOTEBOOKS / "05_how_ddp_works.ipynb", "hand_made.py")
    texts = {"hand_made": text}
    for name, (right, wrong) in MISTAKES.items():
        texts[name.replace(" ", "_")] = text.replace(right, wrong)
        assert text.replace(right, wrong) != text, f"the chapter has no line with {right!r}"
    for name, variant in texts.items():
        (folder / f"{name}.py").write_text(variant)
    return reports_of(2, PROGRAM, folder, folder, *texts)


def test_it_trains_as_one_process_with_the_full_batch_also_tied_and_frozen(faults):
    for rank in faults:
        assert rank["hand_made"] == {"plain": None, "Tied": None, "Frozen": None}


@pytest.mark.parametrize("mistake", list(MISTAKES)[:4])
def test_a_mistake_shows_in_the_gradients_of_each_model(faults, mistake):
    """In the first step, on some rank; weights after SGD would pass where they are what is averaged."""
    for model in ("plain", "Tied", "Frozen"):
        assert "gradients of step 0" in [rank[mistake.replace(" ", "_")][model] for rank in faults]


def test_a_hook_on_a_frozen_weight_is_refused(faults):
    for rank in faults:
        found = rank["takes_all_weights_for_trained"]
        assert found["plain"] is found["Tied"] is None
        assert "doesn't require gradient" in found["Frozen"]
