"""Loaders as people make them: anew for each epoch, of streams that know no length, read by all and dealt by batch."""

from tests.check.doctor import check_text, has, short
from tests.check.planted import line_with

SCRIPT = """
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset


class Stream(IterableDataset):
    def __iter__(self):
        for i in range(80):
            yield torch.full((3,), i / 80)

    def __len__(self):
        raise ValueError("a stream has no length")


def main(rank, world_size):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(160, 3))
    sampler = DistributedSampler(data)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    EPOCHS


dist.init_process_group("gloo")
main(dist.get_rank(), dist.get_world_size())
dist.destroy_process_group()
"""
TRAIN = """\
optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
"""
OTHER_ORDER, OWN_SAMPLES = "each epoch has another order", "each rank reads its own samples"


def script(epochs: str) -> str:
    return SCRIPT.replace("EPOCHS", epochs.replace("TRAIN", TRAIN))


ANEW = script("""for epoch in range(2):
        for (x,) in DataLoader(data, 4, sampler=sampler):
            TRAIN""")
DEALT_BY_BATCH = script("""loader = DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    for epoch in range(2):
        for i, (x,) in enumerate(loader):
            if i % world_size != rank:
                continue
            TRAIN""")
STREAM = script("""loader = DataLoader(Stream(), 4)
    for epoch in range(2):
        for i, x in enumerate(loader):
            if i % world_size != rank:
                continue
            TRAIN""")
TRIALS = script("""for trial in range(2):
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for (x,) in DataLoader(data, 4, sampler=sampler):
            TRAIN""")


def test_a_loader_that_is_made_anew_for_each_epoch_is_one(tmp_path):
    """And its epoch is not cut: 20 batches are less than four times eight."""
    report = check_text(tmp_path, ANEW)
    assert has(report, "BROKEN", OTHER_ORDER, line_with(ANEW, "in DataLoader(data")), short(report)
    assert (report["steps"], report["epochs"]) == (40, 2)


def test_with_set_epoch_nothing_is_found(tmp_path):
    report = check_text(tmp_path, ANEW.replace("(2):\n", "(2):\n        sampler.set_epoch(epoch)\n", 1))
    assert short(report) == [] and {"rule": OTHER_ORDER, "seen": "2 epochs"} in report["holds"]


def test_an_epoch_of_another_training_may_have_the_same_order(tmp_path):
    """Each trial trains a model of its own on the same samples."""
    report = check_text(tmp_path, TRIALS)
    assert short(report) == [] and OTHER_ORDER in report["not_seen"]


def test_batches_that_are_read_by_all_and_dealt_out_are_not_blamed(tmp_path):
    report = check_text(tmp_path, DEALT_BY_BATCH)
    assert short(report) == [] and OWN_SAMPLES in report["not_seen"]


def test_batches_that_are_dealt_to_all_alike_are_suspect(tmp_path):
    report = check_text(tmp_path, DEALT_BY_BATCH.replace("!= rank", "!= 0"))
    assert short(report, "BROKEN") == [] and has(report, "SUSPECT", OWN_SAMPLES), short(report)


def test_a_stream_whose_length_raises_runs_as_without_the_doctor(tmp_path):
    """Its batches are dealt out, too."""
    report = check_text(tmp_path, STREAM)
    assert report["exit_codes"] == [0, 0] and short(report) == []
