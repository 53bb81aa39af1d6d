"""A launcher that is not torchrun: several processes that know nothing of each other are refused, one alone trains."""

import shutil
import subprocess
import sys

import pytest

from tests.ranks import DDP, RESILIENT, SINGLE, environment, free_port, patience, result, start

SCRIPTS = pytest.mark.parametrize("script", [SINGLE, DDP, RESILIENT], ids=lambda script: script.stem)
VARIABLES = {  # how many there are, which one this is, and what else is set where there is one
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", {"SLURM_NTASKS": 2, "SLURM_JOB_ID": 7}),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", {"OMPI_UNIVERSE_SIZE": 2, "PMIX_RANK": 0}),
    "MVAPICH": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", {"MV2_COMM_WORLD_LOCAL_RANK": 0}),
    "MPICH and Intel MPI": ("PMI_SIZE", "PMI_RANK", {"MPI_LOCALNRANKS": 1, "MPI_LOCALRANKID": 0}),
}
MPIRUN = pytest.mark.parametrize(
    "program, flags",
    [("mpirun.openmpi", ["--oversubscribe", "--allow-run-as-root"]), ("mpirun.mpich", [])],
    ids=["Open MPI", "MPICH"],
)


def says_how(stderr: str, script) -> bool:
    """Whether one line, and only one, is the script's, and it says how to launch."""
    lines = [line for line in stderr.splitlines() if line.startswith(f"{script.name}: error: ")]
    return (
        len(lines) == 1
        and "2 processes without RANK" in lines[0]
        and "torchrun" in lines[0]
        and "Traceback" not in stderr
    )


@SCRIPTS
def test_two_processes_without_rank_are_refused(script, small, tmp_path):
    """Two of each launcher, all at once."""
    settings = [{size: 2, rank: i} for size, rank, _ in VARIABLES.values() for i in (0, 1)]
    processes = start(settings, script, ("--data-dir", small, "--out", tmp_path / "out", "--epochs", 1))
    assert [process.code for process in processes] == [2] * 2 * len(VARIABLES), processes
    for (size, _, _), first, second in zip(VARIABLES.values(), processes[::2], processes[1::2], strict=True):
        assert says_how(first.stderr, script) and not second.stderr, (first, second)
        assert f"({size} is set)" in first.stderr
    assert not (tmp_path / "out").exists()


def test_pmix_alone_tells_no_number(small, tmp_path):
    """The first process cannot know whether there are others. The others can."""
    (other,) = start([{"PMIX_RANK": 1}], SINGLE, ("--data-dir", small, "--out", tmp_path / "out"))
    assert other.code == 2 and other.stderr.count("torchrun") == len(other.stderr.splitlines()) == 1, other
    assert "several processes without RANK (PMIX_RANK is set)" in other.stderr
    check_trains({"PMIX_RANK": 0}, SINGLE, small, tmp_path / "out")


@pytest.mark.parametrize("launcher", VARIABLES)
def test_one_process_alone_trains(launcher, script, small, tmp_path):
    size, rank, others = VARIABLES[launcher]
    check_trains({size: 1, rank: 0} | others, script, small, tmp_path)


def test_the_shell_of_a_job_is_no_task_of_srun(script, small, tmp_path):
    """Of a batch script or of an allocation with two tasks."""
    check_trains({"SLURM_NTASKS": 2, "SLURM_NPROCS": 2, "SLURM_JOB_ID": 7}, script, small, tmp_path)


def test_a_rank_of_torchrun_trains(script, small, tmp_path):
    """srun has started a torchrun on each of two machines, and its ranks inherit what srun has set."""
    rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    srun = {"SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1, "SLURM_NTASKS": 2}
    check_trains(rank | {"MASTER_PORT": free_port()} | srun, script, small, tmp_path)


def check_trains(settings: dict, script, data, out):
    (process,) = start([settings], script, ("--data-dir", data, "--out", out, "--epochs", 1, "--batch-size", 4))
    assert process.code == 0, process
    assert len(result(out).history) == 1


@pytest.mark.slow
@SCRIPTS
@MPIRUN
def test_mpirun(program, flags, script, small, tmp_path):
    if not shutil.which(program):
        pytest.skip(f"there is no {program}")

    def mpirun(n: int, out) -> subprocess.CompletedProcess:
        words = [program, *flags, "-n", n, sys.executable, script, "--data-dir", small, "--out", out, "--epochs", 1]
        words = [*map(str, words), "--batch-size", "4"]
        return subprocess.run(words, env=environment(str(tmp_path)), capture_output=True, text=True, timeout=patience())

    done = mpirun(2, tmp_path / "two")
    assert done.returncode == 2, done
    assert says_how(done.stderr, script), done
    assert not (tmp_path / "two").exists()
    done = mpirun(1, tmp_path / "one")
    assert done.returncode == 0, done
    assert len(result(tmp_path / "one").history) == 1


@pytest.mark.slow
@SCRIPTS
def test_torch_distributed_launch(script, small, tmp_path):
    """It gives each rank a flag that torchrun does not give."""
    words = [sys.executable, "-m", "torch.distributed.launch", "--nproc-per-node=2", script]
    words += ["--data-dir", small, "--out", tmp_path / "out"]
    words = list(map(str, words))
    done = subprocess.run(words, env=environment(str(tmp_path)), capture_output=True, text=True, timeout=patience())
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"{script.name}: error: ")]
    assert done.returncode, done
    assert len(lines) == 1 and "--local-rank" in lines[0] and "torchrun" in lines[0], done
    assert not (tmp_path / "out").exists()
