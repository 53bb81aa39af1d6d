"""Lightning Fabric."""

import os

import torch
from lightning.fabric import Fabric
from torch.nn.functional import nll_loss

from benchmarks.peers import MOMENTUM, History, loaders, new_model, parse_args, sums_of


def main() -> None:
    """Train as the flags say."""
    args = parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    fabric = Fabric(accelerator=args.device, devices=world_size, strategy="ddp" if world_size > 1 else "auto")
    fabric.launch()
    model = new_model(args)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=MOMENTUM)
    model, optimizer = fabric.setup(model, optimizer)
    train_loader, val_loader = fabric.setup_dataloaders(*loaders(args, args.batch_size // world_size))
    history = History(args)
    for epoch in range(args.epochs):
        history.start_epoch()
        if world_size > 1:
            train_loader.sampler.set_epoch(epoch)
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = nll_loss(model(x), y)
            fabric.backward(loss)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            sums = sum(sums_of(model(x), y) for x, y in val_loader)
        history.end_epoch(fabric.all_reduce(sums, reduce_op="sum"))
    history.write()


if __name__ == "__main__":
    main()
