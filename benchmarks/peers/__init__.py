"""The same training as `ddp_sample.py`'s, as others write it: the same model, files, global batch and epochs."""

import argparse
import json
import os
import time
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
import torch.distributed.nn.functional  # before any process group: else a gloo rank may abort at its end
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ddp_tutorial.data import NpyDataset, load_splits
from ddp_tutorial.model import ScaleInputs, SimpleModel

MOMENTUM = 0.9


class DatasetKind(StrEnum):
    """How a program reads the data; the values are those of --dataset."""

    PER_SAMPLE = "per-sample"  # two tensors for each sample
    TENSOR = "tensor"  # a TensorDataset: an index for each sample
    GATHER = "gather"  # the scripts' Dataset: a gather for each batch


class PerSampleDataset(Dataset):
    """What public tutorials write: the arrays in memory, two small tensors for each sample."""

    def __init__(self, X_path: Path, y_path: Path):
        self.X, self.y = np.load(X_path, allow_pickle=False), np.load(y_path, allow_pickle=False)

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.X[index]), torch.tensor(self.y[index])


def parse_args() -> argparse.Namespace:
    """The flags that all peers share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder of history.jsonl")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=256, help="over all ranks")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of all but the hand-written programs")
    parser.add_argument("--dataset", choices=list(DatasetKind), default=DatasetKind.PER_SAMPLE)
    return parser.parse_args()


def datasets(args: argparse.Namespace) -> tuple[list[Dataset], dict]:
    """The training and the validation set of the kind that is asked for, and what their loaders need."""
    paths = [(args.data_dir / f"X_{split}.npy", args.data_dir / f"y_{split}.npy") for split in ("train", "val")]
    if args.dataset == DatasetKind.GATHER:
        return [NpyDataset(*pair) for pair in paths], {"collate_fn": NpyDataset.collate}
    if args.dataset == DatasetKind.TENSOR:
        return [TensorDataset(*(torch.from_numpy(np.load(path)) for path in pair)) for pair in paths], {}
    return [PerSampleDataset(*pair) for pair in paths], {}


def loaders(args: argparse.Namespace, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """The loaders of one process, for a framework to share out over the ranks."""
    (train_set, val_set), options = datasets(args)
    train_loader = DataLoader(train_set, batch_size, shuffle=True, drop_last=True, **options)
    return train_loader, DataLoader(val_set, 1024, **options)


def new_model(args: argparse.Namespace) -> nn.Module:
    """The model that `ddp_sample.py` starts with, to the last bit."""
    train_set, _ = load_splits(args.data_dir)
    torch.manual_seed(args.seed)
    return nn.Sequential(
        ScaleInputs(train_set.mean, train_set.std), SimpleModel(train_set.n_features, train_set.n_classes)
    )


def sums_of(log_p: Tensor, y: Tensor) -> Tensor:
    """Of a batch: the summed loss (nats), the number of correct predictions, the number of samples. (3,) float64."""
    loss_sum = nll_loss(log_p.double(), y, reduction="sum")
    return torch.stack((loss_sum, (log_p.argmax(dim=1) == y).sum(), loss_sum.new_tensor(len(y)))).double()


class History:
    """Times the epochs, and writes `history.jsonl` at the end of the last one, on the first rank."""

    def __init__(self, args: argparse.Namespace):
        self.path, self.lines = args.out / "history.jsonl", []

    def start_epoch(self) -> None:
        self.start = time.perf_counter()

    def end_epoch(self, sums: Tensor) -> None:
        """`sums` (3,) are those of the whole validation set, as `sums_of` returns them for a batch."""
        seconds = time.perf_counter() - self.start
        loss, correct, n = sums.tolist()
        self.lines.append({"val_loss": loss / n, "val_accuracy": correct / n, "seconds": seconds})

    def write(self) -> None:
        if os.environ.get("RANK", "0") == "0":
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
