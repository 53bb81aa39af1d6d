"""Hugging Face Accelerate."""

import os

import torch
from accelerate import Accelerator
from torch.nn.functional import nll_loss

from benchmarks.peers import MOMENTUM, History, loaders, new_model, parse_args, sums_of


def train(args, accelerator: Accelerator) -> None:
    """All epochs, with the validation after each; what this makes is gone when it returns."""
    train_loader, val_loader = loaders(args, args.batch_size // int(os.environ.get("WORLD_SIZE", 1)))
    model = new_model(args)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=MOMENTUM)
    model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    history = History(args)
    for _ in range(args.epochs):
        history.start_epoch()
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = nll_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        with torch.no_grad():
            for x, y in val_loader:
                sums += sums_of(*accelerator.gather_for_metrics((model(x), y)))
        history.end_epoch(sums)
    history.write()


def main() -> None:
    """Train as the flags say."""
    args = parse_args()
    accelerator = Accelerator(cpu=args.device == "cpu")
    train(args, accelerator)
    accelerator.free_memory()  # a model that outlives the process group may hang its rank
    accelerator.end_training()


if __name__ == "__main__":
    main()
