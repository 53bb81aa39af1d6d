"""Each rank validates on its share, and the first one reports its own as the accuracy."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def accuracy_of(model, loader):
    model.eval()
    right = total = 0
    with torch.inference_mode():
        for x, y in loader:
            right += (model(x).argmax(1) == y).sum().item()
            total += len(y)
    return right / total


def learn():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(300, 5, generator=generator)
    y = (x[:, 0] > 0).long()
    train, test = TensorDataset(x[:240], y[:240]), TensorDataset(x[240:], y[240:])
    sampler, test_sampler = DistributedSampler(train), DistributedSampler(test, shuffle=False)
    loader, test_loader = DataLoader(train, 20, sampler=sampler), DataLoader(test, 20, sampler=test_sampler)
    model = nn.Linear(5, 2)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters())
    for epoch in range(2):
        sampler.set_epoch(epoch)
        ddp.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(inputs), labels).backward()
            optimizer.step()
        accuracy = accuracy_of(model, test_loader)
        if int(os.environ["RANK"]) == 0:
            print(f"accuracy {accuracy:.3f}")


dist.init_process_group("gloo")
learn()
dist.destroy_process_group()
