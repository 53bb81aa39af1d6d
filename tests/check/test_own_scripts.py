"""The doctor and this project's own scripts: each line of DDP that is spoilt is found, and no script is blamed."""

import json
import re

import pytest

from benchmarks.page import write_scripts
from ddp_tutorial.console import UserError
from ddp_tutorial.show.difference import difference
from ddp_tutorial.show.notebook import written_file
from tests import test_case_book
from tests.check.doctor import PATIENT, check, has, short
from tests.ranks import DDP, NOTEBOOKS, RESILIENT

slow = pytest.mark.slow
DOES_NOT_RUN = "it does not run"  # a crash that the doctor reports, or exit code 2 with the line
MADE_UP = ("--gpu", "made-up")
SPOILT = {  # what stands in a line that ends in `# DDP` -> what stands there instead, and what the doctor has to say
    "import os": ("pass", DOES_NOT_RUN),
    "import torch.distributed as dist": ("pass", DOES_NOT_RUN),
    "import DistributedDataParallel": ("pass", DOES_NOT_RUN),
    "import DataLoader, DistributedSampler": ("from torch.utils.data import DataLoader", DOES_NOT_RUN),
    'distributed = "RANK" in': ("distributed = False", "a process group is started"),
    "rank = int(os.environ.get(": ("rank = 0", DOES_NOT_RUN),  # both lock the folder: one is refused, the other waits
    "local_rank = int(": ("local_rank = 0", "each rank has its own GPU"),
    "world_size = int(os.environ.get(": ("world_size = 1", DOES_NOT_RUN),
    "local_world_size = int(": (
        "local_world_size = 1",
        "it asks for fewer GPUs than there are ranks: there are enough",
    ),
    "sampler = DistributedSampler(": (
        "sampler = DistributedSampler(train_set, 1, 0, seed=args.seed, drop_last=True)",
        "each rank reads its own samples",
    ),
    "mine = range(": ("mine = range(len(val_set))", "all ranks validate on all samples: the same means, at more cost"),
    "val_loader = DataLoader(": (
        "val_loader = DataLoader(val_set, 1024, **options)",
        "all ranks validate on all samples: the same means, at more cost",
    ),
    "process.print_rank0(": ("pass", "nothing is said"),
    "ddp_model = DistributedDataParallel(": ("ddp_model = model", "a model is wrapped"),
    "sampler.set_epoch(epoch)": ("pass", "each epoch has another order"),
    "ddp_model), batches": (("ddp_model), batches", "model), batches"), "the wrapped model is what is called"),
    "if distributed:": ("if True:", "only one process without a launcher would fail, and the doctor launches two"),
    "dist.all_reduce(sums)": ("pass", "the training loss in history is rank 0's: what a number means is not seen"),
    "dist.all_reduce(val_sums)": ("pass", "the losses in history are rank 0's: what a number means is not seen"),
    "if rank == 0:": ("if True:", "one rank writes each file"),
    "history = History(": ("history = History(args.out)", DOES_NOT_RUN),  # both ranks lock the folder
    "line = history.append(": ('line = {"epoch": 0.5}', "no history is written"),  # none that is reported
    "report_epoch(": ("pass", "no losses are printed"),
    "save_model(": (("scale, model)", "scale, ddp_model)"), "checkpoints are of the plain model"),
    "args = flags.parse(": ("args = flags.parse(__doc__)", "it asks for one GPU only: there are enough, or none"),
    "device = torch.device(": (
        'device = torch.device("cuda", 0) if args.use_gpu else torch.device("cpu")',
        "each rank has its own GPU",
    ),
    "batch_size = process.per_rank_batch_size(": (
        "batch_size = args.batch_size",
        "the global batch is larger, and no rule says which",
    ),
    "if args.use_gpu:": ("if True:", "without GPUs it does not run, and the doctor makes some up for it"),
    "torch.cuda.set_device(": ("pass", "each tensor of this script names its device"),
    'backend, gpu = ("nccl"': ('backend, gpu = "nccl", None', "with made-up GPUs, every group is gloo's"),
    "dist.init_process_group(": ("pass", "a process group is started"),
    "dist.destroy_process_group()": ("pass", "the group is left"),
}
WAITS_FOR_GOOD = ("rank = int(os.environ.get(", "history = History(")
ON_GPUS = ("local_rank = int(", "device = torch.device(", "torch.cuda.set_device(", 'backend, gpu = ("nccl"')


def ddp_lines() -> list[tuple[int, str]]:
    lines = enumerate(DDP.read_text().splitlines())
    return [(i, line) for i, line in lines if re.search(r"# DDP: ", line)]


def key_of(line: str) -> str:
    """The longest key that stands in its code, from the beginning of a word on."""
    code = line.partition("  # DDP: ")[0]
    keys = [key for key in SPOILT if re.search(r"(?<![\w.])" + re.escape(key), code)]
    return max(keys, key=len) if keys else ""


def spoil(i: int) -> str:
    """The script with its line `i`, from 0, spoilt."""
    lines = DDP.read_text().splitlines()
    new, _ = SPOILT[key_of(lines[i])]
    indent = lines[i][: -len(lines[i].lstrip())]
    lines[i] = lines[i].replace(*new) if isinstance(new, tuple) else indent + new
    return "\n".join(lines) + "\n"


def test_each_line_of_ddp_can_be_spoilt():
    keys = {key_of(line) for _, line in ddp_lines()}
    assert keys == set(SPOILT), "a line has no key, or a key no line"
    for i, _ in ddp_lines():
        assert spoil(i) != DDP.read_text()
        compile(spoil(i), "ddp_sample.py", "exec")


@slow
@pytest.mark.parametrize("i", [i for i, _ in ddp_lines()], ids=lambda i: f"line {i + 1}")
def test_a_line_of_ddp_that_is_spoilt_is_named(i, small, tmp_path):
    """Or nothing is wrong without it, or nothing to be seen, for the reason that stands in its place."""
    key = key_of(DDP.read_text().splitlines()[i])
    _, expected = SPOILT[key]
    (tmp_path / "ddp_sample.py").write_text(spoil(i))
    # one of two ranks that both want the folder's lock leaves, and the other waits for it for good
    flags = (*(MADE_UP if key in ON_GPUS else ()), "--patience", 15 if key in WAITS_FOR_GOOD else 60)
    words = ("ddp_sample.py", "--data-dir", small, "--epochs", 3, "--batch-size", 8, "--out", "out")
    try:
        report = check(tmp_path, *PATIENT, *flags, *words)
    except UserError:  # it does not come to a step
        assert expected == DOES_NOT_RUN
        return
    if expected == DOES_NOT_RUN:
        assert has(report, "BROKEN", "the script runs"), report
    elif any(expected == finding["rule"] for finding in report["findings"]):
        assert report["broken"] or {f["level"] for f in report["findings"]} <= {"NOTE", "SUSPECT"}
    else:
        assert " " in expected and not report["broken"] and short(report, "BROKEN", "SUSPECT") == [], short(report)
        assert expected not in [rule for rule in report["not_seen"]], f"{expected}: not seen"
        assert expected not in [rule["rule"] for rule in report["holds"]], f"{expected}: it holds"


def no_fault(report: dict) -> None:
    assert short(report, "BROKEN", "SUSPECT") == []
    assert not has(report, "NOTE", "the doctor itself"), short(report)
    assert report["end"] == "ended" and set(report["exit_codes"]) == {0}, report


@slow
@pytest.mark.parametrize("script", [DDP, RESILIENT], ids=lambda script: script.stem)
@pytest.mark.parametrize("n", [2, 4])
def test_the_scripts_keep_all_rules(n, script, small, tmp_path):
    flags = ("--data-dir", small, "--out", tmp_path / "out", "--epochs", 3, "--batch-size", 8)
    no_fault(check(tmp_path, "--ranks", n, script, *flags))


CHAPTERS = {  # script of a chapter -> what else it needs beside it, its flags, and what is BROKEN in it on purpose
    ("05", "collectives.py"): ((), (), None),
    ("05", "compare_ways.py"): (("hand_made.py",), (), None),
    ("05", "watch_buckets.py"): ((), (), None),  # its hook sends
    ("05", "ring_all_reduce.py"): ((), (), None),
    ("05", "accumulate.py"): ((), (), None),
    ("05", "batch_norm.py"): ((), (), None),
    ("05", "unused_weights.py"): ((), (), None),
    ("05", "uneven.py"): ((), (), None),
    ("10", "measure_step.py"): (("small_transformer.py", "next_byte.py", "ways.py"), ("Plain",), None),
    ("10", "count_bytes.py"): (("small_transformer.py", "next_byte.py", "ways.py"), (), None),
    ("10", "reentrant.py"): (("small_transformer.py", "next_byte.py", "ways.py"), (), None),
    ("10", "compile_ddp.py"): (("small_transformer.py", "next_byte.py", "ways.py"), (), None),
    ("10", "shard_traps.py"): (("small_transformer.py", "next_byte.py", "ways.py"), (), None),
    ("10", "split_layer.py"): (("small_transformer.py", "next_byte.py", "ways.py"), (), None),
    ("10", "go_on.py"): (
        ("small_transformer.py", "next_byte.py", "ways.py"),
        ("0", "runs/larger/never_stopped.pt"),
        None,
    ),
}


OF_FOUR_RANKS = ("collectives.py", "ring_all_reduce.py", "split_layer.py")


@slow
@pytest.mark.parametrize("chapter, name", CHAPTERS, ids=map("-".join, CHAPTERS))
def test_a_script_of_a_chapter_is_not_blamed(chapter, name, tmp_path):
    beside, flags, broken = CHAPTERS[chapter, name]
    (tmp_path / "runs" / "larger").mkdir(parents=True)
    write_scripts(chapter, tmp_path, name, *beside)
    report = check(tmp_path, *(("--ranks", 4) if name in OF_FOUR_RANKS else ()), name, *flags)
    assert [f["rule"] for f in report["findings"] if f["level"] == "BROKEN"] == [broken] * bool(broken), short(report)


@slow
@pytest.mark.parametrize("peer", ["with_accelerate", "with_lightning"])
def test_a_peer_is_not_blamed(peer, small, tmp_path):
    flags = ("--data-dir", small, "--out", tmp_path / "out", "--epochs", 3, "--batch-size", 8)
    report = check(NOTEBOOKS.parent, "-m", f"benchmarks.peers.{peer}", *flags)
    assert short(report, "BROKEN") == [], short(report)


BREAKS = {  # what chapter 4 breaks -> what is said of it
    "no_sampler": ("BROKEN", "each rank reads its own samples"),
    "no_set_epoch": ("BROKEN", "each epoch has another order"),
    "all_write": ("SUSPECT", "one rank writes each file"),
    "one_leaves": ("BROKEN", "the ranks make the same calls"),
}


@pytest.fixture(scope="module")
def breaks(tmp_path_factory):
    """A folder with the scripts that chapter 4 breaks, as its cells write them."""
    folder = tmp_path_factory.mktemp("breaks")
    (folder / "ddp_sample.py").write_text(DDP.read_text())
    chapter = json.loads((NOTEBOOKS / "04_train_with_ddp.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in chapter["cells"] if cell["cell_type"] == "code"]
    names = {"Path": lambda name: folder / name}
    for source in sources:
        if re.search(r"\bbroken\(", source):
            exec(source, names)
    return folder


@slow
@pytest.mark.parametrize("name", BREAKS)
def test_what_chapter_4_breaks_is_named(name, breaks, small):
    flags = ("--data-dir", small, "--device", "cpu", "--epochs", 4, "--batch-size", 8, "--out", "out")
    assert has(report := check(breaks, f"{name}.py", *flags), *BREAKS[name]), short(report)


CASES = {  # of chapter 9 -> the rule that is broken in it
    "own_schedule": "what a rank decides by is the same",
    "unfrozen": "nothing is frozen or unfrozen after the wrap",
    "own_scale": "one gradient scale",
    "swapped_heads": "one model at the wrap",
    "divided_twice": "the loss is a mean, once",
    "gathered_cut": "gathered tensors keep their gradient",
    "clipped_early": "gradients are clipped after the exchange",
    "one_dropout": "ranks drop other units",
    "whole_stream": "each rank reads its own samples",
    "undivided_draw": "each rank reads its own samples",
    "mixed_counts": "ranks are at the same step",
    "skipped_batch": "ranks are at the same step",
    "validating_alone": "the ranks make the same calls",
    "uneven_gather": "shapes agree",
}


@pytest.fixture(scope="module")
def case_book(tmp_path_factory):
    """A folder with the scripts of chapter 9, and their mended versions, as its cells write them."""
    folder = tmp_path_factory.mktemp("cases")
    cells = ["".join(cell["source"]) for cell in test_case_book.CELLS if cell["cell_type"] == "code"]
    names = {"Path": lambda name: folder / name, "re": re, "difference": lambda *files: difference}
    exec("\n".join(cell for cell in cells if re.search(r"^def (change|caught)\(", cell, re.M)), names)
    names |= {
        "fails": lambda *args: None,
        "mended": lambda old, new, changes, says="": names["change"](old, new, changes),
    }
    for name in re.findall(r"^%%writefile (\w+\.py)$", "\n".join(cells), re.M):
        (folder / name).write_text(written_file(test_case_book.CHAPTER, name))
    for statement in test_case_book.statements(test_case_book.CELLS, "caught", "mended"):
        exec(statement, names)
    return folder


@slow
@pytest.mark.parametrize("case", CASES)
def test_a_case_of_the_case_book_is_named(case, case_book):
    """And its mended version is not blamed."""
    assert has(check(case_book, f"{case}.py"), "BROKEN", CASES[case])
    assert short(check(case_book, f"{case}_mended.py"), "BROKEN", "SUSPECT") == []


@slow
def test_unequal_numbers_of_tokens_are_beyond_the_doctor(case_book):
    """The fifteenth case: all ranks agree on that gradient, and only its author knows that it is not the one wanted."""
    for name in ("unequal_tokens.py", "unequal_tokens_mended.py"):
        assert short(check(case_book, name), "BROKEN", "SUSPECT") == []
