"""Training steps of two ranks that a slow network joins; prints one JSON object. ROUNDS RATE...; a RATE is in Mbit/s, 0: no limit.

For `python -m benchmarks network`, inside `isolated`. Started plainly, it makes two namespaces of the network, which stand
for two machines, joins them by a cable, a veth pair, and starts an agent of torchrun in each; as a rank, it measures.
The kernel removes a namespace, and its end of the cable, with its last process: there is nothing to clean up.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before the group starts, or gloo's threads outlive it
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ddp_tutorial.show.timing import take_turns

PLAIN, HALF, RARE, SILENT = "DDP", "DDP, fp16 hook", "DDP, exchange every 4th batch", "no exchange"
WAYS = {PLAIN: (None, 1), HALF: (fp16_compress_hook, 1), RARE: (None, 4), SILENT: (None, 4)}  # hook, batches of a step
BATCH_SIZE = 128  # of each rank
CABLE, HOST = "cable", "10.0.0.1"  # its name in both namespaces, and the first one's address
LIMIT = "burst 64kb limit 16mb"  # of `tc tbf`; so much may wait that nothing is dropped
PATH = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))  # ordinary users have no ip and no tc on theirs
AGENT = 'echo ready; read -r _ && ip link set lo up && ip address add "$1/24" dev "$0" && ip link set "$0" up && shift && exec "$@"'  # fmt: skip


def isolated() -> list[str] | None:
    """What to put before a command so that it may make namespaces and limit a cable; None if nothing helps here.

    Root may, and so may an ordinary user where the kernel gives users namespaces of their own.
    """
    limited = f"ip link add {CABLE} type veth && tc qdisc add dev {CABLE} root tbf rate 1mbit {LIMIT}"
    for user in (["--user", "--map-root-user"], []) if shutil.which("unshare") else ():
        words = ["unshare", *user, "--net"]
        if not subprocess.run([*words, "unshare", "--net", "sh", "-c", limited], env=os.environ | {"PATH": PATH}, capture_output=True).returncode:  # fmt: skip
            return words
    return None


def run_agents() -> int:
    """Returns the exit code of an agent that failed, else 0."""
    os.environ |= {"PATH": PATH, "GLOO_SOCKET_IFNAME": CABLE}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={HOST}:29400"]  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`
    agents = []
    try:
        for address, is_host in ((HOST, 1), ("10.0.0.2", 0)):  # said to both: no agent knows the host by this address
            options = [f"--rdzv-conf=is_host={is_host}", f"--local-addr={address}", "-m", "benchmarks.network_probe"]
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
        subprocess.run(["tc", "qdisc", "add", "dev", CABLE, "root", "tbf", "rate", f"{mbit}mbit", *LIMIT.split()], check=True)  # fmt: skip


def bytes_sent() -> int:
    """By this end of the cable, with all headers."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith(f"{CABLE}:"))
    return int(line.partition(":")[2].split()[8])


class Way:
    """A network of a million weights, and `step()`, which trains it on some batches and returns what a batch took."""

    def __init__(self, name: str):
        hook, self.n_batches = WAYS[name]
        self.silent = name == SILENT
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 768), nn.ReLU(), nn.Linear(768, 512), nn.ReLU(), nn.Linear(512, 10))
        self.model = DistributedDataParallel(model)
        if hook:
            self.model.register_comm_hook(None, hook)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        self.x, self.y = torch.randn(BATCH_SIZE, 784), torch.randint(10, (BATCH_SIZE,))

    def step(self) -> tuple[float, int]:
        """Seconds and bytes for each batch: those of the rank that took longest, those that this rank has sent."""
        dist.barrier()
        start, sent = time.perf_counter(), bytes_sent()
        for i in range(self.n_batches):
            last = i == self.n_batches - 1 and not self.silent
            with nullcontext() if last else self.model.no_sync():
                cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)  # the other has got all by now: nothing waits in a buffer here
        return seconds.item() / self.n_batches, (bytes_sent() - sent) // self.n_batches


def measure(rounds: int, rates: list[int]) -> dict:
    """{"bytes": of the gradients, "rates": {rate: {way: [what each step has returned]}}}"""
    ways = {name: Way(name) for name in WAYS}
    found = {rate: {name: [] for name in ways} for rate in rates}
    for way in ways.values():  # DDP makes its buckets anew after the first step
        way.step(), way.step()
    for _ in range(rounds):  # the rates take turns, too
        for rate in rates:
            dist.barrier()
            set_rate(rate)
            for name, values in take_turns({name: way.step for name, way in ways.items()}, 2).items():
                found[rate][name] += values
    n_bytes = sum(4 * parameter.numel() for parameter in ways[PLAIN].model.parameters())
    return {"bytes": n_bytes, "rates": found}


def main() -> int:
    if "RANK" not in os.environ:
        return run_agents()
    dist.init_process_group("gloo")
    found = measure(int(sys.argv[1]), [int(word) for word in sys.argv[2:]])
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
