"""The limit: everything in memory (or on the GPU), a loop over indices, no DataLoader, no checks."""

from argparse import Namespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import nll_loss
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers import MOMENTUM, History, new_model, sums_of
from benchmarks.peers.hand_written import run


def train(args: Namespace, rank: int, world_size: int) -> None:
    """All epochs, with the validation after each, on this rank."""
    names = ("X_train", "y_train", "X_val", "y_val")
    X, y, X_val, y_val = (torch.from_numpy(np.load(args.data_dir / f"{name}.npy")).to(args.device) for name in names)
    X_val, y_val = X_val[rank::world_size], y_val[rank::world_size]
    batch_size = args.batch_size // world_size
    model = new_model(args).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=MOMENTUM)
    ddp_model = DistributedDataParallel(model) if world_size > 1 else model
    history = History(args)
    generator = torch.Generator().manual_seed(args.seed)  # all ranks draw the same order
    for _ in range(args.epochs):
        history.start_epoch()
        rows = torch.randperm(len(X), generator=generator)[rank::world_size].to(args.device)
        for index in rows[: len(rows) // batch_size * batch_size].split(batch_size):
            loss = nll_loss(ddp_model(X.index_select(0, index)), y.index_select(0, index))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            sums = sums_of(model(X_val), y_val)
        if world_size > 1:
            dist.all_reduce(sums)
        history.end_epoch(sums)
    history.write()


if __name__ == "__main__":
    run(train)
