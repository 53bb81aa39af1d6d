"""A trainer class; the script starts its ranks itself. It forgets set_epoch."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def ddp_setup(rank, world_size, port):
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = str(port)
    dist.init_process_group(backend="gloo", rank=rank, world_size=world_size)


class Trainer:
    def __init__(self, model, train_data, optimizer, rank, save_every):
        self.rank, self.train_data, self.optimizer, self.save_every = rank, train_data, optimizer, save_every
        self.model = DDP(model)

    def _run_batch(self, source, targets):
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(source), targets)
        loss.backward()
        self.optimizer.step()

    def _run_epoch(self, epoch):
        for source, targets in self.train_data:
            self._run_batch(source, targets)

    def _save_checkpoint(self, epoch):
        torch.save(self.model.module.state_dict(), "checkpoint.pt")

    def train(self, max_epochs):
        for epoch in range(max_epochs):
            self._run_epoch(epoch)
            if self.rank == 0 and epoch % self.save_every == 0:
                self._save_checkpoint(epoch)


def load_train_objs():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(256, 20, generator=generator), torch.rand(256, 1, generator=generator))
    model = nn.Linear(20, 1)
    return data, model, torch.optim.SGD(model.parameters(), lr=1e-3)


def main(rank, world_size, port):
    ddp_setup(rank, world_size, port)
    data, model, optimizer = load_train_objs()
    loader = DataLoader(data, batch_size=32, shuffle=False, sampler=DistributedSampler(data))
    Trainer(model, loader, optimizer, rank, save_every=1).train(2)
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.create_server(("localhost", 0)) as free:
        free_port = free.getsockname()[1]
    mp.spawn(main, args=(2, free_port), nprocs=2)
