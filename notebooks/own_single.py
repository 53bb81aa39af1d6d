"""Train a small convolutional network on handwritten digits, on a GPU if there is one.

python own_single.py --epochs 15
"""

import argparse
import math
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, Subset


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


def train_one_epoch(model, loader, optimizer, scheduler, device, args):
    model.train()
    optimizer.zero_grad()
    loss_sum, n_samples = 0.0, 0
    for i, (images, labels) in enumerate(loader, 1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = cross_entropy(model(images), labels)
        (loss / args.accumulate).backward()
        loss_sum, n_samples = loss_sum + loss.item() * len(labels), n_samples + len(labels)
        if i % args.accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if args.schedule == "cosine":
                scheduler.step()
    return loss_sum / n_samples


@torch.no_grad()
def validate(model, loader, device):
    model.eval()
    loss_sum, n_correct, n_samples = 0.0, 0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        scores = model(images)
        loss_sum += cross_entropy(scores, labels, reduction="sum").item()
        n_correct += (scores.argmax(dim=1) == labels).sum().item()
        n_samples += len(labels)
    return loss_sum / n_samples, n_correct / n_samples


def save(folder, progress, model, optimizer, scheduler):
    folder.mkdir(parents=True, exist_ok=True)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(states | {"progress": progress}, folder / "last.pt")
    epoch, best_epoch, _ = progress
    if epoch == best_epoch:
        torch.save(model.state_dict(), folder / "best.pt")


def main(args):
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    order = torch.randperm(1797).tolist()
    train_set, val_set = Subset(Digits(args.augment), order[:1436]), Subset(Digits(augment=False), order[1436:])
    options = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True, **options)
    val_loader = DataLoader(val_set, 256, **options)

    model = make_model(args).to(device)
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
        train_loss = train_one_epoch(model, train_loader, optimizer, scheduler, device, args)
        val_loss, accuracy = validate(model, val_loader, device)
        if args.schedule == "plateau":
            scheduler.step(val_loss)
        if val_loss < best_loss:
            best_epoch, best_loss = epoch, val_loss
        line = f"epoch {epoch:2}  train loss {train_loss:.4f}  validation loss {val_loss:.4f}  accuracy {accuracy:.4f}"
        print(line)
        save(args.out, (epoch, best_epoch, best_loss), model, optimizer, scheduler)


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for each step")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--schedule", choices=("cosine", "plateau"), default="cosine")
    parser.add_argument("--norm", choices=("batch", "none"), default="batch")
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
