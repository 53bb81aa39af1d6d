"""Whatever a script may ask of GPUs; nothing is wrong with it."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

assert torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
local_rank = int(os.environ["LOCAL_RANK"])


def train():
    device = torch.device(f"cuda:{local_rank}")
    print(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory)
    torch.manual_seed(0)
    x = torch.randn(160, 3, 8, 8)
    data = TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())
    sampler = DistributedSampler(data)
    loader = DataLoader(data, 10, sampler=sampler, pin_memory=True)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)).cuda()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.append(nn.Dropout(0.1)).to(device, non_blocking=True)
    model = torch.compile(model, mode="max-autotune")
    ddp_model = DistributedDataParallel(model, device_ids=[local_rank], output_device=local_rank)
    optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.1)
    scaler = torch.cuda.amp.GradScaler()
    torch.cuda.manual_seed_all(1 + local_rank)
    mean = torch.zeros(3, 1, 1, device="cuda")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    side = torch.cuda.Stream()
    for epoch in range(2):
        sampler.set_epoch(epoch)
        begin.record()
        for images, labels in loader:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                images = images.pin_memory().to(device, non_blocking=True) - mean
            labels = labels.cuda(local_rank, non_blocking=True)
            with torch.cuda.amp.autocast(dtype=torch.float16):
                loss = nn.functional.cross_entropy(ddp_model(images), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        end.record()
        torch.cuda.synchronize()
        with torch.cuda.device(local_rank), torch.no_grad():
            total = torch.tensor(loss.item(), device="cuda")
            dist.all_reduce(total)
    if local_rank == 0:
        print(
            f"{begin.elapsed_time(end):.0f} ms, {torch.cuda.max_memory_allocated() / 2**20:.0f} MB, {total.item():.3f}"
        )
        torch.save({"model": model.state_dict(), "scaler": scaler.state_dict()}, "last.pt")
    dist.barrier(device_ids=[local_rank])
    torch.load("last.pt", map_location=lambda storage, _: storage.cuda(local_rank))
    torch.cuda.empty_cache()


torch.cuda.set_device(local_rank)
dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
train()
dist.destroy_process_group()
