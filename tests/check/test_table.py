"""Each fault that the tests plant is named, with its level and its line; the script without it is not blamed."""

import pytest

from ddp_tutorial.check.judge import RULES
from tests.check.doctor import check_text, has, short
from tests.check.planted import BASE, FAULTS, FEATURES, FSDP2, UNUSUAL, Fault, edited, line_with

slow = pytest.mark.slow
NAMED = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
WITHOUT_A_FAULT = {  # rules that only another rule's fault, or an error of the connection, brings up
    "only DDP is checked": "test_fsdp2_is_not_judged_as_ddp",
    "no rank is left alone": "the rule behind it is named in its place",
    "no rank waits for ever": "one rank calls what the other does not, which is named in its place",
    "nothing is written outside of the copy": "test_files_elsewhere_are_listed",
    "the doctor itself": "test_a_failure_of_a_hook_is_a_note",
}


def test_each_rule_has_a_fault():
    named = {fault.rule for fault in FAULTS}
    assert {rule.name for rule in RULES} == named | set(WITHOUT_A_FAULT)
    assert not named & set(WITHOUT_A_FAULT)


def test_each_rule_explains_rules_that_there_are():
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert set(rule.explains) <= set(names) - {rule.name}, rule.name
        assert rule.function.__doc__ and 1 <= rule.chapter <= 13


@NAMED
def test_a_fault_can_be_planted(fault: Fault):
    """And the line that is to be named is there."""
    clean, text = edited(fault.feature), edited(fault.feature, fault.edits)
    compile(text, "train.py", "exec")
    assert text != clean and (fault.at is None or line_with(text, fault.at))


@slow
@NAMED
def test_a_fault_is_named(fault: Fault, tmp_path):
    """That it is, and nothing else is called broken."""
    text = edited(fault.feature, fault.edits)
    report = check_text(tmp_path, text, *fault.flags)
    assert has(report, fault.level, fault.rule, line_with(text, fault.at) if fault.at else None), short(report)
    assert [f for f in report["findings"] if f["level"] == "BROKEN" and f["rule"] != fault.rule] == [], short(report)


@slow
@pytest.mark.parametrize("name", FEATURES)
def test_a_clean_script_is_not_blamed(name, tmp_path):
    assert short(check_text(tmp_path, edited(FEATURES[name]))) == []


@slow
@pytest.mark.parametrize("name", UNUSUAL)
def test_no_false_alarm(name, tmp_path):
    assert short(check_text(tmp_path, edited(UNUSUAL[name])), "BROKEN", "SUSPECT") == []


@slow
def test_fsdp2_is_not_judged_as_ddp(tmp_path):
    report = check_text(tmp_path, edited(FSDP2))
    assert short(report, "BROKEN") == []
    assert has(report, "NOTE", "only DDP is checked")


@slow
def test_on_three_ranks(tmp_path):
    assert short(check_text(tmp_path, BASE.read_text(), "--ranks", "3")) == []
