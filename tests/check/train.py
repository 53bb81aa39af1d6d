"""A clean DDP script, in which the tests plant faults: noisy samples of three classes, a small model with dropout."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, random_split

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Noisy(Dataset):
    """Samples that get other noise each time they are read."""

    def __init__(self, n):
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(n) % 3
        self.x = torch.randn(n, 8, generator=generator) + self.y[:, None]

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(8), self.y[index]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.drop(self.body(x).relu()))


def validate(model, loader):
    model.eval()
    sums = torch.zeros(2)
    with torch.no_grad():
        for x, y in loader:
            sums += torch.stack(((model(x).argmax(1) == y).sum(), torch.tensor(len(y))))
    dist.all_reduce(sums)
    model.train()
    return (sums[0] / sums[1]).item()


def train():
    data = Noisy(201)
    train_set, val_set = random_split(data, [160, 41], generator=torch.Generator().manual_seed(0))
    sampler = DistributedSampler(train_set)
    train_loader = DataLoader(train_set, 10, sampler=sampler)
    val_loader = DataLoader(val_set, 10, sampler=range(rank, len(val_set), world_size))
    torch.manual_seed(0)
    model = Model()
    ddp_model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    torch.manual_seed(1 + rank)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for _step, (x, y) in enumerate(train_loader):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(ddp_model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        scheduler.step()
        accuracy = validate(model, val_loader)
    if rank == 0:
        print(f"accuracy {accuracy:.2f}")
        torch.save(model.state_dict(), "model.pt")


def main():
    dist.init_process_group("gloo")
    train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
