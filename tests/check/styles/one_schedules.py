"""The first rank logs, saves, and, by a slip of the indentation, steps the schedule."""

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class Config:
    epochs, batch_size, lr = 3, 25, 0.05


def run(config):
    rank = dist.get_rank()
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    model = nn.parallel.DistributedDataParallel(nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, config.batch_size, sampler=sampler)
    for epoch in range(config.epochs):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            loss = (model(inputs) - targets).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if rank == 0:
            print(f"epoch {epoch}: {loss.item():.4f}")
            torch.save(model.module.state_dict(), "last.pt")
            scheduler.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run(Config())
    dist.destroy_process_group()
