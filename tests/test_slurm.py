"""Chapter 8's jobs on a real Slurm: two nodes end in the weights of one machine, also if they are taken away."""

import json
from contextlib import ExitStack

import pytest

from tests import slurm_cluster
from tests.ranks import RESILIENT, assert_equal, changed, patience, result, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing())),
]
FLAGS = ("--data-dir", "data/digits", "--epochs", 60, "--batch-size", 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The reader's: the scripts, the jobs, the data. Here the jobs run."""
    return slurm_cluster.workplace(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def cluster():
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(slurm_cluster.Cluster())
        except RuntimeError as error:  # Slurm is here, and what it wants of the machine is not
            pytest.skip(str(error))
        yield cluster
    assert cluster.processes() == []


@pytest.fixture(scope="module")
def expected(folder):
    """What four ranks on one machine make of the same flags."""
    return train(4, RESILIENT, folder / "data" / "digits", folder / "one_machine", *FLAGS[2:])


def ended(cluster, job):
    """What Slurm knows of a job that has ended, and its log."""

    def over():
        known = cluster.job(job)
        return known["JobState"] not in ("PENDING", "RUNNING", "COMPLETING") and known

    known = cluster.until(over, f"job {job} has not ended", patience())
    with open(known["StdOut"]) as log:
        return known, log.read()


def assert_completed(cluster, job, starts=1):
    known, log = ended(cluster, job)
    assert (known["JobState"], known["ExitCode"], known["Restarts"]) == ("COMPLETED", "0:0", str(starts - 1)), log
    assert log.count("4 x ") == starts, log
    assert log.count("going on after epoch") == starts - 1, log
    return log


def epochs(out):
    """The numbers of the epochs in the history."""
    file = out / "history.jsonl"
    return [json.loads(line)["epoch"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("file", ["ddp_job.sbatch", "srun_alone.sbatch"])
def test_two_nodes_of_two_ranks_end_as_four_ranks_on_one_machine(file, cluster, folder, expected):
    job = cluster.submit(file, *FLAGS, folder=folder)
    assert_completed(cluster, job)
    assert_equal(result(folder / f"runs/job_{job}"), expected)


def test_a_later_job_goes_on_in_the_folder_that_its_flags_name(cluster, folder, expected):
    """By the short script. Of two --out the last one counts; without --resume the second job would begin at epoch 1."""
    first = cluster.submit("ddp_short.sbatch", *FLAGS, "--epochs", 30, folder=folder)
    assert_completed(cluster, first)
    out = f"runs/job_{first}"
    second = cluster.submit("ddp_short.sbatch", *FLAGS, "--resume", "--out", out, folder=folder)
    known, log = ended(cluster, second)
    assert (known["JobState"], known["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert f"{out}/checkpoint.pt: going on after epoch 30" in log and epochs(folder / out) == list(range(1, 61)), log
    assert not (folder / f"runs/job_{second}").exists()
    assert_equal(result(folder / out), expected)


def test_a_job_that_makes_room_and_whose_time_is_up_then_goes_on_to_the_same_weights(cluster, folder, expected):
    """The first within its time of grace, in which the ranks are asked and the script is not; then by its trap."""
    job = cluster.submit("ddp_job.sbatch", *FLAGS, folder=folder)
    out = folder / f"runs/job_{job}"
    cluster.until(lambda: epochs(out), "no epoch", patience())
    urgent = ("--partition=urgent", "--nodes=2", "--output=urgent.log")
    urgent = cluster.submit(*urgent, "--wrap", f"wc -l < {out}/history.jsonl", folder=folder)
    known, before = ended(cluster, urgent)
    assert known["JobState"] == "COMPLETED" and 1 <= int(before) < 60, before
    cluster.until(lambda: len(epochs(out)) > int(before), "does not go on", patience())
    assert cluster.job(job)["JobState"] == "RUNNING"
    cluster.ask("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@120 does
    log = assert_completed(cluster, job, starts=3)
    assert log.count("ddp_resilient.py: stopped: ") == 2, log
    assert epochs(out) == list(range(1, 61))
    assert_equal(result(out), expected)


def test_a_bad_file_ends_the_job_with_one_line(cluster, folder):
    """Each restart would find the same: here there are none, to save time."""
    file = changed(folder / "ddp_job.sbatch", "--max-restarts=3", "--max-restarts=0", folder / "once.sbatch")
    job = cluster.submit(file, "--data-dir", "none", folder=folder)
    known, log = ended(cluster, job)
    assert known["JobState"] == "FAILED" and known["ExitCode"] != "0:0" and known["Restarts"] == "0", log
    (mistake,) = (line for line in log.splitlines() if line.startswith("ddp_resilient.py: "))
    assert "none: there is no such folder" in mistake


TASKS = """#!/bin/bash
flags=(--data-dir data/digits --epochs 1 --out)
for script in single_sample ddp_sample ddp_resilient; do
    srun --ntasks=2 bash -c 'python "$@" 2>&1; c=$?; echo code $c; exit $c' task $script.py "${flags[@]}" runs/no
    echo srun $?
done
srun --ntasks=1 python single_sample.py "${flags[@]}" runs/task || exit
python single_sample.py "${flags[@]}" runs/shell
"""


def test_tasks_without_RANK_are_refused_and_one_task_and_the_shell_of_a_job_train(cluster, folder):
    """SLURM_NTASKS is 2 in that shell, which is no task."""
    (folder / "tasks.sbatch").write_text(TASKS)
    job = cluster.submit("--ntasks=2", "--output=tasks.log", "tasks.sbatch", folder=folder)
    known, log = ended(cluster, job)
    assert known["JobState"] == "COMPLETED", log
    lines = [line for line in log.splitlines() if not line.startswith("srun:")]  # whose exit codes it gives as well
    for script in ("single_sample", "ddp_sample", "ddp_resilient"):
        said, lines = lines[:4], lines[4:]
        (mistake,) = (line for line in said if line.startswith(f"{script}.py: error: "))
        assert "2 processes without RANK" in mistake and "torchrun" in mistake
        assert [line for line in said if line != mistake] == ["code 2", "code 2", "srun 2"]
    assert not (folder / "runs" / "no").exists()
    assert epochs(folder / "runs" / "task") == epochs(folder / "runs" / "shell") == [1]
