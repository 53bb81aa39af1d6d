"""The doctor's promises: it changes nothing, names the user's lines, and says in one line what it cannot do."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from ddp_tutorial.check.__main__ import main
from ddp_tutorial.check.watch import install
from tests.check.doctor import PATIENT, check, check_text, has, say, short
from tests.check.planted import BASE, FAULTS, FEATURES, edited, line_with
from tests.ranks import assert_same, data_gen, result, train

STYLES = Path(__file__).with_name("styles")
BY_NAME = {fault.name: fault for fault in FAULTS}
TOGETHER = {  # faults that one script can have at once -> the features that they need
    (
        "no_set_epoch",
        "batch_norm",
        "padded",
        "all_save",
        "one_augmentation",
        "group_left_open",
        "unused_looked_for",
    ): (),
    ("own_scale", "own_share", "module_names", "all_write", "all_download"): ("SCALER",),
}


SECOND_LAUNCH = [pytest.param(faults, marks=pytest.mark.slow) for faults in list(TOGETHER)[1:]]


@pytest.mark.parametrize("faults", [next(iter(TOGETHER)), *SECOND_LAUNCH], ids=lambda faults: faults[0])
def test_several_faults_at_once(faults, tmp_path):
    """One launch for several rows of the table: each is named, in its line."""
    rows = [BY_NAME[name] for name in faults]
    features = [FEATURES[name] for name in TOGETHER[faults]]
    text = edited(*features, *(row.edits for row in rows))
    report = check_text(tmp_path, text, "--batches", "3")
    for row in rows:
        assert has(report, row.level, row.rule, line_with(text, row.at.strip("\n")) if row.at else None), (
            row.name,
            short(report),
        )
    assert {f["rule"] for f in report["findings"]} <= {row.rule for row in rows} | {"ranks drop other units"}


def test_a_hang_is_named(tmp_path):
    """A rank that waits in a call of its own; the time limits are short, so that it need not wait long."""
    fault = BY_NAME["one_waits"]
    text = edited(fault.edits)
    report = check_text(tmp_path, text, *fault.flags)
    assert report["end"] == "hang"
    assert has(report, fault.level, fault.rule, line_with(text, fault.at)), short(report)


LOST = """
import time
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        while dist.get_rank() == 0:
            time.sleep(1)
        return torch.ones(3)


dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
for x in DataLoader(Numbers(), 4, num_workers=1):
    model(x).sum().backward()
dist.destroy_process_group()
"""


def test_a_worker_that_gives_nothing_is_no_missing_call(tmp_path):
    """The other rank waits in a call that this one has not made yet: none of the script's rules is broken by that."""
    report = check_text(tmp_path, LOST, "--seconds", "60", "--patience", "3")
    assert short(report, "BROKEN") == [] and report["end"] == "hang"
    assert has(report, "SUSPECT", "no rank waits for ever", line_with(LOST, "for x in")), short(report)
    assert "rank 0 waits for a worker of its DataLoader at train.py" in " ".join(short(report))


def test_a_made_up_gpu(tmp_path):
    fault = BY_NAME["one_gpu"]
    text = edited(fault.feature, fault.edits)
    report = check_text(tmp_path, text, "--gpu", "made-up")
    assert has(report, fault.level, fault.rule, line_with(text, fault.at)), short(report)
    assert report["gpu"] == "made-up"


@pytest.mark.slow
def test_forked_ranks_say_the_same(tmp_path):
    """As those of the command, which are new processes."""
    (tmp_path / "train.py").write_text(edited(BY_NAME["own_rate"].edits))
    said = json.loads(say(tmp_path, "--json", *PATIENT, "train.py").stdout)
    forked = check(tmp_path, "train.py")
    assert short(said, "BROKEN") and {**said, "seconds": None} == {**forked, "seconds": None}


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """640 training samples: 5 steps of the script."""
    folder = tmp_path_factory.mktemp("data")
    assert data_gen("gaussian", "--out", folder, "--n-train", 640, "--n-val", 200) == 0
    return folder


def test_it_changes_nothing(ddp, small_data, tmp_path):
    """`ddp_sample.py` ends in the same bits with the doctor and without; nothing is said of it."""
    flags = ("--epochs", "4", "--batch-size", "128")
    without = train(2, ddp, small_data, tmp_path / "without", *flags)
    report = check(tmp_path, ddp, "--data-dir", small_data, "--out", tmp_path / "with", *flags)
    assert report["steps"] == 20 and report["epochs"] == 4 and report["exit_codes"] == [0, 0]
    assert short(report, "BROKEN", "SUSPECT") == []
    assert_same(result(tmp_path / "with")[:2], without[:2])
    files = {path.name for path in (tmp_path / "with").iterdir()}
    (elsewhere,) = [f["seen"] for f in report["findings"] if f["rule"] == "nothing is written outside of the copy"]
    assert str(tmp_path / "with") in elsewhere and "model.pt" in files


@pytest.mark.parametrize(
    "words, line",
    [
        (["no_such.py"], "no_such.py: there is no such file: name a script, or a module after -m"),
        (["-m", "no.such"], "-m no.such: there is no such module here: is the current folder the right one?"),
        (["--ranks", "1", "x.py"], "argument --ranks: 1 is less than 2: see python -m ddp_tutorial.check --help"),
        (["--flag", "x.py"], "unrecognized arguments: --flag: see python -m ddp_tutorial.check --help"),
        ([], "the following arguments are required: SCRIPT, ARGS: see python -m ddp_tutorial.check --help"),
    ],
)
def test_a_mistake_is_one_line(words, line, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err == f"check: {line}\n" and said.out == ""


def test_what_cannot_be_checked_is_one_line(tmp_path):
    """And the script's own last words; no traceback of the doctor's own."""
    (tmp_path / "needs.py").write_text("import no_such_package_at_all\n")
    done = say(tmp_path, "needs.py")
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith("check: needs.py needs the package 'no_such_package_at_all': install it\n")
    assert "ddp_tutorial" not in done.stderr
    (tmp_path / "plain.py").write_text("print('no training')\n")
    done = say(tmp_path, "--json", "plain.py")
    assert done.returncode == 2 and "starts no process group" in json.loads(done.stdout)["error"]


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    for word in ("BROKEN", "SUSPECT", "not seen", "--json", "made-up", "NCCL itself, speed, memory", "Exit code 0"):
        assert word in said


def test_each_function_that_is_replaced_is_there():
    """The private names among them, too, in each release of torch that is admitted."""
    for row in install.REPLACED:
        owner, name = install.owner_of(row.name)
        assert callable(getattr(owner, name)), row.name
    torch._C.DisableTorchFunction()
    loss = (torch.ones(1, requires_grad=True) / 4).sum() * 0.5
    assert loss.grad_fn.name() == "MulBackward0" and loss.grad_fn._saved_other.item() == 0.5
    divided = torch.ones((), requires_grad=True) / 4
    assert divided.grad_fn.name() == "DivBackward0" and divided.grad_fn._saved_other.item() == 4
    ddp = torch.nn.parallel.DistributedDataParallel
    assert callable(ddp.will_sync_module_buffers)


def test_no_rule_needs_torch():
    """`judge` compares logs: it could do so on another machine."""
    judge = Path(install.__file__).parents[1] / "judge"
    texts = [path.read_text() for path in judge.rglob("*.py")]
    assert len(texts) > 8 and not any("import torch" in text or "from torch" in text for text in texts)


def test_it_makes_no_collective():
    """The names of collectives stand in the table of what is replaced, and are called nowhere in the package."""
    check_package = Path(install.__file__).parents[1]
    calls = "dist.(" + "|".join(install.COLLECTIVES) + r")\("
    code = subprocess.run(["grep", "-rnE", calls, check_package, "--include=*.py"], capture_output=True, text=True)
    rules = [line for line in code.stdout.splitlines() if "/judge/" not in line]  # which name them in what they say
    assert rules == [], rules


def test_a_failure_of_a_hook_is_a_note(tmp_path):
    """A data set that cannot be asked for its indices: the script goes on, and the doctor says that it has not seen."""
    text = edited(
        {
            "    def __len__(self):\n        return len(self.y)\n": """\
    @property
    def indices(self):
        raise RuntimeError("ask me not")

    def __len__(self):
        return len(self.y)
""",
            "random_split(data, [160, 41], generator=torch.Generator().manual_seed(0))": "data, Noisy(40)",
            "range(3)": "range(1)",
        }
    )
    report = check_text(tmp_path, text)
    assert report["exit_codes"] == [0, 0]
    assert has(report, "NOTE", "the doctor itself") and not report["broken"], short(report)


STYLE_FINDINGS = {  # what is broken in each script, or suspect, and in which line
    "trainer_class": [("BROKEN", "each epoch has another order", "loader = DataLoader(")],
    "many_flags": [("BROKEN", "one rank writes each file", "torch.save(")],
    "converted": [
        ("BROKEN", "each rank has its own GPU", ".to(device)\n"),
        ("BROKEN", "each rank reads its own samples", "loader = DataLoader("),
    ],
    "own_split": [("BROKEN", "the data are the same", "train_loader = ")],
    "one_schedules": [("BROKEN", "all ranks step the schedule", "scheduler.step()")],
    "own_share": [("SUSPECT", "metrics are of all samples", "test_loader = ")],
    "small_gpt": [],
    "all_of_cuda": [],
}


def assert_finds(report: dict, text: str, expected: list) -> None:
    found = [f for f in report["findings"] if f["level"] in ("BROKEN", "SUSPECT")]
    assert [(f["level"], f["rule"]) for f in found] == [(level, rule) for level, rule, _ in expected], short(report)
    for finding, (_, _, part) in zip(found, expected, strict=True):
        assert finding["line"] in line_with(text, part), finding


@pytest.mark.slow
@pytest.mark.parametrize("name", STYLE_FINDINGS)
def test_a_style_that_people_use(name, tmp_path):
    text = (STYLES / f"{name}.py").read_text()
    (tmp_path / f"{name}.py").write_text(text)
    assert_finds(check(tmp_path, f"{name}.py"), text, STYLE_FINDINGS[name])


@pytest.mark.slow
def test_a_module_with_a_trainer_beside_it(tmp_path):
    """Launched with -m; the line is the trainer's. The division shows on two and on three ranks."""
    package = tmp_path / "trainer_beside"
    for path in (STYLES / "trainer_beside").rglob("*.py"):
        target = package / path.relative_to(STYLES / "trainer_beside")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    report = check(tmp_path, "-m", "trainer_beside.train", "--epochs", "2")
    assert report["exit_codes"] and not any(report["exit_codes"])
    assert_finds(
        report,
        (package / "trainer" / "loop.py").read_text(),
        [("BROKEN", "the loss is a mean, once", "loss.backward()")],
    )
    (finding,) = [f for f in report["findings"] if f["level"] == "BROKEN"]
    assert finding["file"] == str(Path("trainer_beside", "trainer", "loop.py"))


@pytest.mark.slow
def test_the_rank_as_a_flag(tmp_path):
    """{rank} in the arguments; the script meets at an address of its own."""
    text = (
        BASE.read_text().replace('os.environ["RANK"]', "sys.argv[1]").replace("import os\n", "import os\nimport sys\n")
    )
    text = text.replace('"gloo")', '"gloo", init_method="tcp://10.0.0.1:29500", rank=rank, world_size=world_size)')
    (tmp_path / "train.py").write_text(text)
    report = check(tmp_path, "train.py", "{rank}")
    assert short(report, "BROKEN", "SUSPECT") == [] and report["steps"] == 24


@pytest.mark.slow
def test_an_epoch_that_the_script_counts_itself(tmp_path):
    """It is cut short, the script complains, and it runs again uncut."""
    text = edited(
        {
            "random_split(data, [160, 41]": "random_split(data, [800, 41]",
            "Noisy(201)": "Noisy(841)",
            "        scheduler.step()\n": "        assert _step + 1 == len(train_loader)\n        scheduler.step()\n",
        }
    )
    report = check_text(tmp_path, text)
    assert report["steps"] == 3 * 40 and short(report) == []


@pytest.mark.slow
def test_a_second_check_finds_the_folder_as_it_was(tmp_path):
    """The script resumes from its own snapshot, which the first check would have left behind."""
    text = edited(
        {
            "    torch.manual_seed(1 + rank)\n": """\
    torch.manual_seed(1 + rank)
    if os.path.exists("model.pt"):
        return
"""
        }
    )
    for _ in range(2):
        assert check_text(tmp_path, text)["steps"] == 24
        assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


@pytest.mark.slow
def test_made_up_data(tmp_path):
    """The classes of torchvision.datasets, here of a stand-in, hold made-up pixels, in spawned workers too."""
    package = tmp_path / "torchvision" / "datasets"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    names = ("MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100", "ImageFolder")
    classes = [
        f"class {n}:\n    def __init__(self, *a, **k):\n        raise RuntimeError('no download')\n" for n in names
    ]
    (package / "__init__.py").write_text("\n".join(classes))
    text = edited(
        {
            "Noisy(201)": """torch.utils.data.Subset(
        datasets.MNIST("data", train=True, download=True, transform=as_tensor), range(201)
    )""",
            "import torch\nimport torch.dist": "import numpy as np\nimport torch\nimport torch.dist",
            "from torch.utils.data import": "from torchvision import datasets\nfrom torch.utils.data import",
            "class Model": """\
def as_tensor(image):
    return torch.from_numpy(np.array(image)).float().flatten() / 255


class Model""",
            "nn.Linear(8, 16)": "nn.Linear(784, 16)",
            "nn.Linear(16, 3)": "nn.Linear(16, 10)",
            "sampler=sampler)": 'sampler=sampler, num_workers=1, multiprocessing_context="spawn")',
            "range(3)": "range(1)",
        }
    )
    report = check_text(tmp_path, text, "--data", "made-up")
    assert short(report, "BROKEN", "SUSPECT") == [] and report["steps"] == 8


@pytest.mark.slow
def test_the_text_for_people(tmp_path):
    """Causes with their consequences, the line with its text; colours only on a terminal."""
    (tmp_path / "train.py").write_text(edited(BY_NAME["own_rate"].edits))
    done = say(tmp_path, *PATIENT, "train.py")
    assert done.returncode == 1
    assert "\033" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("train.py on 2 ranks (CPU, gloo): 24 steps in 3 epochs, to its end, ")
    (start,) = [i for i, line in enumerate(lines) if line.startswith("BROKEN")]
    assert lines[start].split() == ["BROKEN", "one", "learning", "rate", "chapter", "9"]
    assert lines[start + 1].strip() == "step 1: 0.01 | 0.02"
    assert lines[start + 2].strip().startswith("train.py:") and lines[start + 2].endswith("optimizer.step()")
    assert lines[start + 4].strip().startswith("so, too: weights stay equal")
    assert any(line.startswith("holds ") for line in lines) and any(line.startswith("not seen ") for line in lines)
