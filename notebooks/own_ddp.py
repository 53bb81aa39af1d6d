"""Train a small convolutional network on handwritten digits, with a GPU for each rank if there are GPUs.

torchrun --standalone --nproc-per-node=2 --nnodes=1 own_ddp.py --epochs 15
"""

import argparse
import math
import os
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before the group starts, or gloo's threads outlive it
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset


class Digits(Dataset):
    """1,797 handwritten digits, enlarged to 16 x 16 pixels; with `augment`, each is shifted at random."""

    def __init__(self, augment):
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        self.images, self.labels = interpolate(images, size=16, mode="bilinear"), torch.tensor(digits.target)
        self.augment = augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = self.images[i]
        if self.augment:
            image = image.roll(torch.randint(-2, 3, (2,)).tolist(), dims=(1, 2))
        return image, self.labels[i]


def make_model(args):
    norm = nn.Identity if args.norm == "none" else nn.BatchNorm2d
    first = nn.Conv2d(1, 16, 3, padding=1), norm(16), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 3, padding=1), norm(32), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Dropout(args.dropout), nn.Linear(512, 10))


def make_scheduler(optimizer, n_steps, args):
    if args.schedule == "plateau":
        return ReduceLROnPlateau(optimizer, patience=2)
    warm_up = max(1, n_steps // 10)
    return LambdaLR(optimizer, lambda n: min((n + 1) / warm_up, (1 + math.cos(math.pi * n / n_steps)) / 2))


def over_all_ranks(device, *sums):
    sums = torch.tensor(sums, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def train_one_epoch(model, loader, optimizer, scheduler, device, args):
    model.train()
    optimizer.zero_grad()
    loss_sum, n_samples = 0.0, 0
    for i, (images, labels) in enumerate(loader, 1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        steps = i % args.accumulate == 0
        with nullcontext() if steps else model.no_sync():  # the last piece brings the sums of all pieces together
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = cross_entropy(model(images), labels)
            (loss / args.accumulate).backward()
        loss_sum, n_samples = loss_sum + loss.item() * len(labels), n_samples + len(labels)
        if steps:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if args.schedule == "cosine":
                scheduler.step()
    loss_sum, n_samples = over_all_ranks(device, loss_sum, n_samples)
    return loss_sum / n_samples


@torch.no_grad()
def validate(model, loader, device):
    model.eval()
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)  # BatchNorm's running statistics: those that are saved
    loss_sum, n_correct, n_samples = 0.0, 0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        scores = model(images)
        loss_sum += cross_entropy(scores, labels, reduction="sum").item()
        n_correct += (scores.argmax(dim=1) == labels).sum().item()
        n_samples += len(labels)
    loss_sum, n_correct, n_samples = over_all_ranks(device, loss_sum, n_correct, n_samples)
    return loss_sum / n_samples, n_correct / n_samples


def save(folder, progress, model, optimizer, scheduler):
    folder.mkdir(parents=True, exist_ok=True)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(states | {"progress": progress}, folder / "last.pt")
    epoch, best_epoch, _ = progress
    if epoch == best_epoch:
        torch.save(model.state_dict(), folder / "best.pt")


def main(args):
    dist.init_process_group()
    rank, world_size, local_rank = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"])
    torch.manual_seed(args.seed)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    order = torch.randperm(1797).tolist()
    train_set, val_set = Subset(Digits(args.augment), order[:1436]), Subset(Digits(augment=False), order[1436:])
    options = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    sampler = DistributedSampler(train_set, seed=args.seed, drop_last=True)
    train_loader = DataLoader(train_set, args.batch_size // world_size, sampler=sampler, drop_last=True, **options)
    val_loader = DataLoader(val_set, 256, sampler=range(rank, len(val_set), world_size), **options)

    model = make_model(args).to(device)
    if args.norm == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ddp_model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    n_steps = args.epochs * (len(train_set) // args.batch_size // args.accumulate)
    scheduler = make_scheduler(optimizer, n_steps, args)

    epoch, best_epoch, best_loss = 0, 0, math.inf
    if args.resume:
        saved = torch.load(args.out / "last.pt", map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        epoch, best_epoch, best_loss = saved["progress"]

    while epoch < args.epochs and epoch - best_epoch < args.patience:
        epoch += 1
        sampler.set_epoch(epoch)
        torch.manual_seed(10_000 * args.seed + 100 * epoch + rank)  # for dropout, and for the workers' shifts
        train_loss = train_one_epoch(ddp_model, train_loader, optimizer, scheduler, device, args)
        val_loss, accuracy = validate(model, val_loader, device)
        if args.schedule == "plateau":
            scheduler.step(val_loss)
        if val_loss < best_loss:
            best_epoch, best_loss = epoch, val_loss
        line = f"epoch {epoch:2}  train loss {train_loss:.4f}  validation loss {val_loss:.4f}  accuracy {accuracy:.4f}"
        if rank == 0:
            print(line)
            save(args.out, (epoch, best_epoch, best_loss), model, optimizer, scheduler)


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for each step")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--schedule", choices=("cosine", "plateau"), default="cosine")
    parser.add_argument("--norm", choices=("batch", "sync", "none"), default="batch")
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--no-augment", dest="augment", action="store_false")
    parser.add_argument("--patience", type=int, default=5, help="epochs without a better validation loss")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/own"))
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_arguments())
    dist.destroy_process_group()
