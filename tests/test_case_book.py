"""Chapter 9: its table of 68 faults leads somewhere, its cases are whole, and some faults that only a test shows.

That the cases lie, are caught and mended on forked ranks is asserted by the chapter itself, which nbmake runs.
"""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ddp_tutorial.show import notebook
from ddp_tutorial.show.difference import difference
from tests.ranks import HANG, Launch, torchrun
from tests.test_notebooks import anchor_of, headings

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CHAPTER = NOTEBOOKS / "09_find_the_fault.ipynb"
SILENT_FIRST = {26, 27, 28, 29, 30, 31, 32, 34, 36, 37, 38, 45, 47, 48}  # each is a case of the chapter
CELLS = json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]
slow = pytest.mark.slow


def rows(text: str) -> dict[int, list[str]]:
    """The numbered rows of Markdown tables: what happens, the right answer, where."""
    found = [[part.strip() for part in line.strip("|").split(" | ")] for line in text.splitlines()]
    numbered = [parts for parts in found if parts[0].isdigit()]
    assert len({parts[0] for parts in numbered}) == len(numbered), "a number stands twice"
    return {int(number): parts for number, *parts in numbered}


ROWS = rows("\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"))


def problem(parts: list[str], page: Path = CHAPTER) -> str | None:
    """What is wrong with a row, or None."""
    if len(parts) != 3 or not all(parts):
        return "it has not three parts"
    *_, where = parts
    if where.startswith("not here: "):
        return None if re.search(r"GPU|Windows|Python 3\.14", where) else "no reason why it is not here"
    links = re.findall(r"\[([^]]+)\]\(([^()\s]+)\)", where)
    for text, link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.is_file():
            return f"no file {name}"
        if anchor and anchor not in map(anchor_of(target), headings(target)):
            return f"no heading {anchor}"
        if target.suffix == ".py" and not re.search(rf"^def {text.strip('`')}\(", target.read_text(), re.M):
            return f"no test {text}"
        if target.suffix == ".ipynb" and not anchor:
            return f"{name} without a heading"
    return None if links else "it leads nowhere"


def test_there_are_68_rows():
    assert sorted(ROWS) == list(range(1, 69))


@pytest.mark.parametrize("number", range(1, 69))
def test_a_row_leads_somewhere(number):
    assert problem(ROWS[number]) is None, ROWS[number]


@pytest.mark.parametrize(
    "where, why",
    [
        ("not here", "it leads nowhere"),
        ("not here: no time", "no reason why it is not here"),
        ("[chapter 4](04_train.ipynb)", "no file 04_train.ipynb"),
        ("[chapter 4](04_train_with_ddp.ipynb)", "04_train_with_ddp.ipynb without a heading"),
        ("[this page](#Nothing-of-the-kind)", "no heading Nothing-of-the-kind"),
        ("[`test_nothing`](../tests/test_case_book.py)", "no test `test_nothing`"),
        ("", "it has not three parts"),
        ("[this page](#All-68-and-where-each-is-shown)", None),
        ("[`test_there_are_68_rows`](../tests/test_case_book.py)", None),
        ("not here: needs GPUs", None),
    ],
)
def test_a_row_that_leads_nowhere_is_known(where, why):
    assert problem(["something", "an answer", where]) == why


def sections() -> dict[str, list[dict]]:
    """The cells below each heading of the third level, up to the next heading."""
    found, current = {}, None
    for cell in CELLS:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and re.search(r"^##+ ", source, re.M):
            name = re.findall(r"^##+ .*", source, re.M)[-1]
            current = found.setdefault(name.removeprefix("### "), []) if name.startswith("### ") else None
        elif current is not None:
            current.append(cell)
    return found


def code(cells: list[dict]) -> str:
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


CASES = {heading: cells for heading, cells in sections().items() if "mended(" in code(cells)}


def test_the_cases_are_those_of_the_table():
    assert len(CASES) == len(SILENT_FIRST)
    linked = {number: re.search(r"\(#([^)]+)\)", ROWS[number][-1])[1] for number in SILENT_FIRST}
    assert sorted(linked.values()) == sorted(heading.replace(" ", "-") for heading in CASES)
    top = "".join(next(cell for cell in CELLS if "| what you see |" in "".join(cell["source"]))["source"])
    assert [anchor for anchor in linked.values() if f"(#{anchor})" not in top] == []


@pytest.mark.parametrize("heading", CASES)
def test_a_case_is_whole(heading):
    """A script, a launch of it, a check that must find something, and the mended script."""
    text = code(CASES[heading])
    (name, *_) = re.findall(r"^%%writefile (\w+)\.py$", text, re.M)
    assert re.search(rf'(launch\(2, |fails\()"{name}\.py"', text)
    assert re.search(rf'caught\(\s*"{name}",', text) or re.search(
        rf"^    {name}\.py > .*code=\$\?$.*^test \$code = 1$", text, re.M | re.S
    )
    assert re.search(rf'mended\(\s*"{name}(_checked)?\.py", *\s*"{name}_mended\.py"', text)
    before = "".join("".join(cell["source"]) for cell in CELLS[: CELLS.index(CASES[heading][0])])
    assert "**Predict:**" in before[before.rindex(f"### {heading}") :] or "**Predict:**" in str(CASES[heading])


@slow
@pytest.mark.parametrize("heading", CASES)
def test_a_case_with_torchrun(heading, tmp_path, monkeypatch):
    """The mended script passes with the real launcher, too, under which each rank is a Python of its own."""
    monkeypatch.chdir(tmp_path)

    def launch(n, script):
        done = torchrun(n, Path(script).resolve())
        assert done.returncode == 0, done
        return done.stdout

    helpers = [cell for cell in CELLS if re.search(r"^def (change|mended|caught)\(", "".join(cell["source"]), re.M)]
    names = {"Path": Path, "re": re, "difference": difference}
    exec(code(helpers), names)
    names |= {"launch": launch, "fails": lambda script, pattern: None}  # that it is caught, the page has shown
    for cell in CASES[heading]:
        text = "".join(cell["source"])
        if text.startswith("%%writefile"):
            name = text.split("\n")[0].split()[1]
            Path(name).write_text(notebook.written_file(CHAPTER, name))
        elif cell["cell_type"] == "code" and re.match(r"(caught|mended)\(", text):
            exec(text, names)
    assert list(tmp_path.glob("*_mended.py"))


@slow
def test_the_variable_switches_detail_on_as_the_function_does(tmp_path, monkeypatch):
    """What chapter 9 says of `with_detail.py`: shapes are named; a DDP model is borne in both ways, or in none."""
    for name in ("uneven_gather", "only_wrap", "with_detail"):
        (tmp_path / f"{name}.py").write_text(notebook.written_file(CHAPTER, f"{name}.py"))

    def ends(script):
        runs = [torchrun(2, tmp_path / "with_detail.py", tmp_path / script)]
        with monkeypatch.context() as patch:
            patch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
            runs.append(torchrun(2, tmp_path / script))
        return [(run.returncode, "Collectives differ" in run.stderr, "SIGSEGV" in run.stderr) for run in runs]

    assert ends("uneven_gather.py") == [(1, True, False)] * 2
    by_function, by_variable = ends("only_wrap.py")
    assert by_variable == by_function and by_variable in ((0, False, False), (1, False, True))


# Faults of the table that only a test shows


class Numbered(IterableDataset):
    """One sample: the number of the epoch, as its reader has it."""

    def __init__(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield int(self.epoch)


def epochs_read(epoch, persistent):
    data = Numbered(epoch)
    loader = DataLoader(
        data, None, num_workers=1, persistent_workers=persistent, multiprocessing_context="fork"
    )  # a worker is a copy of this process
    read = []
    for number in range(3):
        if isinstance(epoch, torch.Tensor):
            data.epoch.fill_(number)
        else:
            data.epoch = number
        read += [int(sample) for sample in loader]
    return read


def test_persistent_workers_keep_the_first_epoch():
    assert epochs_read(0, persistent=True) == [0, 0, 0]
    assert epochs_read(0, persistent=False) == [0, 1, 2]
    assert epochs_read(torch.zeros((), dtype=torch.int64).share_memory_(), persistent=True) == [0, 1, 2]


@pytest.mark.parametrize("n_ranks, reached", [(1, 0.0), (2, 0.5), (4, 0.75)])
def test_a_schedule_counted_in_batches_of_one_process(n_ranks, reached):
    """It is to end at a learning rate of 0. With more ranks there are fewer steps, and it does not come so far."""
    data, epochs = range(64), 3
    total = epochs * len(DataLoader(data, batch_size=4))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=total)
    for _ in range(epochs):
        for _ in DataLoader(data, 4, sampler=DistributedSampler(data, n_ranks, 0)):
            optimizer.step()
            schedule.step()
    assert schedule.get_last_lr()[0] == pytest.approx(reached, abs=1e-9)


def test_a_random_state_of_numpy_is_not_loaded(tmp_path):
    torch.save(
        {"random": np.random.default_rng(0).bytes, "state": np.random.RandomState(0).get_state()}, tmp_path / "a"
    )
    with pytest.raises(Exception, match="[Ww]eights.only"):
        torch.load(tmp_path / "a", weights_only=True)
    _, keys, position, *_ = np.random.RandomState(0).get_state()
    torch.save({"keys": torch.from_numpy(keys.astype(np.int64)), "position": position}, tmp_path / "b")
    assert torch.load(tmp_path / "b", weights_only=True)["position"] == position


BREAKING = """
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
dist.init_process_group("gloo")
rank, secret = dist.get_rank(), 42
torch.distributed.breakpoint(1)
dist.barrier()
dist.destroy_process_group()
"""


@slow
def test_a_breakpoint_on_one_rank(tmp_path):
    (tmp_path / "breaking.py").write_text(BREAKING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "breaking.py"]
    typed = "up\np (rank, secret)\nc\n"  # up, out of the function that stops
    done = subprocess.run(command, cwd=tmp_path, input=typed, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0 and "(1, 42)" in done.stdout, done


SAVING = """
import os, signal, sys, time
from pathlib import Path
def note(what):
    Path(sys.argv[1], what + os.environ["RANK"]).touch()
def save(*_):
    time.sleep(4)
    note("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
note("runs")
while True:
    time.sleep(0.1)
"""


@slow
@pytest.mark.parametrize("patience, n_saved", [(1, 0), (60, 2)])
def test_torchrun_waits_for_a_save_as_long_as_it_is_told(patience, n_saved, tmp_path):
    (tmp_path / "saving.py").write_text(SAVING)
    with Launch(2, tmp_path / "saving.py", tmp_path, options=(f"--shutdown-timeout={patience}",)) as launch:
        while len(list(tmp_path.glob("runs?"))) < 2:
            assert launch.agent.poll() is None
            time.sleep(0.1)
        launch.agent.send_signal(signal.SIGTERM)
        launch.wait()
    assert len(list(tmp_path.glob("saved?"))) == n_saved
