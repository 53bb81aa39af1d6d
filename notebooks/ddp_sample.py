"""Train SimpleModel on X_train.npy, y_train.npy, X_val.npy and y_val.npy with DistributedDataParallel.

Four ranks:   torchrun --standalone --nproc-per-node=4 --nnodes=1 ddp_sample.py --data-dir DIR
One process:  python ddp_sample.py --data-dir DIR
"""

import os  # DDP: the launcher's variables

import torch
import torch.distributed as dist  # DDP: process groups and collectives
from torch import nn
from torch.nn.parallel import DistributedDataParallel  # DDP: averages the gradients over the ranks
from torch.utils.data import DataLoader, DistributedSampler  # DDP: deals the samples out to the ranks

from ddp_tutorial import console, flags, process
from ddp_tutorial.data import NpyDataset, class_prior_loss, load_splits, move_data_to_gpu
from ddp_tutorial.files import save_model
from ddp_tutorial.history import History, check_finite, report_epoch
from ddp_tutorial.model import ScaleInputs
from ddp_tutorial.training import evaluate, train_one_epoch

distributed = "RANK" in os.environ  # DDP: torchrun sets RANK; plain `python` does not
rank = int(os.environ.get("RANK", 0))  # DDP: which process this is, of all
local_rank = int(os.environ.get("LOCAL_RANK", 0))  # DDP: which it is on this machine
world_size = int(os.environ.get("WORLD_SIZE", 1))  # DDP: how many processes there are
local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # DDP: how many on this machine


class SimpleModel(nn.Module):
    """One linear layer followed by a softmax, kept in log space."""

    def __init__(self, n_features, n_classes):
        super().__init__()
        self.linear = nn.Linear(n_features, n_classes)

    def forward(self, x):
        return self.linear(x).log_softmax(dim=1)


def train(args, device, train_set, val_set, batch_size, history):
    sampler = DistributedSampler(train_set, world_size, rank, seed=args.seed, drop_last=True)  # DDP: my samples
    options = {"collate_fn": NpyDataset.collate, "pin_memory": args.use_gpu}
    train_loader = DataLoader(train_set, batch_size, sampler=sampler, drop_last=True, **options)
    mine = range(rank, len(val_set), world_size)  # DDP: no padding, so each sample counts once
    val_loader = DataLoader(val_set, 1024, sampler=mine, **options)  # DDP: my samples
    train_loader, val_loader = move_data_to_gpu(args.data_on, device, train_loader, val_loader)
    process.print_rank0(f"{world_size} x {device.type}: {len(train_loader)} steps an epoch")  # DDP: one rank speaks

    torch.manual_seed(args.seed)
    scale = ScaleInputs(train_set.mean, train_set.std).to(device)
    model = SimpleModel(train_set.n_features, train_set.n_classes).to(device)
    ddp_model = DistributedDataParallel(model) if distributed else model  # DDP: the wrap
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    prior_loss = class_prior_loss(train_set, val_set)

    for epoch in range(1, args.epochs + 1):
        sampler.set_epoch(epoch)  # DDP: another order every epoch, the same on every rank
        batches = console.progress(train_loader, f"epoch {epoch}")
        steps = train_one_epoch(nn.Sequential(scale, ddp_model), batches, optimizer, device)  # DDP: backward() averages
        sums = steps.sum(dim=0)
        val_sums = evaluate(nn.Sequential(scale, model), val_loader, device)
        if distributed:  # DDP: one process has the sums over all samples already
            dist.all_reduce(sums)  # DDP: now every rank has them
            dist.all_reduce(val_sums)  # DDP: sums, so that the means are exact
        check_finite(epoch, sums, val_sums)
        if rank == 0:  # DDP: one rank writes
            line = history.append(epoch, sums, val_sums, world_size)  # DDP: notes how many ranks there are, too
            report_epoch(line, args.epochs, prior_loss)  # DDP: and one rank reports
    if rank == 0:  # DDP: one rank writes
        save_model(args.out / "model.pt", nn.Sequential(scale, model))  # DDP: the plain model, not the wrapped one


def main():
    args = flags.parse(__doc__, local_world_size)  # DDP: a GPU for each rank of this machine, or none
    device = torch.device("cuda", local_rank) if args.use_gpu else torch.device("cpu")  # DDP: my own GPU
    train_set, val_set = load_splits(args.data_dir)
    batch_size = process.per_rank_batch_size(args.batch_size, len(train_set), world_size)  # DDP: equal shares
    history = History(args.out, writes=rank == 0)  # DDP: one rank writes
    if args.use_gpu:  # DDP: each rank its own
        torch.cuda.set_device(local_rank)  # DDP: for whatever names no device, such as NCCL
    if distributed:  # DDP: one process needs no group
        backend, gpu = ("nccl", device) if args.use_gpu else ("gloo", None)  # DDP: for GPUs, for CPUs
        dist.init_process_group(backend, device_id=gpu)  # DDP: the ranks meet
    train(args, device, train_set, val_set, batch_size, history)
    if distributed:  # DDP: one process has none to leave
        dist.destroy_process_group()  # DDP: the ranks part, after `train` has let go of the model


if __name__ == "__main__":
    process.run(main)
