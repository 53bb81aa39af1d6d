"""ddp_tutorial.ranks.exchange between real ranks: what it returns, and which way it goes."""

import pytest

from tests.ranks import reports_of

PROGRAM = """
import json, os, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from ddp_tutorial.ranks import exchange

dist.init_process_group("gloo", timeout=timedelta(seconds=30))  # for calls that do not meet
rank, n = dist.get_rank(), dist.get_world_size()
calls = []
for function in ("all_reduce", "all_gather", "send", "isend"):
    def count(*args, function=function, call=getattr(dist, function), **options):
        calls.append(function)
        return call(*args, **options)
    setattr(dist, function, count)

def gathered():
    found = []
    for values in (torch.tensor(rank == 1), torch.arange(6.0).reshape(2, 3) + rank, torch.full((3,), rank)):
        rows = exchange.all_gather(values)
        assert rows.dtype == values.dtype
        found.append(rows.tolist())
    return found

def average(width, hook):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 40), nn.Tanh(), nn.Linear(40, 3))
    ddp_model = DistributedDataParallel(model)
    if hook:
        ddp_model.register_comm_hook(None, hook)
    torch.manual_seed(1 + rank)
    for _ in range(3):  # DDP makes its buckets anew after the first
        model.zero_grad()
        ddp_model(torch.randn(8, width)).square().mean().backward()
    return [p.grad for p in model.parameters()]

def largest_difference(width):
    pairs = zip(average(width, exchange.average_gradients), average(width, None), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

def bits(width):
    flat = torch.cat([g.flatten() for g in average(width, exchange.average_gradients)])
    rows = [torch.empty_like(flat) for _ in range(n)]
    dist.all_gather(rows, flat)
    return all(torch.equal(rows[0], row) for row in rows)

def repeats(prepare):
    # whether a step of a run, its first and its third, has gradients of the same bits: two megabytes of them
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20_000), nn.Tanh(), nn.Linear(20_000, 4))
    ddp_model = DistributedDataParallel(model)
    prepare(ddp_model)
    torch.manual_seed(1 + rank)
    x, steps = torch.randn(8, 20), []
    for _ in range(3):
        model.zero_grad()
        ddp_model(x).square().mean().backward()
        steps.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.equal(steps[0], steps[2])

report = {"gathered": gathered(), "by": sorted(set(calls))}
for size, width in (("small", 20), ("large", 5000)):
    calls.clear()
    report[size], report[f"{size} by"] = largest_difference(width), sorted(set(calls))
report["small bits"], report["large bits"] = bits(20), bits(5000)
report["repeats"] = repeats(lambda ddp_model: exchange.prepare_exchange(ddp_model, torch.zeros(1, 20)))
unprepared = lambda ddp_model: ddp_model.register_comm_hook(None, exchange.average_gradients)
report["repeats unprepared"] = repeats(unprepared)
group = dist.new_group([n - 2, n - 1])  # the last two
if rank >= n - 2:
    model = DistributedDataParallel(nn.Linear(1, 1, bias=False), process_group=group)
    exchange.prepare_exchange(model, torch.zeros(1, 1))
    model(torch.full((1, 1), float(rank))).sum().backward()
    report["of a group"] = model.module.weight.grad.item()
exchange.FEW_RANKS = 1
calls.clear()
report["gathered by the ring"], report["ring by"] = gathered(), sorted(set(calls))
print(json.dumps(report))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module", params=[2, 3, 4])
def reports(request, tmp_path_factory):
    """What each of some ranks finds."""
    return reports_of(request.param, PROGRAM, tmp_path_factory.mktemp("exchange"))


def test_all_gather_stacks_the_ranks(reports):
    n = len(reports)
    expected = [
        [rank == 1 for rank in range(n)],
        [[[rank + 3.0 * row + column for column in range(3)] for row in range(2)] for rank in range(n)],
        [[rank] * 3 for rank in range(n)],
    ]
    for report in reports:
        assert report["gathered"] == report["gathered by the ring"] == expected


def test_few_numbers_go_through_the_first_rank_and_many_round_the_ring(reports):
    through_first_rank = [["isend"]] + [["send"]] * (len(reports) - 1)
    assert [report["by"] for report in reports] == through_first_rank
    assert [report["small by"] for report in reports] == through_first_rank
    assert all(report["large by"] == ["all_reduce"] for report in reports)


def test_the_mean_of_a_group_is_that_of_its_ranks(reports):
    n = len(reports)
    assert [report.get("of a group") for report in reports] == [None] * (n - 2) + [n - 1.5] * 2


def test_many_ranks_use_the_ring(reports):
    assert all(report["ring by"] == ["all_gather"] for report in reports)


def test_the_mean_is_that_of_an_all_reduce(reports):
    for report in reports:
        assert report["small"] < 1e-6  # float32 sums of up to four numbers, in another order
        assert report["large"] < 1e-6


def test_every_rank_has_the_same_bits(reports):
    assert all(report["small bits"] and report["large bits"] for report in reports)


def test_a_prepared_model_adds_in_one_order_from_its_first_step(reports):
    """So a run that goes on, whose first step is the uninterrupted one's hundredth, has its bits."""
    assert all(report["repeats"] for report in reports)
    if len(reports) > 2:  # two numbers have one order
        assert not any(report["repeats unprepared"] for report in reports)
