"""Train SimpleModel on X_train.npy, y_train.npy, X_val.npy and y_val.npy.

python single_sample.py --data-dir DIR
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from ddp_tutorial import console, flags, process
from ddp_tutorial.data import NpyDataset, class_prior_loss, load_splits, move_data_to_gpu
from ddp_tutorial.files import save_model
from ddp_tutorial.history import History, check_finite, report_epoch
from ddp_tutorial.model import ScaleInputs
from ddp_tutorial.training import evaluate, train_one_epoch


class SimpleModel(nn.Module):
    """One linear layer followed by a softmax, kept in log space."""

    def __init__(self, n_features, n_classes):
        super().__init__()
        self.linear = nn.Linear(n_features, n_classes)

    def forward(self, x):
        return self.linear(x).log_softmax(dim=1)


def train(args, device, train_set, val_set, batch_size, history):
    order = torch.Generator()
    sampler = RandomSampler(train_set, generator=order)
    options = {"collate_fn": NpyDataset.collate, "pin_memory": args.use_gpu}
    train_loader = DataLoader(train_set, batch_size, sampler=sampler, drop_last=True, **options)
    val_loader = DataLoader(val_set, 1024, **options)
    train_loader, val_loader = move_data_to_gpu(args.data_on, device, train_loader, val_loader)
    console.print_line(f"1 x {device.type}: {len(train_loader)} steps an epoch")

    torch.manual_seed(args.seed)
    scale = ScaleInputs(train_set.mean, train_set.std).to(device)
    model = SimpleModel(train_set.n_features, train_set.n_classes).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    prior_loss = class_prior_loss(train_set, val_set)

    for epoch in range(1, args.epochs + 1):
        order.manual_seed(args.seed + epoch)
        batches = console.progress(train_loader, f"epoch {epoch}")
        steps = train_one_epoch(nn.Sequential(scale, model), batches, optimizer, device)
        sums = steps.sum(dim=0)
        val_sums = evaluate(nn.Sequential(scale, model), val_loader, device)
        check_finite(epoch, sums, val_sums)
        report_epoch(history.append(epoch, sums, val_sums), args.epochs, prior_loss)
    save_model(args.out / "model.pt", nn.Sequential(scale, model))


def main():
    args = flags.parse(__doc__)
    device = torch.device("cuda" if args.use_gpu else "cpu")
    train_set, val_set = load_splits(args.data_dir)
    batch_size = min(args.batch_size, len(train_set))
    history = History(args.out)
    train(args, device, train_set, val_set, batch_size, history)


if __name__ == "__main__":
    process.run(main)
