"""Several machines: agents that restart and die, launchers that are not torchrun's kin, two jobs in one folder."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ddp_tutorial import files
from ddp_tutorial.console import UserError
from ddp_tutorial.history import History, read
from ddp_tutorial.ranks import checkpoint
from ddp_tutorial.ranks.meeting import group_number
from ddp_tutorial.show import notebook
from tests.edit import calls, put_before
from tests.ranks import (
    DDP,
    RESILIENT,
    SINGLE,
    Launch,
    assert_equal,
    environment,
    free_port,
    hundred_samples,
    patience,
    result,
    start_ranks,
    train,
)

FLAGS = ("--batch-size", 4, "--epochs", 3)
CLOSE = {"rtol": 1e-5, "atol": 5e-6}  # for other numbers of ranks, as in test_ddp_equals_one_process.py
SUMS, VAL_SUMS = torch.tensor([8.0, 8.0]), torch.tensor([4.0, 1.0, 2.0])
LOOPBACK = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return hundred_samples(tmp_path_factory.mktemp("machines"))


def paths(data, out):
    return "--data-dir", data, "--out", out


def until(condition, launch=None, pause=0.02):
    """What `condition` returns, once it is true; if it never is, the test tells where the ranks of the launch stand."""
    start = time.monotonic()
    while not (value := condition()):
        if time.monotonic() - start > patience():
            pytest.fail(f"it does not come: {launch and launch.where_ranks_stand()}")
        time.sleep(pause)
    return value


def ended(launch, pids):
    return set(pids.values()).isdisjoint(launch.ranks(None).values())


def slowed(tmp_path):
    """A copy of the script that takes its time, so that something can befall it in the middle."""
    return put_before(RESILIENT, calls("run.end_training"), "__import__('time').sleep(0.2)", tmp_path / RESILIENT.name)


# How groups of ranks tell themselves apart.


def numbers_of(store, world_size, timeout=10.0):
    """What each rank of a group finds, each in a thread with a connection of its own."""
    found, limit = [None] * world_size, timedelta(seconds=timeout)

    def rank_(rank):
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=limit)
        try:
            found[rank] = group_number(own, rank, world_size, limit)
        except (RuntimeError, dist.DistError) as error:
            found[rank] = error

    threads = [threading.Thread(target=rank_, args=(rank,)) for rank in reversed(range(world_size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_groups_at_one_store_are_numbered(store):
    assert [numbers_of(store, n) for n in (3, 1, 3, 2)] == [[1] * 3, [2], [3] * 3, [4] * 2]


def test_a_rank_that_died_while_it_met_the_others_is_not_counted_on(store):
    """It has signed on for the last group, which the first rank has confirmed; or the first rank has died."""
    assert numbers_of(store, 2) == [1, 1]
    for dead in ([0], [1], [0, 1], [0, 0]):
        for rank in dead:
            start = store.add(f"starts of rank {rank}", 1)
            if rank:
                store.set(f"group {store.add('starts of rank 0', 0)}, rank {rank}", str(start))
        first, second = numbers_of(store, 2)
        assert first == second == store.add("starts of rank 0", 0)


def test_without_the_first_rank_nobody_meets(store):
    with pytest.raises(RuntimeError, match="the first rank has not come"):
        group_number(store, 1, 2, timedelta(seconds=0.3))


TWO_GROUPS = """
import os, sys
from argparse import Namespace
from datetime import timedelta
from ddp_tutorial import ranks
for expected in (False, True):
    args = Namespace(timeout=timedelta(seconds=60), restarted=False)
    with ranks.rendezvous(args):
        pass
    assert args.restarted == expected
assert os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"  # torchrun's own stays what it is
"""


def test_a_later_group_knows_that_it_is_one(tmp_path):
    """Also where this machine's torchrun has counted no restart."""
    (tmp_path / "groups.py").write_text(TWO_GROUPS)
    ranks = start_ranks(2, tmp_path / "groups.py")
    assert [rank.code for rank in ranks] == [0, 0], ranks


FAILING_GROUP = """
import sys
from argparse import Namespace
from datetime import timedelta
from ddp_tutorial import ranks
with ranks.rendezvous(Namespace(timeout=timedelta(seconds=60), restarted=False)):
    raise RuntimeError(sys.argv[1])
"""


@pytest.mark.parametrize("error, code", [("no such device", 1), ("Connection refused", 2)])
def test_only_what_belongs_to_the_meeting_is_called_so(error, code, tmp_path):
    (tmp_path / "group.py").write_text(FAILING_GROUP)
    (rank,) = start_ranks(1, tmp_path / "group.py", error)
    assert rank.code == code and error in rank.stderr and ("did not meet" in rank.stderr) == (code == 2), rank


# Agents


CLOCK = """
import datetime as plain
import sys

from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.run import main

seconds, *words = sys.argv[1:]


class Clock(plain.datetime):
    @classmethod
    def now(cls, tz=None):
        return plain.datetime.now(tz) + plain.timedelta(seconds=float(seconds))


dynamic_rendezvous.datetime = Clock
main(words)
"""


@pytest.mark.slow
@linux
def test_a_node_whose_clock_is_late_is_missed(data, tmp_path):
    """torchrun takes it for dead, and starts the other's ranks alone; with --nnodes they refuse."""
    program, port = tmp_path / "agent.py", free_port()
    program.write_text(CLOCK)
    flags = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    words = [RESILIENT, *paths(data, tmp_path / "out"), *FLAGS, "--nnodes", 2]
    agents, options = [], {"cwd": tmp_path, "env": environment(str(tmp_path)), "stderr": subprocess.PIPE, "text": True}
    for i, seconds in enumerate((0, -20)):
        place = [f"--local-addr=127.0.0.{i + 1}", f"--rdzv-conf=is_host={1 - i},last_call_timeout=1"]
        command = [sys.executable, program, seconds, *flags, *place, *words]
        agents.append(subprocess.Popen([*map(str, command)], **options))
    said = [agent.communicate(timeout=patience())[1] for agent in agents]
    assert all(agent.returncode for agent in agents), said
    assert "--nnodes 2: 1 node takes part" in said[0] and not (tmp_path / "out").exists(), said


@linux
@pytest.mark.slow
def test_two_agents_meet_again(data, tmp_path):
    """A rank on one of them is killed: the other counts no restart, or one. Then a rank on the other."""
    flags, out = (*FLAGS, "--epochs", 12), tmp_path / "out"
    with Launch(4, slowed(tmp_path), *paths(data, out), *flags, restarts=3, n_agents=2) as launch:
        for rank, n_epochs in ((3, 2), (0, 5)):
            until(lambda n=n_epochs: (out / "history.jsonl").exists() and len(read(out)) >= n, launch)
            pids = until(lambda: len(pids := launch.ranks(None)) == 4 and pids, launch)
            os.kill(pids[rank], signal.SIGKILL)
            until(partial(ended, launch, pids), launch)
        done = launch.wait()
        assert done.returncode == 0 and launch.left() == [], done
    assert done.stdout.count("going on after epoch") == 2, done.stdout  # no launch has a name: the store tells
    assert_equal(result(out), train(4, RESILIENT, data, tmp_path / "whole", *flags))


@pytest.mark.slow
@linux
@pytest.mark.parametrize("replaced", [False, True])
def test_an_agent_dies_with_its_ranks(replaced, data, tmp_path, monkeypatch):
    """The other goes on with two ranks: the same global batch, and the same curve. With a new store for each meeting,
    an agent may come in the place of the dead one, and four go on."""
    flags, out = (*FLAGS, "--lr", 0.02, "--epochs", 80 if replaced else 12), tmp_path / "out"
    if replaced:
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with Launch(4, slowed(tmp_path), *paths(data, out), *flags, restarts=3, n_agents=2, nnodes="1:2") as launch:
        until(lambda: (out / "history.jsonl").exists() and len(read(out)) >= 2, launch)
        envs = launch.processes()
        ranks = [pid for pid in launch.ranks(None).values() if envs[pid]["GROUP_RANK"] == "1"]
        parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in ranks}
        (dying,) = (agent for agent in launch.agents if agent.pid in parents)
        if dying is launch.agent:
            pytest.skip("the agent that holds the meeting has the higher ranks: without it the job ends")
        for pid in (dying.pid, *ranks):
            os.kill(pid, signal.SIGKILL)
        dying.wait()
        launch.agents = [agent for agent in launch.agents if agent is not dying]
        if replaced:
            until(lambda: read(out)[-1]["world_size"] == 2, launch)
            launch.start_agent()
        done = launch.wait()
    assert done.returncode == 0, done
    whole = train(4, RESILIENT, data, tmp_path / "whole", *flags).history
    sizes = [n for n, _ in itertools.groupby(line["world_size"] for line in read(out))]
    assert sizes == ([4, 2, 4] if replaced else [4, 2]), sizes
    for key in ("train_loss", "val_loss"):
        torch.testing.assert_close([line[key] for line in read(out)], [line[key] for line in whole], **CLOSE)


@linux
def test_ranks_whose_agent_was_killed_end(data, tmp_path):
    with Launch(2, slowed(tmp_path), *paths(data, tmp_path / "out"), *FLAGS, "--epochs", 10_000) as launch:
        until(lambda: (tmp_path / "out" / "history.jsonl").exists(), launch)
        launch.agent.send_signal(signal.SIGKILL)
        launch.agent.wait()
        until(lambda: not launch.ranks(None), launch)
        said = launch.said("stderr")
    assert re.findall(r"the torchrun of rank (\d) has ended", said), said


HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    "number, options, n_stopped",
    [(signal.SIGHUP, (), 1), (signal.SIGUSR1, (), 0), (signal.SIGUSR1, (HANDLED,), 1)],
    ids=["a closed terminal", "Slurm's warning", "Slurm's warning, handled"],
)
def test_signals_at_the_agent(number, options, n_stopped, data, tmp_path):
    """It hands the ones that it knows on to the ranks, which stop in good order. Another one ends it, and the ranks
    end by themselves: in the middle of an epoch, which is lost."""
    out = tmp_path / "out"
    with Launch(2, slowed(tmp_path), *paths(data, out), *FLAGS, "--epochs", 10_000, options=options) as launch:
        until(lambda: (out / "checkpoint.pt").exists(), launch)
        launch.agent.send_signal(number)
        done = launch.wait()
        until(lambda: not launch.ranks(None), launch)
        said = launch.said("stderr")
    assert done.returncode == (1 if n_stopped else -number), done
    assert said.count("stopped: ") == n_stopped and said.count("torchrun of rank") == 2 * (1 - n_stopped), said
    assert checkpoint.read(out / "checkpoint.pt")[1]["epoch"] >= 1


@pytest.mark.slow
@linux
def test_nohup(data, tmp_path):
    """torchrun sets a handler of its own for SIGHUP, and so undoes what nohup does, unless it is told not to."""
    flags, out = (*FLAGS, "--epochs", 12), tmp_path / "out"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup: what it starts inherits it
    try:
        launch = Launch(2, slowed(tmp_path), *paths(data, out), *flags, options=(HANDLED,), fork=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    with launch:
        until(lambda: (out / "history.jsonl").exists(), launch)
        launch.agent.send_signal(signal.SIGHUP)
        done = launch.wait()
    assert done.returncode == 0 and len(read(out)) == 12, done


# Two jobs in one folder


SLOW_SCRIPTS = [pytest.param(script, marks=pytest.mark.slow) for script in (SINGLE, RESILIENT)]


@pytest.mark.parametrize("script", [DDP, *SLOW_SCRIPTS], ids=lambda path: path.stem)
def test_a_second_job_in_the_folder_is_refused(script, data, tmp_path):
    """By one line that names the first. What it was killed in the middle of is no obstacle."""
    out, n = tmp_path / "out", 0 if script == SINGLE else 2
    env = environment(str(tmp_path))
    command = [sys.executable, str(script), *map(str, paths(data, out)), *map(str, FLAGS)]
    first = subprocess.Popen([*command, "--epochs", "100000"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    try:
        until(lambda: (out / "history.jsonl").exists())
        stuck = (1,) if script == DDP else ()  # it waits for the first, which torchrun would tell it of
        ranks = start_ranks(n, script, *paths(data, out), *FLAGS, stuck=stuck)
        assert [rank.code for i, rank in enumerate(ranks) if i not in stuck] == [2] * (len(ranks) - len(stuck)), ranks
        (line,) = "".join(rank.stderr for rank in ranks).splitlines()
        assert f"--out {out}: process {first.pid} on " in line and "name another --out" in line
        assert first.poll() is None
        n_epochs = len(read(out))
        until(lambda: len(read(out)) > n_epochs)  # nothing has befallen it
    finally:
        first.kill()
        first.wait()
    assert len(train(n, script, data, out, *FLAGS).history) == 3
    assert "checkpoint.earlier.pt" in {path.name for path in out.iterdir()} or script != RESILIENT


def test_a_disk_without_locks(monkeypatch, tmp_path):
    """One of two runs in a folder ends when it finds the other's line."""

    def no_lock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "lockf", no_lock)
    first, second = History(tmp_path), History(tmp_path)
    first.append(1, SUMS, VAL_SUMS)
    second.append(1, SUMS, VAL_SUMS)
    with pytest.raises(UserError, match=r"history.jsonl: another run writes here as well"):
        first.append(2, SUMS, VAL_SUMS)
    second.append(2, SUMS, VAL_SUMS)
    assert [line["epoch"] for line in read(tmp_path)] == [1, 2]


# In a notebook's process

KERNEL = """
import signal, sys, threading
from IPython.core.interactiveshell import InteractiveShell

def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    return handlers, fd, [thread.name for thread in threading.enumerate() if "_watch" in thread.name]

shell = InteractiveShell()
before = state()
for words in sys.argv[1].split(";"):
    if words.startswith("thread "):
        thread = threading.Thread(target=shell.run_line_magic, args=("run", words.removeprefix("thread ")))
        thread.start()
        thread.join()
    else:
        shell.run_line_magic("run", words)
    for _ in range(50):
        if state() == before:
            break
        threading.Event().wait(0.1)
    print("as before:", state() == before, state(), flush=True)
"""


def test_run_in_a_notebook_leaves_nothing_behind(data, tmp_path):
    """Also after a mistake, and from a thread: handlers, the descriptor that signals are written to, threads, locks."""
    program = tmp_path / "kernel.py"
    program.write_text(KERNEL)
    runs = []
    for script in (DDP, RESILIENT):
        flags = f"{script} --data-dir {data} --out {tmp_path / script.stem} --batch-size 4 --epochs"
        runs += [f"{flags} 2", f"{flags} 2 --lr 9e37", f"{flags} 2", f"thread {flags} 1"]
    command = [sys.executable, str(program), ";".join(runs)]
    options = {"env": environment(str(tmp_path)), "capture_output": True, "text": True, "timeout": patience()}
    done = subprocess.run(command, cwd=tmp_path, **options)
    assert done.returncode == 0, done
    assert done.stdout.count("as before: True") == len(runs) and "Traceback" not in done.stderr, done
    assert done.stderr.count("use a smaller --lr") == 2, done
    for script in (DDP, RESILIENT):
        assert len(read(tmp_path / script.stem)) == 1
        assert train(0, script, data, tmp_path / script.stem, *FLAGS)  # the folder is free


# A host whose name leads nowhere


def test_launches_of_a_notebook_get_an_address(monkeypatch):
    """Where the host's name has none; else they are left alone."""
    names = ("PET_LOCAL_ADDR", "GLOO_SOCKET_IFNAME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for host, found in (("localhost", [None, None]), ("no-such-name.invalid", ["localhost", LOOPBACK])):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(notebook, "get_ipython", mock.MagicMock())
        notebook.setup()
        assert [os.environ.get(name) for name in names] == found
    for name in names:
        monkeypatch.delenv(name)


START = "-m ddp_tutorial --epochs 1 --ranks 2"
PLAIN = f"-m torch.distributed.run --local-addr 127.0.0.1 --standalone --nproc-per-node=2 --nnodes=1 {DDP} --epochs 1"


@pytest.mark.slow
@pytest.mark.parametrize("command", [START, PLAIN], ids=["start", "torchrun"])
def test_a_host_name_that_does_not_resolve(command, data, tmp_path):
    """`python -m ddp_tutorial` starts its ranks all the same, and torchrun with the flag that the README names.

    A notebook's launches take the variables of the first one.
    """
    flags = f"--data-dir {data} --batch-size 4 " if command is PLAIN else ""
    start = f"{sys.executable} {command} {flags}--out {tmp_path / 'out'}"
    inner = f"hostname no-such-name.invalid && exec {start}"
    root = ["unshare", "--uts"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--uts"]
    try:
        if subprocess.run([*root, "hostname", "x.invalid"], capture_output=True).returncode:
            pytest.skip("no other host name can be had here: unshare is not allowed")
    except FileNotFoundError:
        pytest.skip("no other host name can be had here: there is no unshare")
    options = {"cwd": Path(__file__).parents[1], "capture_output": True, "text": True, "timeout": patience()}
    done = subprocess.run([*root, "sh", "-c", inner], **options)
    assert done.returncode == 0, done
    assert command is PLAIN or "Unable to resolve" not in done.stderr  # gloo then warns, and goes on
    assert len(read(tmp_path / "out" / ("results" if command is START else ""))) == 1
