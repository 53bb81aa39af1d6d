"""A run that can be killed, stopped and failed, and goes on: it loses no finished epoch."""

import itertools
import os
import signal
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from ddp_tutorial.console import UserError, announce, warn
from ddp_tutorial.data import NpyDataset
from ddp_tutorial.history import History, check_finite, report_epoch
from ddp_tutorial.process import STANDING_STILL, by_torchrun, is_first_rank, leave
from ddp_tutorial.ranks import checkpoint, exchange
from ddp_tutorial.ranks.failure import fail_together

STEPS_BETWEEN = 10  # at most, until the ranks ask each other whether one is to stop
SECONDS_BETWEEN = 1.0  # at most, but for a single step that takes longer
GRACE = 30.0  # seconds between SIGTERM and SIGKILL: torchrun's, unless it is told otherwise
WAIT_IN_A_CALL = 5.0  # seconds, and twice the longest step: then a rank that is to stop, and waits for others, leaves


class Stopped(UserError):
    """The run ends before its last epoch because it was asked to."""

    kind, code = "stopped", 75  # EX_TEMPFAIL of sysexits.h: not done, try again


class StopRequest:
    """Notes the signals that ask a run to stop: a second Ctrl-C ends the process at once.

    Schedulers send SIGTERM or SIGUSR1 before they take a machine away, a terminal that closes SIGHUP, Ctrl-C SIGINT.
    torchrun sends SIGTERM as well, when a rank has died. On NCCL the others may wait for that rank in a call that no
    handler interrupts: then a thread ends them.
    """

    def __init__(self):
        self.noted = False
        self.waits_since = None  # the time, if the rank may be waiting for the others
        self.longest = 0.0  # seconds that it has waited, and worked, between two signs of life
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

    @contextmanager
    def waiting(self) -> Iterator[Callable[[], None]]:
        """In here the rank may have to wait for the others. Call what it gives as a sign of life: after a step, say."""

        def alive() -> None:
            now = time.monotonic()
            self.longest = max(self.longest, now - (self.waits_since or now))
            self.waits_since = now

        self.waits_since = time.monotonic()
        try:
            yield alive
        finally:
            alive()
            self.waits_since = None

    def _watch(self, reader: int) -> None:
        while signal.SIGTERM not in (signals := os.read(reader, 1)):
            if not signals:
                return os.close(reader)
        asked = time.monotonic()
        while time.monotonic() - max(asked, self.waits_since or time.monotonic()) < WAIT_IN_A_CALL + 2 * self.longest:
            time.sleep(0.1)
        leave(STANDING_STILL)

    def _note(self, number, frame) -> None:
        self.noted = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def from_all_ranks(values: Tensor) -> Tensor:
    """Every rank's `values`, stacked: (world_size, *values.shape); of a single process, its own: (1, *values.shape)."""
    return exchange.all_gather(values) if dist.is_initialized() else values[None]


def agree_on_settings(args: Namespace, train_set: NpyDataset, val_set: NpyDataset) -> dict:
    """What a run that goes on must not change, by the names that its user knows.

    All ranks raise a `UserError` that names the node if one of them has other settings, other data or more epochs.
    """
    settings = {
        "--batch-size": args.batch_size,
        "--lr": args.lr,
        "--seed": args.seed,
        "X_train.npy of shape": tuple(train_set.X.shape),
        "X_val.npy of shape": tuple(val_set.X.shape),
        "classes": train_set.n_classes,
        "training data of fingerprint": train_set.fingerprint(),
        "validation data of fingerprint": val_set.fingerprint(),
    }
    if dist.is_initialized():
        raise_what_differs(settings | {"--epochs": args.epochs})
    return settings


def raise_what_differs(settings: dict) -> None:
    """Raise a `UserError` on all ranks if one of them has other `settings` than the first: the others would not see."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (socket.gethostname(), settings))
    first_node, expected = ranks[0]
    for rank, (node, found) in enumerate(ranks):
        for key in expected:
            if found[key] != expected[key]:
                what = f"{key} {found[key]} on node {node} (rank {rank}), and {expected[key]} on {first_node} (rank 0)"
                raise UserError(f"{what}: give all nodes the same files and flags")


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
    For each of `epochs()`: train on `batches()`, call `end_training()`, validate, call `end_validation()`.
    """

    def __init__(
        self,
        args: Namespace,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sampler: ResumableSampler,
        settings: dict,
        class_prior_loss: float,
    ):
        """`settings` are what a resumed run must not change; see `report_epoch` for the loss. Raises `UserError`."""
        self.file, self.n_epochs, self.settings = args.out / "checkpoint.pt", args.epochs, settings
        self.class_prior_loss = class_prior_loss
        self.model, self.optimizer, self.sampler = model, optimizer, sampler
        found = [None]
        with fail_together():
            if is_first_rank():
                self.history = History(args.out)  # it locks the folder
                found[0] = checkpoint.find(self.file, args.resume, args.restarted)
                if found[0] is None:
                    checkpoint.set_aside(self.file)
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        with fail_together():
            self.epoch, self.sums = checkpoint.restore(found[0], model, optimizer, settings, args.new_lr)
            n_done, n_samples = self.sums[1].item(), sampler.num_samples * sampler.num_replicas
            if n_done >= n_samples:
                place = f"after {n_done:,.0f} of an epoch's {n_samples:,} samples"
                raise UserError(f"{self.file}: stopped {place}: start without --resume")
            if is_first_rank():
                self.history.keep(self.epoch)
        if self.epoch >= self.n_epochs:
            announce(f"--epochs {self.n_epochs}: {self.file} has {self.epoch} of them: there is nothing to do")
        self.stop = StopRequest()
        self.steps_between = 1  # until a step has been timed
        self.last_asked = time.monotonic()
        self.longest_save, self.has_warned = 0.0, False
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
        with self.stop.waiting() as alive:
            for n_steps, batch in enumerate(loader, 1):
                if n_steps == 1:  # a loader draws a seed as it starts: not from the numbers that a checkpoint holds
                    torch.set_rng_state(random_numbers)
                yield batch
                alive()
                if n_steps % self.steps_between == 0 and n_steps < len(loader) and self._is_to_stop():
                    self.in_the_middle = True  # of the epoch, on all ranks
                    return

    def _is_to_stop(self) -> bool:
        """Whether a rank was asked to. All call this after the same step; all find the same, and when to ask again."""
        now = time.monotonic()
        step_seconds = (now - self.last_asked) / self.steps_between
        rows = from_all_ranks(torch.tensor([self.stop.noted, step_seconds], dtype=torch.float64))
        self.last_asked, slowest = now, rows[:, 1].max().item()
        self.steps_between = max(1, int(min(STEPS_BETWEEN, SECONDS_BETWEEN / slowest)))
        self._check_grace(slowest * self.steps_between + self.longest_save)
        return bool(rows[:, 0].any())

    def _check_grace(self, seconds: float) -> None:
        """Warn, once, if to stop takes longer than torchrun waits, as far as a rank can know: not of its flags."""
        can_wait = torch.__version__ >= (2, 12)  # an older torchrun does not know the variable
        told = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") if can_wait else None
        grace = float(told or GRACE)
        if by_torchrun() and seconds > grace and not self.has_warned:
            self.has_warned = True
            what = f"to stop takes {seconds:.0f} s here, and torchrun kills ranks {grace:.0f} s after it was asked to"
            remedy = f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={2 * seconds:.0f} before it starts"
            warn(f"{what}: {remedy if can_wait else 'PyTorch 2.12 or newer can be told to wait longer'}")

    def end_training(self, steps: Tensor) -> None:
        """Add up what `train_one_epoch` returns. Raises `Stopped`, after a save, if the ranks have agreed to stop."""
        n_finite = steps[:, :1].cumsum(0).isfinite().sum(0)
        with self.stop.waiting():
            rows = from_all_ranks(torch.cat((steps.sum(0), n_finite)))
            self.sums = self.sums + rows[:, :2].sum(0).cpu()
        n_before = self.sampler.n_done // int(steps[0, 1])  # steps of this epoch that an earlier run has made
        check_finite(self.epoch, self.sums, step=n_before + int(rows[:, 2].min()) + 1)
        if self.in_the_middle:
            with fail_together():
                self._save(self.epoch - 1)
            raise Stopped(f"in epoch {self.epoch}, as asked: go on with --resume")

    def end_validation(self, val_sums: Tensor) -> None:
        """Write the finished epoch down. Raises `Stopped` if a rank was asked to, unless this was the last epoch."""
        with self.stop.waiting():
            rows = from_all_ranks(torch.cat((val_sums, val_sums.new_tensor([self.stop.noted])))).cpu()
        check_finite(self.epoch, val_sums := rows[:, :3].sum(0))
        sums, self.sums = self.sums, torch.zeros(2, dtype=torch.float64)
        with fail_together():
            if is_first_rank():
                line = self.history.append(self.epoch, sums, val_sums, world_size=len(rows))
                report_epoch(line, self.n_epochs, self.class_prior_loss)
            self._save(self.epoch)
        if rows[:, 3].any() and self.epoch < self.n_epochs:
            raise Stopped(f"after epoch {self.epoch}, as asked: go on with --resume")

    def _save(self, epoch: int) -> None:
        start = time.monotonic()
        if is_first_rank():
            checkpoint.save(self.file, self.model, self.optimizer, epoch, self.sums, self.settings)
        self.longest_save = max(self.longest_save, time.monotonic() - start)
