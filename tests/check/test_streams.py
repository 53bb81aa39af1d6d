"""The doctor and the scripts of chapter 12: none that reads well is blamed, and each fault of a stream is named."""

import json
import tomllib

import numpy as np
import pytest

from benchmarks.page import write_scripts
from benchmarks.sections.photos import write_shards
from tests.check.doctor import check, has, short
from tests.check.test_own_scripts import no_fault
from tests.ranks import NOTEBOOKS

slow = pytest.mark.slow
SCRIPTS = ("draws.py", "read_stream.py", "read_with_library.py", "uneven_ends.py", "train_stream.py", "by_length.py")
RIGHT = (
    ("draws.py", "rank"),
    ("read_stream.py", "data/photos"),
    ("read_stream.py", "data/five_shards"),  # unevenly, but nothing waits for a rank that has ended
    ("read_with_library.py", "data/photos"),
    *(("uneven_ends.py", way) for way in ("join", "join_left", "pad", "cut", "count")),
    ("train_stream.py", "out.pt"),
    ("by_length.py", "out.pt", "sorted", "tokens"),
)
DEAL = "reader, n_readers = self.rank * n_workers + worker, self.world_size * n_workers"
DEALT_WRONGLY = {  # what stands in place of DEAL -> rules that are broken then
    "reader, n_readers = self.rank, self.world_size": ["each sample is read once an epoch"],  # by rank only
    "reader, n_readers = worker, n_workers": ["each rank reads its own samples"],  # by worker only
    "reader, n_readers = 0, 1": ["each rank reads its own samples", "each sample is read once an epoch"],
}


@pytest.fixture
def page(tmp_path):
    """A folder with the page's scripts, and its shards: as many, with fewer photos in those that divide."""
    write_scripts("12", tmp_path, "image_shards.py", *SCRIPTS)
    draw = np.random.default_rng(0)

    def noise(number):
        return draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)

    write_shards(tmp_path / "data/photos", 24, 4, noise)
    write_shards(tmp_path / "data/five_shards", 5, 16, noise)
    return tmp_path


def replace(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def broken(report):
    return [finding["rule"] for finding in report["findings"] if finding["level"] == "BROKEN"]


def holding(report):
    return {rule["rule"] for rule in report["holds"]}


@slow
@pytest.mark.parametrize("words", RIGHT, ids="-".join)
def test_a_script_of_the_page_is_not_blamed(words, page):
    if words[0] == "read_with_library.py":
        pytest.importorskip("webdataset")
    report = check(page, *words)
    no_fault(report)
    if words[0] in ("read_stream.py", "train_stream.py"):  # that nothing is found is not that nothing was seen
        assert {"each rank reads its own samples", "each sample is read once an epoch"} <= holding(report)


@slow
def test_ranks_with_one_seed_are_named(page):
    report = check(page, "draws.py", "0")
    assert broken(report) == ["ranks augment differently"], short(report)


@pytest.mark.parametrize(
    "script, deal",
    [
        pytest.param(script, deal, marks=slow if (script, i) != ("read_stream.py", 0) else ())
        for script in ("read_stream.py", "train_stream.py")
        for i, deal in enumerate(DEALT_WRONGLY)
    ],
)
def test_a_stream_that_is_dealt_wrongly_is_named(script, deal, page):
    """In the script that trains on it, and in the one that only reads."""
    replace(page / "image_shards.py", DEAL, deal)
    report = check(page, script, "data/photos" if script == "read_stream.py" else "out.pt")
    assert broken(report) == DEALT_WRONGLY[deal], short(report)
    line = next(
        i for i, line in enumerate((page / script).read_text().splitlines(), 1) if "loader = DataLoader(" in line
    )
    assert has(report, "BROKEN", DEALT_WRONGLY[deal][0], [line])


@slow
def test_an_uneven_end_without_join_is_named(page):
    """One rank trains on, the other one waits in another call, for good."""
    replace(page / "train_stream.py", "with ddp_model.join():", "if True:")
    replace(page / "train_stream.py", "data/photos", "data/five_shards")
    report = check(page, "--patience", 15, "train_stream.py", "out.pt")
    assert broken(report) == ["the ranks make the same calls"] and report["end"] == "hang", short(report)


@slow
def test_an_uneven_end_without_an_agreement_is_named(page):
    """The shorter rank leaves: `cut` without its all-reduce."""
    replace(page / "uneven_ends.py", "        dist.all_reduce(least, dist.ReduceOp.MIN)\n", "")
    report = check(page, "--patience", 15, "uneven_ends.py", "cut")
    assert broken(report) == ["the ranks make the same calls"], short(report)


@slow
def test_a_library_that_deals_to_workers_alone_is_named_if_it_gives_tensors(page):
    """The doctor knows samples by their tensors. The page's script reads only keys, texts, and they are beyond it."""
    pytest.importorskip("webdataset")
    replace(page / "read_with_library.py", '"nodesplitter": wds.split_by_node', '"nodesplitter": None')
    keys = check(page, "read_with_library.py", "data/photos")
    assert broken(keys) == [] and "each rank reads its own samples" not in holding(keys), short(keys)
    replace(page / "read_with_library.py", '.to_tuple("__key__")', '.to_tuple("__key__").map_tuple(number)')
    replace(
        page / "read_with_library.py",
        "def main(",
        "def number(key):\n    import torch\n\n    return torch.tensor([int(key)])\n\n\ndef main(",
    )
    numbers = check(page, "read_with_library.py", "data/photos")
    assert broken(numbers) == ["each rank reads its own samples"], short(numbers)


def test_the_library_has_run_on_the_page_and_comes_with_the_tests():
    """Where it is missing, the page says so and goes on: nobody would notice."""
    page = (NOTEBOOKS / "12_feed_the_ranks.ipynb").read_text()
    outputs = [output for cell in json.loads(page)["cells"] for output in cell.get("outputs", ())]
    said = "".join(line for output in outputs for line in output.get("text", ()))
    assert "webdataset, 2 ranks x 2 workers: each sample once" in said
    extras = tomllib.loads((NOTEBOOKS.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "webdataset" in extras["stream"] and any("stream" in package for package in extras["test"])
