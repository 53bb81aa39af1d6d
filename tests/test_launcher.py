"""The launcher of ranks: where they meet, how they end, and what it tells of those that fail."""

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddp_tutorial.launcher import TIME_IS_UP, Rank, launch, meeting_point, rank_variables, run_ranks

MEETS = """import sys
import torch
import torch.distributed as dist

def fail():
    raise ValueError("rank 1 has had enough")

dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank())
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {total}")
if "fail" in sys.argv and dist.get_rank() == 1:
    fail()
if "fail" in sys.argv:
    dist.barrier()  # for a rank that has left
dist.destroy_process_group()
"""
MET = "rank 0 of 2: 1\nrank 1 of 2: 1"
SHOWS_ITSELF = """import json, os, sys
ends, begins = ("RANK", "WORLD_SIZE"), ("MASTER_", "TORCHELASTIC_")
names = [name for name in os.environ if name.endswith(ends) or name.startswith(begins)]
print(json.dumps([sorted(names), sys.argv, os.path.basename(sys.path[0]), __name__]))
"""
STANDS_STILL = """import time

def stand_still():
    time.sleep(1000)

print("it begins", flush=True)
stand_still()
"""
BOTH_WAYS = pytest.mark.parametrize("fork", [True, False], ids=["forked", "fresh"])


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes the text to `script.py` in the current folder, one of the test's own."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("script.py").write_text(text)
        return "script.py"

    return write


@pytest.mark.slow
def test_three_launchers_side_by_side_do_not_collide(script):
    name = script(MEETS)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda i: launch(2, name), range(12))) == [MET] * 12


def test_the_port_stays_the_launchers_own():
    """Picked and let go, it could be another's before the first rank listens there."""
    with meeting_point() as one, meeting_point() as other:
        assert one["MASTER_PORT"] != other["MASTER_PORT"]
        for place in (one, other):
            with pytest.raises(OSError), socket.create_server(("", int(place["MASTER_PORT"]))):
                pass
    with socket.create_server(("", int(one["MASTER_PORT"]))):
        pass  # let go at the end


@BOTH_WAYS
def test_ranks_meet(fork, script):
    ranks = run_ranks(2, [script(MEETS)], fork=fork)
    assert [(rank.code, rank.stdout) for rank in ranks] == [(0, f"{line}\n") for line in MET.splitlines()], ranks


def test_rank_variables():
    same = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert rank_variables(2) == [same | {"RANK": "0", "LOCAL_RANK": "0"}, same | {"RANK": "1", "LOCAL_RANK": "1"}]


@BOTH_WAYS
def test_without_ranks_it_is_a_plain_process(fork, script, monkeypatch):
    """Also where this process is a rank itself."""
    for name, value in rank_variables(2)[1].items():
        monkeypatch.setenv(name, value)
    (process,) = run_ranks(0, [script(SHOWS_ITSELF), "--lr", 1], fork=fork)
    expected = f'[[], ["script.py", "--lr", "1"], "{Path.cwd().name}", "__main__"]\n'
    assert process == Rank(0, expected, "")


def test_a_failing_rank_is_named_with_its_traceback(script):
    name = script(MEETS)
    with pytest.raises(RuntimeError) as failure:
        launch(2, name, "fail")
    codes, *lines = str(failure.value).splitlines()
    assert codes in ("exit codes [-15, 1]", "exit codes [1, 1]"), failure.value  # that of rank 0 if it notices in time
    of_rank_1 = lines[lines.index("rank 1, exit code 1:") :]
    assert of_rank_1[1:3] == ["rank 1 of 2: 1", "Traceback (most recent call last):"]
    assert of_rank_1[3].startswith('  File "script.py", line ') and of_rank_1[3].endswith(", in <module>")
    assert "ValueError: rank 1 has had enough" in of_rank_1
    assert not [line for line in lines if "runpy" in line or "multiprocessing" in line or "launcher.py" in line]


@pytest.mark.parametrize(
    "text, code, says",
    [
        ("import sys\nsys.exit('no data')\n", 1, "no data"),
        ("import sys\nsys.exit(3)\n", 3, ""),
        ("1 +\n", 1, "SyntaxError: invalid syntax"),
        ("import os\nos.kill(os.getpid(), 9)\n", -9, ""),
    ],
    ids=["a message", "a code", "no Python", "a signal"],
)
def test_how_a_script_can_fail(text, code, says, script):
    with pytest.raises(RuntimeError) as failure:
        launch(0, script(text))
    first, *lines = str(failure.value).splitlines()
    assert first == f"exit codes [{code}]" and (lines[-1:] or [""]) == [says], failure.value


@BOTH_WAYS
def test_a_rank_that_stands_still_is_ended_and_says_where(fork, script):
    run_ranks(0, [script("")])  # starts the server, which takes longer
    (process,) = run_ranks(0, [script(STANDS_STILL)], fork=fork, time_limit=3)
    assert process.code == -signal.SIGABRT and process.stdout == "it begins\n"
    assert "line 4 in stand_still" in process.stderr and TIME_IS_UP in process.stderr.splitlines()[-1], process


def test_a_rank_with_its_work_done_leaves_although_a_thread_goes_on(script):
    text = "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nprint('all done')\n"
    assert launch(0, script(text)) == "all done"


def test_an_interrupted_launch_leaves_no_rank(script):
    text = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(1000)\n"

    def interrupted(codes):
        if Path("pid").exists() and Path("pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ranks(0, [script(text)], enough=interrupted)
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


@BOTH_WAYS
def test_ranks_draw_other_numbers_unless_they_are_seeded(fork, script):
    """A copy would go on with the random numbers of the process that it is a copy of."""
    text = "import random, numpy, torch\nprint(random.random(), numpy.random.rand(), torch.rand(1).item())\n"
    one, two = (rank.stdout.split() for rank in run_ranks(2, [script(text)], fork=fork))
    assert len(one) == 3 and all(a != b for a, b in zip(one, two, strict=True))


@pytest.mark.slow
def test_a_model_that_is_left_after_its_group_does_not_hold_a_rank(script):
    """Of 20 launches of such a script 3 stood still, when the script's names went before the process did."""
    name = script("""import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(2, 2))
for _ in range(3):
    model(torch.ones(4, 2)).sum().backward()
dist.destroy_process_group()
""")
    for _ in range(20):
        launch(2, name)
