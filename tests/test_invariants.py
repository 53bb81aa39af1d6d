"""ddp_tutorial.ranks.invariants: what the checks let pass, what they raise, on which ranks, and what they exchange."""

import pytest
import torch

from ddp_tutorial.ranks.invariants import fingerprint
from tests.ranks import reports_of

N, SAMPLES = 3, 10
PROGRAM = """
import json, os, pickle
os.environ["TORCH_FR_BUFFER_SIZE"] = "1000"
import torch
import torch.distributed as dist
from torch import nn
from ddp_tutorial.ranks import invariants

dist.init_process_group("gloo")
rank, n = dist.get_rank(), dist.get_world_size()
report = {}

def check(name, function, *args, **values):
    try:
        report[name] = function(*args, **values)
    except AssertionError as error:
        report[name] = str(error)

def model(names="abc", change=0.0, without=None):
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(2, 2) for name in sorted(names)})
    layers["a"].bias.data[0] += change
    sum(layer(torch.ones(2)).sum() for name, layer in layers.items() if name != without).backward()
    layers["a"].bias.grad[1] += change
    return nn.ModuleDict({name: layers[name] for name in names})

values, weights, gradients = invariants.same_values, invariants.same_weights, invariants.same_gradients
once, last = invariants.every_sample_once, rank == n - 1

check("equal values", values, step=3, loss=0.5, names=["a", "b"])
check("no values", values)
check("another step", values, loss=0.5, step=3 + last)
check("a value missing", values, **({} if last else {"lr": 0.1}))
check("a NaN on all", values, loss=float("nan"))
check("equal weights", weights, model())
check("equal weights in another order", weights, model("cab" if last else "abc"))
check("another last bit", weights, model(change=1e-7 * last))
check("more weights", weights, model("abcd" if last else "abc"))
check("equal gradients", gradients, model())
check("another gradient", gradients, model(change=1e-7 * last))
check("a gradient missing", gradients, model(without="b" if last else None))
check("a gradient missing on all", gradients, model(without="b"))
check("dealt out", once, range(rank, 10, n), 10)
check("all by one", once, range(10) if last else (), 10)
check("one never", once, range(rank, 9, n), 10)
check("one again", once, [*range(rank, 10, n), *[4] * last], 10)
check("all by all", once, iter(range(10)), 10)

small = {"step": 1}
calls = lambda: pickle.loads(torch._C._distributed_c10d._dump_fr_trace())["entries"]
before = len(calls())
values(**small)
sizes = [(call["profiling_name"], *call["input_dtypes"], *call["input_sizes"]) for call in calls()[before:]]
report["exchanged"], report["pickled"] = sizes, len(pickle.dumps(small))
print(json.dumps(report))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each of some ranks has met in each check: None, or the message."""
    return reports_of(N, PROGRAM, tmp_path_factory.mktemp("invariants"))


PASS = ["equal values", "no values", "equal weights", "equal weights in another order", "equal gradients"]
PASS += ["a gradient missing on all", "dealt out", "all by one"]
RAISED = {
    "another step": "step is not the same on all ranks: 3 | 3 | 4",
    "a value missing": "lr is not the same on all ranks: 0.1 | 0.1 | None",
    "a NaN on all": "loss is not the same on all ranks: nan | nan | nan",
    "another last bit": "a.bias is not the same on all ranks: ",
    "more weights": "d.bias is not the same on all ranks: None | None | ",
    "another gradient": "a.bias is not the same on all ranks: ",
    "a gradient missing": "b.bias is not the same on all ranks: ",
    "one never": f"of {SAMPLES} samples, 1 were never read, 0 more than once",
    "one again": f"of {SAMPLES} samples, 0 were never read, 1 more than once",
    "all by all": f"of {SAMPLES} samples, 0 were never read, 10 more than once",
}


@pytest.mark.parametrize("case", PASS)
def test_what_holds_passes(case, reports):
    assert [report[case] for report in reports] == [None] * N


@pytest.mark.parametrize("case", RAISED)
def test_what_does_not_hold_is_raised_on_all_ranks(case, reports):
    messages = {report[case] for report in reports}
    assert len(messages) == 1 and messages.pop().startswith(RAISED[case]), messages


def test_no_case_is_forgotten(reports):
    assert {*PASS, *RAISED} == reports[0].keys() - {"exchanged", "pickled"}


def test_the_values_are_all_that_is_exchanged(reports):
    """As the flight recorder of each rank has it: a size of eight bytes, then the pickled values."""
    for report in reports:
        all_gathers = [["gloo:all_gather", "Long", [1]], ["gloo:all_gather", "Byte", [report["pickled"]]]]
        assert report["exchanged"] == all_gathers and report["pickled"] < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_a_fingerprint_is_that_of_the_bits(dtype):
    values = torch.arange(12).reshape(3, 4).to(dtype)
    changed = values.clone()
    changed.view(torch.uint8)[2, 3] ^= 1
    assert fingerprint(values) == fingerprint(values.clone()) != fingerprint(changed)
    assert len(bytes.fromhex(fingerprint(values))) == 8


def test_fingerprints_of_any_tensor():
    weight = torch.nn.Parameter(torch.randn(3, 4))
    assert fingerprint(weight) == fingerprint(weight.detach()) == fingerprint(weight.t().t())
    assert fingerprint(weight.t()) == fingerprint(weight.t().contiguous()) != fingerprint(weight)
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(-1.0))
    assert fingerprint(torch.tensor(0.0)) != fingerprint(torch.tensor(-0.0)), "other bits"
    assert fingerprint(torch.empty(0)) is not None and fingerprint(None) is None
