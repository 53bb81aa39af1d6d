"""Lightning's Trainer."""

import logging
import os
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import nll_loss

from benchmarks.peers import MOMENTUM, History, loaders, new_model, parse_args, sums_of


class Module(LightningModule):
    """The model, and what Lightning's own loop does with it."""

    def __init__(self, model, lr: float, history: History):
        super().__init__()
        self.model, self.lr, self.history = model, lr, history

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=self.lr, momentum=MOMENTUM)

    def on_train_epoch_start(self):
        self.history.start_epoch()

    def training_step(self, batch, batch_index):
        x, y = batch
        return nll_loss(self.model(x), y)

    def on_validation_epoch_start(self):
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch, batch_index):
        x, y = batch
        self.sums += sums_of(self.model(x), y)

    def on_validation_epoch_end(self):
        self.history.end_epoch(self.trainer.strategy.reduce(self.sums, reduce_op="sum"))


def main() -> None:
    """Train as the flags say."""
    args = parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # its advice to use workers, which are slower here
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    history = History(args)
    trainer = Trainer(
        accelerator=args.device,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_epochs=args.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(new_model(args), args.lr, history), *loaders(args, args.batch_size // world_size))
    history.write()


if __name__ == "__main__":
    main()
