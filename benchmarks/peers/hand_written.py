"""A DDP script as public tutorials write it; `--dataset tensor` is the same with a TensorDataset."""

import os
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.functional import nll_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.peers import MOMENTUM, History, datasets, new_model, parse_args, sums_of


def train(args: Namespace, rank: int, world_size: int) -> None:
    """All epochs, with the validation after each, on this rank."""
    (train_set, val_set), options = datasets(args)
    train_sampler = DistributedSampler(train_set, world_size, rank, seed=args.seed, drop_last=True)
    val_sampler = range(rank, len(val_set), world_size)
    train_loader = DataLoader(
        train_set, args.batch_size // world_size, sampler=train_sampler, drop_last=True, **options
    )
    val_loader = DataLoader(val_set, 1024, sampler=val_sampler, **options)

    model = new_model(args)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=MOMENTUM)
    ddp_model = DistributedDataParallel(model) if world_size > 1 else model

    history = History(args)
    for epoch in range(args.epochs):
        history.start_epoch()
        train_sampler.set_epoch(epoch)
        ddp_model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = nll_loss(ddp_model(x), y)
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            sums = sum(sums_of(model(x), y) for x, y in val_loader)
        if world_size > 1:
            dist.all_reduce(sums)
        history.end_epoch(sums)
    history.write()


def run(train: Callable[[Namespace, int, int], None]) -> None:
    """`train` with the flags, the rank and the number of ranks; on several ranks between the group's start and end."""
    args = parse_args()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("gloo")
    train(args, rank, world_size)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(train)
