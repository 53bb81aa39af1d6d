"""Training steps of two ranks that a slow network joins; prints one JSON object, a `NetworkMeasurement`.

For `python -m benchmarks network`, after `unshare_command`. ROUNDS RATE...; a RATE is in Mbit/s, 0: no limit.
Started plainly, it makes two namespaces of the network, which stand for two machines, joins them by a cable, a veth
pair, and starts an agent of torchrun in each; as a rank, it measures. The kernel removes a namespace, and its end of
the cable, with its last process: there is nothing to clean up.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before the group starts, or gloo's threads outlive it
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ddp_tutorial.show.timing import take_turns

PLAIN, HALF, RARE, SILENT = "DDP", "DDP, fp16 hook", "DDP, exchange every 4th batch", "no exchange"
BATCH_SIZE = 128  # of each rank
CABLE, HOST = "cable", "10.0.0.1"  # its name in both namespaces, and the first one's address
LIMIT = "burst 64kb limit 16mb"  # of `tc tbf`; so much may wait that nothing is dropped
PATH = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))  # ordinary users have no ip and no tc on theirs
PORT = 29400  # both namespaces are new: nobody else listens there
AGENT = (  # a shell's program; its $0 is the cable, $1 the address, the rest a command
    'echo ready; read -r _ && ip link set lo up && ip address add "$1/24" dev "$0" && ip link set "$0" up'
    ' && shift && exec "$@"'
)


class Scheme(NamedTuple):
    """How ranks exchange their gradients."""

    comm_hook: Callable | None = None  # of DDP
    compression: int = 1  # the hook sends so many times fewer bytes
    n_batches: int = 1  # of a step, whose gradients add up before they are exchanged
    exchanges: bool = True


SCHEMES = {
    PLAIN: Scheme(),
    HALF: Scheme(fp16_compress_hook, compression=2),
    RARE: Scheme(n_batches=4),
    SILENT: Scheme(n_batches=4, exchanges=False),
}


class StepCost(NamedTuple):
    """What a step took for each of its batches."""

    seconds: float  # of the rank that took longest
    bytes_sent: int  # by this rank


class NetworkMeasurement(NamedTuple):
    """What the probe prints, as JSON."""

    gradient_bytes: int
    steps: dict[int, dict[str, list[StepCost]]]  # by the rate, then by the scheme's name

    @classmethod
    def from_json(cls, measured: dict) -> "NetworkMeasurement":
        """JSON has made strings of the rates, and lists of the tuples."""
        steps = {
            int(rate): {name: [StepCost(*cost) for cost in costs] for name, costs in schemes.items()}
            for rate, schemes in measured["steps"].items()
        }
        return cls(measured["gradient_bytes"], steps)


def unshare_command() -> list[str] | None:
    """What to put before a command so that it may make namespaces and limit a cable; None if nothing helps here.

    Root may, and so may an ordinary user where the kernel gives users namespaces of their own.
    """
    limited = f"ip link add {CABLE} type veth && tc qdisc add dev {CABLE} root tbf rate 1mbit {LIMIT}"
    for user in (["--user", "--map-root-user"], []) if shutil.which("unshare") else ():
        words = ["unshare", *user, "--net"]
        trial = [*words, "unshare", "--net", "sh", "-c", limited]
        if not subprocess.run(trial, env=os.environ | {"PATH": PATH}, capture_output=True).returncode:
            return words
    return None


def run_agents(module: str = "benchmarks.network_probe") -> int:
    """An agent in each namespace, with a rank of `module`. Returns the exit code of an agent that failed, else 0."""
    os.environ |= {"PATH": PATH, "GLOO_SOCKET_IFNAME": CABLE}
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={HOST}:{PORT}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`
    agents = []
    try:
        for address, is_host in ((HOST, 1), ("10.0.0.2", 0)):  # said to both: no agent knows the host by this address
            options = [f"--rdzv-conf=is_host={is_host}", f"--local-addr={address}", "-m", module]
            words = ["unshare", "--net", "sh", "-c", AGENT, CABLE, address, *torchrun, *options, *sys.argv[1:]]
            agents.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            agents[-1].stdout.readline()  # "ready": it is in a namespace of its own
        one, other = (["name", CABLE, "netns", str(agent.pid)] for agent in agents)
        subprocess.run(["ip", "link", "add", *one, "type", "veth", "peer", *other], check=True)
        for agent in agents:
            agent.stdin.write("go\n")
            agent.stdin.close()
        print(*(agent.stdout.read() for agent in agents), sep="", end="")
        return max((agent.wait() for agent in agents), key=abs)
    finally:
        for agent in agents:
            agent.terminate()  # torchrun then ends its rank
        for agent in agents:
            agent.wait()


def set_rate(mbit: int) -> None:
    """Let this end of the cable send so many Mbit/s, as fast as it can for 0."""
    subprocess.run(["tc", "qdisc", "del", "dev", CABLE, "root"], capture_output=True)  # there may be none
    if mbit:
        limit = ["root", "tbf", "rate", f"{mbit}mbit", *LIMIT.split()]
        subprocess.run(["tc", "qdisc", "add", "dev", CABLE, *limit], check=True)


def bytes_sent() -> int:
    """By this end of the cable, with all headers."""
    return psutil.net_io_counters(pernic=True, nowrap=False)[CABLE].bytes_sent


class SchemeTrainer:
    """A network of a million weights, and `step()`, which trains it on some batches and returns what a batch took."""

    def __init__(self, scheme: Scheme):
        self.scheme = scheme
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 768), nn.ReLU(), nn.Linear(768, 512), nn.ReLU(), nn.Linear(512, 10))
        self.ddp_model = DistributedDataParallel(model)
        if scheme.comm_hook:
            self.ddp_model.register_comm_hook(None, scheme.comm_hook)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        self.x, self.y = torch.randn(BATCH_SIZE, 784), torch.randint(10, (BATCH_SIZE,))

    def step(self) -> StepCost:
        """One step of the optimizer, on all ranks at once."""
        n_batches = self.scheme.n_batches
        dist.barrier()
        start, sent = time.perf_counter(), bytes_sent()
        for i in range(n_batches):
            exchanges = self.scheme.exchanges and i == n_batches - 1
            with nullcontext() if exchanges else self.ddp_model.no_sync():
                cross_entropy(self.ddp_model(self.x), self.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)  # the other has got all by now: nothing waits in a buffer here
        return StepCost(seconds.item() / n_batches, (bytes_sent() - sent) // n_batches)


def measure(rounds: int, rates: list[int]) -> NetworkMeasurement:
    """Two steps for each round, rate and scheme."""
    trainers = {name: SchemeTrainer(scheme) for name, scheme in SCHEMES.items()}
    costs = {rate: {name: [] for name in trainers} for rate in rates}
    for trainer in trainers.values():  # DDP makes its buckets anew after the first step
        trainer.step(), trainer.step()
    for _ in range(rounds):  # the rates take turns, too
        for rate in rates:
            dist.barrier()
            set_rate(rate)
            for name, steps in take_turns({name: trainer.step for name, trainer in trainers.items()}, 2).items():
                costs[rate][name] += steps
    n_bytes = sum(4 * parameter.numel() for parameter in trainers[PLAIN].ddp_model.parameters())
    return NetworkMeasurement(n_bytes, costs)


def main() -> int:
    """Returns the exit code."""
    if "RANK" not in os.environ:
        return run_agents()
    dist.init_process_group("gloo")
    measurement = measure(int(sys.argv[1]), [int(word) for word in sys.argv[2:]])
    if dist.get_rank() == 0:
        print(json.dumps(measurement._asdict()))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
