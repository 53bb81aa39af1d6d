"""Chapter 9: its table of 68 faults leads somewhere, its cases are whole, and some faults that only a test shows.

That the cases lie, are caught and mended on forked ranks is asserted by the chapter itself, which nbmake runs.
"""

import ast
import json
import random
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
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ddp_tutorial.show import notebook
from ddp_tutorial.show.difference import difference
from tests.ranks import Launch, patience, torchrun
from tests.test_notebooks import anchor_of, headings

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CHAPTER = NOTEBOOKS / "09_find_the_fault.ipynb"
SILENT_FIRST = {6, 26, 27, 28, 29, 30, 31, 32, 34, 36, 37, 38, 45, 47, 48}  # each is a case of the chapter
CELLS = json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]
slow = pytest.mark.slow


def rows(text: str) -> dict[int, list[str]]:
    """The numbered rows of Markdown tables: what happens, the right answer, where, what the doctor says."""
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


def test_there_are_68_rows_and_each_leads_somewhere():
    assert sorted(ROWS) == list(range(1, 69))
    wrong = {number: problem(parts[:3]) for number, parts in ROWS.items()}
    assert {number: why for number, why in wrong.items() if why} == {}
    said = {number: doctor for number, (*_, doctor) in ROWS.items()}
    assert set(said.values()) == {"BROKEN", "SUSPECT", "NOTE", ""}
    assert {number for number in SILENT_FIRST if said[number] != "BROKEN"} == {6}  # what a number means is not seen


def test_a_row_that_leads_nowhere_is_known():
    for place, why in {
        "not here": "it leads nowhere",
        "not here: no time": "no reason why it is not here",
        "[chapter 4](04_train.ipynb)": "no file 04_train.ipynb",
        "[chapter 4](04_train_with_ddp.ipynb)": "04_train_with_ddp.ipynb without a heading",
        "[this page](#Nothing-of-the-kind)": "no heading Nothing-of-the-kind",
        "[`test_nothing`](../tests/test_case_book.py)": "no test `test_nothing`",
        "": "it has not three parts",
    }.items():
        assert problem(["something", "an answer", place]) == why


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
    linked = {number: re.search(r"\(#([^)]+)\)", ROWS[number][2])[1] for number in SILENT_FIRST}
    assert sorted(linked.values()) == sorted(heading.replace(" ", "-") for heading in CASES)
    top = "".join(next(cell for cell in CELLS if "| what you see |" in "".join(cell["source"]))["source"])
    assert [anchor for anchor in linked.values() if f"(#{anchor})" not in top] == []


def statements(cells: list[dict], *functions: str) -> list[str]:
    """The statements of code cells that call one of these functions and do nothing else, in their order."""
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    nodes = [(text, node) for text in sources if not text.startswith("%") for node in ast.parse(text).body]
    calls = [(text, node) for text, node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    return [ast.get_source_segment(text, node) for text, node in calls if ast.unparse(node.value.func) in functions]


def lacking(heading: str) -> list[str]:
    """What a case has not: a launch of its script, a check that must find something, the mended script, and a question.

    A case that is there to be looked up says in place of the question what is seen, and the cause.
    """
    text = code(CASES[heading])
    (name, *_) = re.findall(r"^%%writefile (\w+)\.py$", text, re.M)
    before = "".join("".join(cell["source"]) for cell in CELLS[: CELLS.index(CASES[heading][0])])
    asked = before[before.rindex(f"### {heading}") :] + str(CASES[heading])
    parts = {
        "launched": re.search(rf'(launch\(2, |fails\("[^"]*", )"{name}\.py"', text),
        "caught": re.search(rf'caught\(\s*"{name}",', text)
        or re.search(rf'^try:\n    launch\(2, "with_detail\.py", "{name}\.py"\)\n    raise', text, re.M),
        "mended": re.search(rf'mended\(\s*"{name}(_checked)?\.py", *\s*"{name}_mended\.py"', text),
        "a question": "**Predict:**" in asked or ("**Seen:**" in asked and "**Cause:**" in asked),
    }
    return [part for part, is_there in parts.items() if not is_there]


def test_each_case_is_whole():
    missing = {heading: lacking(heading) for heading in CASES}
    assert {heading: parts for heading, parts in missing.items() if parts} == {}


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
    names |= {"launch": launch, "fails": lambda pattern, script: None}  # that it is caught, the page has shown
    for name in re.findall(r"^%%writefile (.*)", code(CASES[heading]), re.M):
        Path(name).write_text(notebook.written_file(CHAPTER, name))
    for statement in statements(CASES[heading], "caught", "mended"):
        exec(statement, names)
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
    # A worker is a copy of this process.
    options = {"persistent_workers": persistent, "multiprocessing_context": "fork"}
    loader = DataLoader(data, None, num_workers=1, **options)
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


class Augmented(Dataset):
    """Each sample is what its worker draws: a number of PyTorch's generator, and one of Python's."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.rand(()).item(), random.random()


def draws_of_a_rank(seed):
    torch.manual_seed(seed)
    loader = DataLoader(Augmented(), None, num_workers=2, multiprocessing_context="fork")
    return {number for sample in loader for number in sample}


def test_workers_draw_by_the_seed_of_their_rank():
    """With one seed, all ranks augment alike. The workers of a rank never do: PyTorch seeds each of them."""
    assert draws_of_a_rank(seed=0) == draws_of_a_rank(seed=0)
    assert len(draws_of_a_rank(seed=0)) == 4 * 2
    assert not draws_of_a_rank(seed=0) & draws_of_a_rank(seed=1)


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
    done = subprocess.run(command, cwd=tmp_path, input=typed, capture_output=True, text=True, timeout=patience())
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
