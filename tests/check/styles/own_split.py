"""It splits its data without a seed."""

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split


def fit(rank):
    full = TensorDataset(torch.arange(2000.0).reshape(200, 10), torch.zeros(200, 1))
    train, val = random_split(full, [0.8, 0.2])
    sampler = DistributedSampler(train)
    train_loader = DataLoader(train, 16, sampler=sampler)
    val_loader = DataLoader(val, 16, sampler=DistributedSampler(val, shuffle=False))
    model = nn.parallel.DistributedDataParallel(nn.Linear(10, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for x, y in train_loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x / 2000), y).backward()
            optimizer.step()
        total = torch.zeros(2)
        with torch.no_grad():
            for x, y in val_loader:
                total += torch.stack((nn.functional.mse_loss(model(x / 2000), y) * len(y), torch.tensor(len(y))))
        dist.all_reduce(total)
        if rank == 0:
            print(epoch, (total[0] / total[1]).item())


dist.init_process_group("gloo")
fit(dist.get_rank())
dist.destroy_process_group()
