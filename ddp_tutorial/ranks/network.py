"""How fast the ranks exchange, and which of them is slow: a table, before a long job starts. As the job, so this:

torchrun FLAGS OF THE JOB -m ddp_tutorial.ranks.network
"""

import os
import socket
import time
from collections.abc import Callable
from statistics import median, median_low

import torch
import torch.distributed as dist

from ddp_tutorial import process
from ddp_tutorial.console import UserError
from ddp_tutorial.ranks.environment import check_environment

MEGABYTES = (1, 8, 32)  # of an all-reduce; from some megabytes on, the speed hardly changes
MEGABYTES_SENT = 8  # from a rank to the next one
SLOW = 1.5  # times as long as the median rank's computing is worth a word


def seconds(call: Callable[[], object], device: torch.device, n_calls: int = 3) -> float:
    """The median time of a call, on this rank. All ranks start each call together."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(n_calls + 1):
        dist.barrier()
        finish()
        start = time.perf_counter()
        call()
        finish()
        times.append(time.perf_counter() - start)
    return median(times[1:])  # the first one makes connections


def all_reduce_speed(megabytes: int, device: torch.device) -> float:
    """GB/s that each rank sends in an all-reduce: a ring sends 2 (N-1) / N times the bytes of the tensor."""
    values, n = torch.zeros(megabytes * 250_000, device=device), dist.get_world_size()
    return 2 * (n - 1) / n * values.nbytes / 1e9 / seconds(lambda: dist.all_reduce(values), device)


def compute_seconds(device: torch.device) -> float:
    """The time of the same matrix products on every rank, for each by itself: no rank waits for another."""
    matrix = torch.ones(512, 512, device=device)
    return seconds(lambda: [matrix @ matrix for _ in range(10)], device)


def send_speed(device: torch.device) -> float:
    """GB/s from this rank to the next one, from the last to the first. One sends at a time: no other is in its way."""
    values, answer = torch.zeros(MEGABYTES_SENT * 250_000, device=device), torch.zeros(1, device=device)
    n, mine = dist.get_world_size(), 0.0
    for rank in range(n):

        def call(rank=rank, following=(rank + 1) % n) -> None:
            if dist.get_rank() == rank:
                dist.send(values, following)
                dist.recv(answer, following)
            elif dist.get_rank() == following:
                dist.recv(values, rank)
                dist.send(answer, rank)

        taken = seconds(call, device)
        mine = values.nbytes / 1e9 / taken if dist.get_rank() == rank else mine
    return mine


def report(speeds: dict[int, float], rows: list[tuple]) -> str:
    """A line on the all-reduces, by their megabytes; and a row for each rank: node, PyTorch, seconds, GB/s.

    Then one for each rank that is slow: beside the lower median, so that one of two nodes is found, too.
    """
    nodes = len({node for node, *_ in rows})
    width = max(len("node"), *(len(node) for node, *_ in rows))
    sizes = "   ".join(f"{megabytes} MB at {speed:.3f} GB/s" for megabytes, speed in speeds.items())
    lines = [f"{len(rows)} ranks, {nodes} host name{'s' * (nodes > 1)}, {dist.get_backend()}; all-reduce of {sizes}"]
    lines += [f"rank  {'node':{width}}  PyTorch     compute    to the next rank"]
    for rank, (node, version, taken, speed) in enumerate(rows):
        following = rows[(rank + 1) % len(rows)][0]
        over_the_network = f", on {following}" if following != node else ""
        lines += [f"{rank:4}  {node:{width}}  {version:9} {1e3 * taken:7.1f} ms    {speed:6.3f} GB/s{over_the_network}"]
    usual = median_low([taken for _, _, taken, _ in rows])
    for rank, (node, _, taken, _) in enumerate(rows):
        if taken > SLOW * usual:
            lines += [f"slow: rank {rank} on {node} computes {taken / usual:.1f} times as long as the median rank"]
    return "\n".join(lines)


def main() -> None:
    check_environment()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        process.fail(UserError("one rank exchanges nothing: start at least two with torchrun"))
    local_rank, n_local = int(os.environ["LOCAL_RANK"]), process.n_local_processes(os.environ)
    use_gpu = torch.cuda.device_count() >= n_local
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if use_gpu else "gloo", device_id=device if use_gpu else None)
    speeds = {megabytes: all_reduce_speed(megabytes, device) for megabytes in MEGABYTES}
    rows = [None] * dist.get_world_size()
    own = (socket.gethostname(), torch.__version__.partition("+")[0], compute_seconds(device), send_speed(device))
    dist.all_gather_object(rows, own)
    for line in report(speeds, rows).splitlines():
        process.print_rank0(line)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
