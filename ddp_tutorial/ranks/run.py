"""A run that can be killed, stopped and failed, and goes on: it loses no finished epoch."""

import itertools
import os
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from ddp_tutorial.console import UserError, is_first_rank
from ddp_tutorial.data import NpyDataset
from ddp_tutorial.history import History, check_finite
from ddp_tutorial.ranks import checkpoint, exchange
from ddp_tutorial.ranks.failure import fail_together

STEPS_BETWEEN = 10  # after which the ranks ask each other whether one is to stop
PATIENCE = 5.0  # seconds, and twice the longest step: then a rank that is to stop, and waits for others, leaves


class Stopped(UserError):
    """The run ends before its last epoch because it was asked to."""

    kind, code = "stopped", 75  # EX_TEMPFAIL of sysexits.h: not done, try again


class StopRequest:
    """Notes SIGTERM and SIGUSR1, which schedulers send before they take a machine away, a closed terminal's SIGHUP, Ctrl-C.

    A second Ctrl-C ends the process at once. torchrun sends SIGTERM as well, when a rank has died. On NCCL the others
    may wait for that rank in a call that no handler interrupts: then a thread ends them.
    """

    def __init__(self):
        self.noted, self.waits_since, self.longest = False, None, 0.0
        self.replaced, numbers = {}, (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
        if threading.current_thread() is threading.main_thread():  # no other may set handlers; and nohup ignores SIGHUP
            self.replaced = {n: signal.signal(n, self._note) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            self.wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to whatever the rank does
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def forget(self) -> None:
        """Put back what was there before: a notebook that runs the script by `%run` lives on."""
        for number, handler in self.replaced.items():
            signal.signal(number, handler)
        if self.replaced:
            os.close(signal.set_wakeup_fd(self.wakeup))  # which ends the thread,
        self.waits_since = None  # or keeps it from ending the process

    def waits(self, yes: bool) -> None:
        """From now on this rank may have to wait for the others, or not."""
        now = time.monotonic()
        self.longest = max(self.longest, now - (self.waits_since or now))
        self.waits_since = now if yes else None

    def _watch(self, reader: int) -> None:
        while signal.SIGTERM not in (signals := os.read(reader, 1)):
            if not signals:
                return os.close(reader)
        asked = time.monotonic()
        while time.monotonic() - max(asked, self.waits_since or time.monotonic()) < PATIENCE + 2 * self.longest:
            time.sleep(0.1)
        os._exit(128 + signal.SIGTERM)  # as shells give it

    def _note(self, number, frame) -> None:
        self.noted = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def on_any_rank(self) -> bool:
        """Whether a rank has noted one: all ranks call this at the same time, and all find the same."""
        return bool(from_all_ranks(torch.tensor(self.noted)).any())


def from_all_ranks(values: Tensor) -> Tensor:
    """Every rank's `values`, stacked: (world_size, *values.shape); of a single process, its own: (1, *values.shape)."""
    return exchange.all_gather(values) if dist.is_initialized() else values[None]


def settings(args: Namespace, train_set: NpyDataset, val_set: NpyDataset) -> dict:
    """What a run that goes on must not change, by the names that its user knows."""
    return {
        "--batch-size": args.batch_size,
        "--lr": args.lr,
        "--seed": args.seed,
        "X_train.npy of shape": tuple(train_set.X.shape),
        "X_val.npy of shape": tuple(val_set.X.shape),
        "classes": train_set.n_classes,
    }


class ResumableSampler(DistributedSampler):
    """A `DistributedSampler` that leaves out the first `n_done` samples of its share."""

    n_done = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.n_done, None)

    def __len__(self) -> int:
        return self.num_samples - self.n_done


class Run:
    """The epochs of a run, on all ranks; what is finished is in `history.jsonl` and `checkpoint.pt` of `--out`.

    The first rank reads and writes: the others' machines need not have the files. All go on from where it does.
    For each of `epochs()`: train on `batches()`, call `trained()`, validate, call `validated()`.
    """

    def __init__(
        self,
        args: Namespace,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sampler: ResumableSampler,
        settings: dict,
        chance: float,
    ):
        """`settings` are what a resumed run must not change; for `chance` see `History`. Raises `UserError` together."""
        self.file, self.n_epochs, self.settings = args.out / "checkpoint.pt", args.epochs, settings
        self.model, self.optimizer, self.sampler = model, optimizer, sampler
        restarted, found = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0", [None]
        with fail_together():
            if is_first_rank():
                self.history = History(args.out, args.epochs, chance)  # it locks the folder
                found[0] = checkpoint.find(self.file, args.resume, restarted)
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        with fail_together():
            self.epoch, self.sums = checkpoint.restore(found[0], model, optimizer, settings)
            if is_first_rank():
                self.history.keep(self.epoch)
        self.stop = StopRequest()
        self.in_the_middle = False

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are left. The sampler leaves out what the first one has done already."""
        try:
            for epoch in range(self.epoch + 1, self.n_epochs + 1):
                self.epoch = epoch
                self.sampler.n_done = int(self.sums[1]) // self.sampler.num_replicas
                self.sampler.set_epoch(epoch)
                yield epoch
        finally:  # also if an epoch has failed
            self.stop.forget()

    def batches(self, loader: Iterable) -> Iterator:
        """The batches of `loader`, up to a step at which the ranks agree to stop."""
        random_numbers = torch.get_rng_state()
        self.stop.waits(True)
        for n_steps, batch in enumerate(loader, 1):
            if n_steps == 1:  # a loader draws a seed as it starts: not from the numbers that a checkpoint holds
                torch.set_rng_state(random_numbers)
            yield batch
            self.stop.waits(True)
            if n_steps % STEPS_BETWEEN == 0 and n_steps < len(loader) and self.stop.on_any_rank():
                self.in_the_middle = True  # of the epoch, on all ranks
                return

    def trained(self, steps: Tensor) -> None:
        """Add up what `train_one_epoch` returns. Raises `Stopped`, after a save, if the ranks have agreed to stop."""
        n_finite = steps[:, :1].cumsum(0).isfinite().sum(0)
        rows = from_all_ranks(torch.cat((steps.sum(0), n_finite)))
        self.sums = self.sums + rows[:, :2].sum(0).cpu()
        self.stop.waits(False)
        n_before = self.sampler.n_done // int(steps[0, 1])  # steps of this epoch that an earlier run has made
        check_finite(self.epoch, self.sums, step=n_before + int(rows[:, 2].min()) + 1)
        if self.in_the_middle:
            with fail_together():
                self._save(self.epoch - 1)
            raise Stopped(f"in epoch {self.epoch}, as asked: go on with --resume")

    def validated(self, val_sums: Tensor) -> None:
        """Write the finished epoch down. Raises `Stopped` if a rank was asked to, unless this was the last epoch."""
        self.stop.waits(True)
        rows = from_all_ranks(torch.cat((val_sums, val_sums.new_tensor([self.stop.noted])))).cpu()
        self.stop.waits(False)
        check_finite(self.epoch, val_sums := rows[:, :3].sum(0))
        sums, self.sums = self.sums, torch.zeros(2, dtype=torch.float64)
        with fail_together():
            if is_first_rank():
                self.history.append(self.epoch, sums, val_sums, len(rows))
            self._save(self.epoch)
        if rows[:, 3].any() and self.epoch < self.n_epochs:
            raise Stopped(f"after epoch {self.epoch}, as asked: go on with --resume")

    def _save(self, epoch: int) -> None:
        if is_first_rank():
            checkpoint.save(self.file, self.model, self.optimizer, epoch, self.sums, self.settings)
