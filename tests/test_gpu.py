"""On a GPU: one process, and four NCCL ranks that share it (tests/one_gpu.py). `pytest -m gpu` runs these tests."""

import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.edit import calls, is_class, put_before
from tests.ranks import (
    DDP,
    RESILIENT,
    SINGLE,
    Launch,
    assert_equal,
    assert_same,
    hundred_samples,
    losses,
    result,
    save_data,
    start_ranks,
    train,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]

ONE_GPU = Path(__file__).with_name("one_gpu.py")
SIZES = ("--batch-size", 4, "--epochs", 4)  # epochs of 25 steps: stops are agreed on after the steps 10, 20 and 25
CLOSE = {"rtol": 1e-5, "atol": 5e-6}  # for other numbers of ranks and other devices
LIMIT = 300  # seconds after which a launch hangs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return hundred_samples(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    """One process on the CPU."""
    return train(0, RESILIENT, data, tmp_path_factory.mktemp("cpu"), *SIZES, "--device", "cpu", timeout=LIMIT)


@pytest.fixture(scope="module")
def four_ranks(data, tmp_path_factory):
    """Four NCCL ranks that nothing befalls."""
    out = tmp_path_factory.mktemp("four")
    ranks = four(RESILIENT, data, out)
    assert codes(ranks) == [0] * 4, ranks
    assert ranks[0].stdout.startswith("the data are on the GPU\n4 x cuda: 25 steps an epoch\n")
    return result(out)


def four(script, data, out, *flags):
    return start_ranks(4, ONE_GPU, script, "--data-dir", data, "--out", out, *SIZES, *flags, timeout=LIMIT)


def codes(ranks):
    return [rank.code for rank in ranks]


def assert_close(run, expected):
    torch.testing.assert_close(losses(run.history), losses(expected.history), **CLOSE)
    torch.testing.assert_close(run.model, expected.model, **CLOSE)


def at(script, path, moment, do):
    """Write a copy of the resilient script that runs the statement `do` before the step that `moment` is true of."""
    function = f"""import time


def before_each_step(batches, epoch, run):
    for i, batch in enumerate(batches):
        if {moment}:
            {do}
        yield batch


"""
    copy = put_before(script, is_class, function, path)
    return put_before(copy, calls("train_one_epoch"), "batches = before_each_step(batches, epoch, run)", copy)


@pytest.mark.parametrize("script", [SINGLE, RESILIENT], ids=lambda path: path.stem)
def test_one_process_equals_the_cpu(script, data, one_process, tmp_path):
    runs = {}
    for place, words in (("gpu", "on the GPU"), ("cpu", "in main memory")):
        out, flags = tmp_path / place, ("--device", "cuda", "--data-on", place)
        ranks = start_ranks(0, script, "--data-dir", data, "--out", out, *SIZES, *flags, timeout=LIMIT)
        assert codes(ranks) == [0], ranks
        assert ranks[0].stdout.startswith(f"the data are {words}\n1 x cuda: 25 steps an epoch\n")
        runs[place] = result(out)
    assert_same(runs["gpu"][:2], runs["cpu"][:2])  # not the checkpoints' random numbers: a loader draws some
    if script == RESILIENT:  # the others shuffle in another order
        assert_close(runs["gpu"], one_process)
    else:
        cpu = train(0, script, data, tmp_path / "on_cpu", *SIZES, "--device", "cpu", timeout=LIMIT)
        assert_close(runs["gpu"], cpu)


def test_one_nccl_rank(data, one_process, tmp_path):
    assert_close(train(1, DDP, data, tmp_path, *SIZES, "--device", "cuda", timeout=LIMIT), one_process)


def test_more_ranks_than_gpus_take_the_cpu(data, one_process, tmp_path):
    n = next(n for n in (2, 4, 25) if n > torch.cuda.device_count())
    flags = ("--data-dir", data, "--out", tmp_path, *SIZES[2:], "--batch-size", 4 if n < 25 else 25)
    ranks = start_ranks(n, DDP, *flags, timeout=LIMIT)
    assert codes(ranks) == [0] * n, ranks
    assert ranks[0].stdout.startswith(f"{n} x cpu: ")
    if n < 25:
        assert_close(result(tmp_path), one_process)


def test_data_that_do_not_fit_are_refused(data, tmp_path):
    little_memory = "torch.cuda.mem_get_info = lambda _: (900, 900)"
    too_much = put_before(SINGLE, is_class, little_memory, tmp_path / "a.py")
    flags = ("--data-dir", data, "--out", tmp_path / "out", *SIZES)
    (rank,) = start_ranks(0, too_much, *flags, "--data-on", "gpu", timeout=LIMIT)
    assert (rank.code, rank.stderr.count("\n")) == (2, 1), rank
    assert "--data-on gpu: the data take 3.2e-06 GB" in rank.stderr
    (rank,) = start_ranks(0, too_much, *flags, timeout=LIMIT)
    assert rank.code == 0 and rank.stdout.startswith("the data are in main memory\n1 x cuda: "), rank


def test_four_nccl_ranks_are_one_process(data, four_ranks, one_process, tmp_path):
    assert_close(four_ranks, one_process)
    with Launch(4, ONE_GPU, DDP, "--data-dir", data, "--out", tmp_path, *SIZES) as launch:
        done = launch.wait(LIMIT)
    assert done.returncode == 0, done
    assert done.stdout.startswith("the data are on the GPU\n4 x cuda: 25 steps an epoch\n")
    assert_close(result(tmp_path), one_process)


@pytest.mark.parametrize("script", [DDP, RESILIENT], ids=lambda path: path.stem)
def test_bad_data_is_one_line_on_four_nccl_ranks(script, data, tmp_path):
    bad = save_data(tmp_path / "bad", **{path.stem: np.load(path) for path in data.glob("*.npy")})
    np.save(bad / "y_train.npy", np.arange(100) - 1)
    with Launch(4, ONE_GPU, script, "--data-dir", bad, "--out", tmp_path / "out", *SIZES) as launch:
        done = launch.wait(LIMIT)
    assert re.findall(r"^\w+\.py: error: .+$", done.stderr, re.M) == [
        f"{script.name}: error: {bad}/y_train.npy: the label -1 is negative: number the classes 0, 1, 2, ..."
    ]
    assert re.findall(r"exitcode  : (-?\d+)", done.stderr) == ["2"] * 4, done.stderr


def test_a_killed_nccl_rank(data, four_ranks, tmp_path):
    """The others wait for it in a call that no handler interrupts; torchrun would kill them after half a minute."""
    moment = "(rank, epoch, i) == (1, 3, 13) and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    dying = at(RESILIENT, tmp_path / "at.py", moment, f"os.kill(os.getpid(), {int(signal.SIGKILL)})")
    flags = ("--data-dir", data, "--out", tmp_path / "out", *SIZES)
    with Launch(4, ONE_GPU, dying, *flags, restarts=1) as launch:
        while launch.agent.poll() is None and 1 not in launch.ranks():
            time.sleep(0.01)
        while 1 in launch.ranks():
            time.sleep(0.01)
        noticed = time.monotonic()
        while launch.agent.poll() is None and not launch.ranks(restart=1):
            time.sleep(0.1)
        print(f"{time.monotonic() - noticed:.1f} s from the rank's death until the others had ended and new ones ran")
        done = launch.wait(LIMIT)
        assert done.returncode == 0, done
    assert "going on after epoch 2" in done.stdout
    assert "forcefully exiting" not in done.stderr, done.stderr  # torchrun's word for SIGKILL
    assert_equal(result(tmp_path / "out"), four_ranks)


def test_nccl_ranks_are_asked_to_stop(data, four_ranks, tmp_path):
    asked = (
        f"os.kill(os.getppid(), {int(signal.SIGTERM)}); [time.sleep(0.01) for _ in range(1000) if not run.stop.noted]"
    )
    stopping = at(RESILIENT, tmp_path / "at.py", "(rank, epoch, i) == (0, 2, 13)", asked)
    flags = ("--data-dir", data, "--out", tmp_path / "out", *SIZES)
    with Launch(4, ONE_GPU, stopping, *flags) as launch:
        done = launch.wait(LIMIT)
    assert "stopped: in epoch 2, as asked: go on with --resume" in done.stderr, done
    ranks = four(RESILIENT, data, tmp_path / "out", "--resume")
    assert codes(ranks) == [0] * 4, ranks
    assert "going on after epoch 1 and 80 samples" in ranks[0].stdout
    assert_equal(result(tmp_path / "out"), four_ranks)


def test_a_stopped_nccl_rank_is_given_up(data, tmp_path):
    """After `--timeout`, and the few seconds in which all write down what they did last; not a minute later."""
    stop = f"os.kill(os.getpid(), {int(signal.SIGSTOP)})"
    stopping = at(RESILIENT, tmp_path / "at.py", "(rank, epoch, i) == (1, 2, 13)", stop)
    flags = ("--data-dir", data, "--out", tmp_path / "out", *SIZES, "--timeout", 10)
    with Launch(4, ONE_GPU, stopping, *flags) as launch:
        while launch.agent.poll() is None and not stopped(launch):
            time.sleep(0.1)
        start = time.monotonic()
        while launch.agent.poll() is None and len(launch.ranks()) > 1:
            time.sleep(0.1)
        seconds = time.monotonic() - start
        print(f"given up {seconds:.1f} s after it stood still, with --timeout 10")
        done = launch.wait(LIMIT)
    assert done.returncode == 1, done
    assert "exitcode  : -6" in done.stderr, done.stderr  # SIGABRT, by the watchdog
    assert seconds < 55, done.stderr  # torch's own settings add a minute to the timeout


def stopped(launch) -> bool:
    """Whether a rank of the launch stands still."""
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] for pid in launch.ranks().values()]
    return "T" in states


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_the_command_of_the_readme_on_four_gpus(data, one_process, tmp_path):
    with Launch(4, DDP, "--data-dir", data, "--out", tmp_path, *SIZES) as launch:
        done = launch.wait(LIMIT)
    assert done.returncode == 0, done
    assert done.stdout.startswith("the data are on the GPU\n4 x cuda: 25 steps an epoch\n")
    assert_close(result(tmp_path), one_process)
