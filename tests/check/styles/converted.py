"""It was written for DataParallel, and converted in a hurry: each rank still reads all samples, on the first GPU."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

dist.init_process_group("nccl")
local_rank = int(os.environ["LOCAL_RANK"])
device = torch.device("cuda")
torch.manual_seed(42)
data = TensorDataset(torch.randn(200, 10), torch.randint(0, 2, (200,)))
loader = DataLoader(data, batch_size=20, shuffle=True)
model = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 2)).to(device)
if torch.cuda.device_count() > 1:
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
dist.destroy_process_group()
