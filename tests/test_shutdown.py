"""After destroy_process_group no thread of gloo is left, which could abort a rank that has done its work."""

import shutil
import signal
import sys
from pathlib import Path

import pytest

import ddp_tutorial
from tests.edit import is_main, put_before, replace_call
from tests.ranks import DDP, RESILIENT, changed, start_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads thread names from /proc")
EARLY_IMPORT = "import torch.distributed.nn.functional"

REPORT_THREADS = """from pathlib import Path


def and_report(main):
    try:
        main()
    finally:
        names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
        print("threads:", *names, sep="|", flush=True)


"""
MAIN = {DDP: ("process.run", "and_report(lambda: process.run(main))"), RESILIENT: ("main", "and_report(main)")}


def reporting_ranks(script, data, tmp_path, lr=1, **options):
    """Two ranks that say which threads they have once `main` has ended."""
    copy = replace_call(script, *MAIN[script], tmp_path / script.name)
    put_before(copy, is_main, REPORT_THREADS, copy)
    flags = ("--data-dir", data, "--out", tmp_path / "out", "--lr", lr, "--epochs", 50, "--device", "cpu")
    return start_ranks(2, copy, *flags, **options)


def gloo_threads(script, data, tmp_path, lr=1, codes=(0,), package=None):
    """The names of gloo's threads left on each of two fresh ranks, which are to leave with one of `codes`.

    With `package`, they import `ddp_tutorial` from that folder.
    """
    rank_env = {rank: {"PYTHONPATH": package} for rank in range(2)} if package else None
    fresh = {"fork": False, "rank_env": rank_env}  # a forked rank inherits the early import
    ranks = reporting_ranks(script, data, tmp_path, lr, **fresh)
    assert all(rank.code in codes for rank in ranks), ranks
    said = [rank.stdout.splitlines()[-1].split("|") for rank in ranks]
    assert all(title == "threads:" and names for title, *names in said), ranks
    return [sorted(name for name in names if "gloo" in name) for names in said]


@pytest.mark.parametrize("script", [DDP, pytest.param(RESILIENT, marks=pytest.mark.slow)], ids=["ddp", "resilient"])
def test_no_gloo_thread_is_left(script, small, tmp_path):
    assert gloo_threads(script, small, tmp_path) == [[], []]


@pytest.mark.slow
def test_no_gloo_thread_is_left_by_a_mistake_in_training(script, small, tmp_path):
    """An exception on its way out holds the frames, and so the model, of the functions that it passes."""
    assert gloo_threads(script, small, tmp_path, lr=9e37, codes=(2,)) == [[], []]


def test_a_mistake_in_training_ends_a_rank_at_once(ddp, small, tmp_path):
    """The script that shows DDP leaves its group to the system then: a shutdown could abort, one of fifty did."""
    for lr, code, unwinds in ((1, 0, True), (9e37, 2, False)):
        ranks = reporting_ranks(ddp, small, tmp_path, lr)
        assert [(rank.code, "threads:" in rank.stdout) for rank in ranks] == [(code, unwinds)] * 2, ranks


@pytest.mark.slow
@pytest.mark.parametrize("script", [DDP, RESILIENT], ids=["ddp", "resilient"])
def test_they_are_left_without_the_early_import(script, small, tmp_path):
    """If this fails, torch has cured it, and the package can lose a line."""
    package = tmp_path / "late" / "ddp_tutorial"
    shutil.copytree(Path(ddp_tutorial.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    changed(package / "__init__.py", EARLY_IMPORT, f"WITHOUT = {EARLY_IMPORT!r}", package / "__init__.py")
    codes = (0, -signal.SIGABRT)  # now and then such a thread aborts its rank: that is the defect
    names = gloo_threads(script, small, tmp_path, codes=codes, package=package.parent)
    assert all("pt_gloo_runloop" in rank for rank in names)
