"""Flags for everything, NCCL, one GPU for each rank; the way of an old launcher. Every rank saves the checkpoint."""

import argparse

import torch
import torch.backends.cudnn as cudnn
import torch.distributed as dist
import torch.nn as nn
import torch.utils.data

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", default=2, type=int)
parser.add_argument("-b", "--batch-size", default=16, type=int)
parser.add_argument("--lr", default=0.1, type=float)
parser.add_argument("--local-rank", default=-1, type=int)
parser.add_argument("--world-size", default=2, type=int)
parser.add_argument("--dist-url", default="tcp://224.66.41.62:23456", type=str)
parser.add_argument("--dist-backend", default="nccl", type=str)
best_acc1 = 0.0


class AverageMeter:
    def __init__(self):
        self.sum = self.count = 0.0

    def update(self, value, n):
        self.sum += float(value) * n
        self.count += n

    def all_reduce(self):
        total = torch.tensor([self.sum, self.count], device="cuda")
        dist.all_reduce(total, dist.ReduceOp.SUM, async_op=False)
        self.sum, self.count = total.tolist()


def main():
    args = parser.parse_args()
    dist.init_process_group(
        args.dist_backend, init_method=args.dist_url, world_size=args.world_size, rank=args.local_rank
    )
    main_worker(args.local_rank, args)
    dist.destroy_process_group()


def main_worker(gpu, args):
    global best_acc1
    torch.cuda.set_device(gpu)
    cudnn.benchmark = True
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).cuda(
        gpu
    )
    model = nn.parallel.DistributedDataParallel(model, device_ids=[gpu])
    criterion = nn.CrossEntropyLoss().cuda(gpu)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    images = torch.rand(160, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    train_dataset = torch.utils.data.TensorDataset(images[:128], torch.arange(128) % 5)
    val_dataset = torch.utils.data.TensorDataset(images[128:], torch.arange(32) % 5)
    train_sampler = torch.utils.data.distributed.DistributedSampler(train_dataset)
    val_sampler = torch.utils.data.distributed.DistributedSampler(val_dataset, shuffle=False, drop_last=True)
    train_loader = torch.utils.data.DataLoader(
        train_dataset,
        batch_size=args.batch_size,
        shuffle=(train_sampler is None),
        pin_memory=True,
        sampler=train_sampler,
    )
    val_loader = torch.utils.data.DataLoader(
        val_dataset, batch_size=args.batch_size, pin_memory=True, sampler=val_sampler
    )
    for epoch in range(args.epochs):
        train_sampler.set_epoch(epoch)
        model.train()
        for image, target in train_loader:
            image, target = image.cuda(gpu, non_blocking=True), target.cuda(gpu, non_blocking=True)
            with torch.autocast("cuda", dtype=torch.float16):
                loss = criterion(model(image), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        acc1 = validate(val_loader, model, gpu)
        scheduler.step()
        best_acc1 = max(acc1, best_acc1)
        torch.save(
            {"epoch": epoch + 1, "state_dict": model.module.state_dict(), "best": best_acc1}, "checkpoint.pth.tar"
        )


def validate(loader, model, gpu):
    top1 = AverageMeter()
    model.eval()
    with torch.no_grad():
        for image, target in loader:
            image, target = image.cuda(gpu), target.cuda(gpu)
            top1.update((model(image).argmax(1) == target).float().mean(), len(target))
    torch.cuda.synchronize()
    top1.all_reduce()
    return top1.sum / top1.count


if __name__ == "__main__":
    main()
