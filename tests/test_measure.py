"""ddp_tutorial.ranks.measure between real ranks: what a step exchanges, and whose time counts."""

import json

import pytest

from ddp_tutorial.show.timing import trace_spans
from tests.ranks import reports_of

PROGRAM = """
import json, time
import torch
import torch.distributed as dist
from ddp_tutorial.ranks import measure
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

dist.init_process_group("gloo")
rank = dist.get_rank()
groups = {n: dist.new_group(range(n)) for n in (1, 2)}
report, sent = {}, []

def count(_, bucket):
    sent.append(bucket.buffer().nbytes)
    return allreduce_hook(None, bucket)

for every in (1, 3):
    step = measure.training_step((6, 5, 4), 8, groups[2], count, every=every)
    sent.clear()
    step()
    report[f"every {every}"] = sum(sent)
buckets = {}
measure.training_step((6, 5, 4), 8, groups[2], measure.silent(buckets), bucket_cap_mb=0.0001)
report["buckets"] = buckets

added = []
note = lambda tensor, group: added.append([tensor.nbytes, tensor.dtype.itemsize])
all_reduce, dist.all_reduce = dist.all_reduce, note
measure.all_reduces([8, 400], groups[2], step=lambda: added.append("step"))()
dist.all_reduce, report["added"] = all_reduce, added

calls = []
late = measure.Measurement({"name": "late"}, groups[2], lambda: (calls.append(1), time.sleep(0.05 * rank)), 2)
alone = measure.Measurement({"name": "alone"}, groups[1], None if rank else lambda: calls.append(1), 3)
report["results"], report["calls"] = measure.take_turns([late, alone], rounds=2), len(calls)
print(json.dumps(report))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each of two ranks finds."""
    return reports_of(2, PROGRAM, tmp_path_factory.mktemp("measure"))


N_BYTES = 4 * (6 * 5 + 5 + 5 * 4 + 4)


def test_a_step_sends_its_gradients_once_however_many_batches_it_has(reports):
    for report in reports:
        assert report["every 1"] == report["every 3"] == N_BYTES


def test_a_silent_step_knows_the_bytes_of_each_bucket(reports):
    for report in reports:
        assert len(report["buckets"]) > 1 and sum(report["buckets"].values()) == N_BYTES


def test_all_reduces_follow_a_step_and_have_so_many_bytes(reports):
    assert all(report["added"] == ["step", [8, 4], [400, 4]] for report in reports)


def test_the_slowest_rank_counts_and_all_ranks_know_its_time(reports):
    first, second = (report["results"] for report in reports)
    assert first == second and [result["name"] for result in first] == ["late", "alone"]
    assert all(len(result["seconds"]) == 2 for result in first)
    assert min(first[0]["seconds"]) >= 0.05  # of one call, on the late rank
    assert [report["calls"] for report in reports] == [2 * (2 + 3), 2 * 2]


def test_spans_of_a_trace_count_from_an_event(tmp_path):
    events = [("step", 50, 30), ("b2", 70, 5), ("b1", 60, 2), ("c", 0, 1)]
    events = [{"ph": "X", "name": name, "ts": 1000 * ts, "dur": 1000 * length} for name, ts, length in events]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "b0"}, *events]}))
    spans = trace_spans(tmp_path / "trace.json", since="step")
    assert spans("b") == [(10, 12), (20, 25)] and spans("c") == [(-50, -49)] and spans("d") == []
