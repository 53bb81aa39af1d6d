"""After destroy_process_group no thread of gloo is left, which could abort a rank that has done its work."""

import signal
import sys

import pytest

from tests.ranks import changed, start_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads thread names from /proc")

REPORT_THREADS = """    try:
        main()
    finally:
        names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
        print("threads:", *names, sep="|", flush=True)
"""


def gloo_threads(script, data, tmp_path, lr=1, codes=(0,)):
    """The names of gloo's threads left on each of two fresh ranks, which are to leave with one of `codes`."""
    reporting = changed(script, '"__main__":\n    main()', '"__main__":\n' + REPORT_THREADS, tmp_path / "reporting.py")
    flags = ("--data-dir", data, "--out", tmp_path / "out", "--lr", lr, "--epochs", 50, "--device", "cpu")
    ranks = start_ranks(2, reporting, *flags, fork=False)  # a forked rank inherits the import that is at stake
    assert all(rank.code in codes for rank in ranks), ranks
    said = [rank.stdout.splitlines()[-1].split("|") for rank in ranks]
    assert all(title == "threads:" and names for title, *names in said), ranks
    return [sorted(name for name in names if "gloo" in name) for names in said]


def test_no_gloo_thread_is_left(script, small, tmp_path):
    assert gloo_threads(script, small, tmp_path) == [[], []]


def test_no_gloo_thread_is_left_by_a_mistake_in_training(script, small, tmp_path):
    """An exception on its way out holds the frames, and so the model, of the functions that it passes."""
    assert gloo_threads(script, small, tmp_path, lr=9e37, codes=(2,)) == [[], []]


def test_they_are_left_without_the_early_import(script, small, tmp_path):
    """If this fails, torch has cured it, and the script can lose a line."""
    line = "import torch.distributed.nn.functional"
    late = changed(script, line, "#" + line, tmp_path / "late.py")
    codes = (0, -signal.SIGABRT)  # now and then such a thread aborts its rank: that is the defect
    assert all("pt_gloo_runloop" in names for names in gloo_threads(late, small, tmp_path, codes=codes))
