"""Train SimpleModel on X_train.npy, y_train.npy, X_val.npy and y_val.npy with DistributedDataParallel, whatever fails.

Four ranks:   torchrun --standalone --nproc-per-node=4 --nnodes=1 --max-restarts=3 ddp_resilient.py --data-dir DIR
One process:  python ddp_resilient.py --data-dir DIR
"""

import os  # DDP: the launcher's variables

import torch
import torch.distributed as dist  # DDP: process groups and collectives
from torch import nn
from torch.nn.parallel import DistributedDataParallel  # DDP: averages the gradients over the ranks
from torch.utils.data import DataLoader  # survive: `ranks` has the sampler

from ddp_tutorial import console, process, ranks  # survive: `ranks` is what ranks do together
from ddp_tutorial.data import NpyDataset, class_prior_loss, load_splits, move_data_to_gpu
from ddp_tutorial.files import save_model
from ddp_tutorial.model import ScaleInputs
from ddp_tutorial.training import evaluate, train_one_epoch

ranks.check_environment()  # survive: RANK and its companions must fit together
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


@ranks.report_errors  # survive: a mistake ends all ranks with one line, a failure with its traceback
def train(args, device):  # survive: the ranks have met, so that they can agree on what follows
    with ranks.fail_together():  # survive: what one rank meets ends all of them, or the others would wait for it
        ranks.check_flags(args)  # survive: raises the mistake that `parse` has kept
        train_set, val_set = load_splits(args.data_dir)  # survive: one machine may lack a file
    settings = ranks.agree_on_settings(args, train_set, val_set)  # survive: or end: machines may have other files
    ranks.check_shares(args, len(train_set))  # survive: nodes may leave and come
    batch_size = process.per_rank_batch_size(args.batch_size, len(train_set), world_size)  # DDP: equal shares
    sampler = ranks.ResumableSampler(train_set, world_size, rank, seed=args.seed, drop_last=True)  # survive: my samples
    options = {"collate_fn": NpyDataset.collate, "pin_memory": args.use_gpu}
    train_loader = DataLoader(train_set, batch_size, sampler=sampler, drop_last=True, **options)
    mine = range(rank, len(val_set), world_size)  # DDP: no padding, so each sample counts once
    val_loader = DataLoader(val_set, 1024, sampler=mine, **options)  # DDP: my samples
    with ranks.fail_together():  # survive: one GPU may lack the memory
        train_loader, val_loader = move_data_to_gpu(args.data_on, device, train_loader, val_loader)
    process.print_rank0(f"{world_size} x {device.type}: {len(train_loader)} steps an epoch")  # DDP: one rank speaks

    torch.manual_seed(args.seed)
    scale = ScaleInputs(train_set.mean, train_set.std).to(device)
    model = SimpleModel(train_set.n_features, train_set.n_classes).to(device)
    ddp_model = DistributedDataParallel(model) if distributed else model  # DDP: the wrap
    x = torch.zeros(1, train_set.n_features, device=device)  # survive: any input, for a first pass
    ranks.prepare_exchange(ddp_model, x)  # survive: fixes the order of sums; few bytes go by rank 0, a shorter way
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    prior_loss = class_prior_loss(train_set, val_set)
    whole = nn.Sequential(scale, model)  # survive: what a checkpoint holds
    run = ranks.Run(args, whole, optimizer, sampler, settings, prior_loss)  # survive: loads what it goes on from

    for epoch in run.epochs():  # survive: those that are left
        batches = run.batches(console.progress(train_loader, f"epoch {epoch}"))  # survive: up to a stop
        steps = train_one_epoch(nn.Sequential(scale, ddp_model), batches, optimizer, device)  # DDP: backward() averages
        run.end_training(steps)  # survive: adds up the losses; if a rank was asked to stop, saves and ends here
        run.end_validation(evaluate(nn.Sequential(scale, model), val_loader, device))  # survive: history and checkpoint
    with ranks.fail_together():  # survive: if the disk is full
        if rank == 0:  # DDP: one rank writes
            save_model(args.out / "model.pt", nn.Sequential(scale, model))  # DDP: the plain model, not the wrapped one


def main():
    args = ranks.parse(__doc__, local_world_size)  # survive: keeps a mistake until the ranks have met
    device = torch.device("cuda", local_rank) if args.use_gpu else torch.device("cpu")  # DDP: my own GPU
    if args.use_gpu:  # DDP: each rank its own
        torch.cuda.set_device(local_rank)  # DDP: for whatever names no device, such as NCCL
    if distributed:  # DDP: one process needs no group
        backend, gpu = ("nccl", device) if args.use_gpu else ("gloo", None)  # DDP: for GPUs, for CPUs
        group = {"rank": rank, "world_size": world_size, "device_id": gpu}  # survive: what the store does not say
        group["timeout"] = args.timeout  # survive: a rank waits so long for one that is late, and then gives up
        with ranks.rendezvous(args) as store:  # survive: a wrong address is one line; no rank calls a dead one
            dist.init_process_group(backend, store=store, **group)  # survive: the ranks meet there
    try:  # survive: whatever happens,
        train(args, device)  # survive: it loads the data too
    finally:  # survive: also after a mistake
        if distributed:  # DDP: one process has none to leave
            dist.destroy_process_group()  # DDP: the ranks part, after `train` has let go of the model


if __name__ == "__main__":
    main()  # survive: `train` reports mistakes
