"""The table of python -m tests.mutants is up to date; a sample of it is tried, and what lives is told."""

import re

import pytest

from tests import mutants
from tests.mutants import MUTANTS, ROOT, Mutant, MutantError, mutated

HARMLESS = Mutant("ddp_tutorial/model.py", '"""The model of', '"""A model of', "tests/test_show.py", "a word")
DEADLY = HARMLESS._replace(file="ddp_tutorial/show/notebook.py", old="def text_alternative", new="def alternative")


def test_each_mutant_changes_a_line_that_is_there_and_has_tests():
    assert 35 <= len(MUTANTS) <= 60
    for name, mutant in MUTANTS.items():
        assert mutated(name, mutant) != (ROOT / mutant.file).read_text(), name
        for test in mutant.tests.split():
            file, function = test.split("::")
            assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.M), (name, test)


def test_a_mutant_whose_line_has_changed_is_an_error(capsys, monkeypatch):
    gone = HARMLESS._replace(old="no such line")
    with pytest.raises(MutantError, match="^gone: ddp_tutorial/model.py has 'no such line' 0 times"):
        mutated("gone", gone)
    monkeypatch.setattr(mutants, "MUTANTS", {"gone": gone})
    assert mutants.main() == 1 and "error: gone: " in capsys.readouterr().err


@pytest.mark.slow
def test_what_lives_is_told(capsys, monkeypatch):
    monkeypatch.setattr(mutants, "MUTANTS", {"harmless": HARMLESS, "deadly": DEADLY})
    assert mutants.main() == 1
    assert re.search(
        r"LIVED .* harmless: .*\n.* died .* deadly: (.*\n)+1 of 2 mutants lived\n +harmless\n", capsys.readouterr().out
    )
    assert mutants.main("--only", "deadly") == 0
    unknown = {"unknown": HARMLESS._replace(tests="tests/test_show.py::test_none")}
    monkeypatch.setattr(mutants, "MUTANTS", unknown)
    assert mutants.main() == 1


@pytest.mark.slow
def test_a_sample_of_the_mutants_dies():
    assert mutants.main("--sample", "6", "--seed", "1") == 0
