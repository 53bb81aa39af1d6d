"""A script that averages weights by itself may mean it: SUSPECT. BROKEN is where they meet no more."""

import pytest

from tests.check.doctor import check_text, has, short
from tests.check.planted import BASE, STEP, edited

slow = pytest.mark.slow
UNWRAPPED = {"DistributedDataParallel(model)\n": "model\n"}
RULE = "weights stay equal"


def averaging(condition: str) -> str:
    """The clean script without DDP, whose ranks average their weights after some steps."""
    meeting = f"""\
            if {condition}:
                for weight in model.parameters():
                    dist.all_reduce(weight.data)
                    weight.data /= world_size
"""
    return edited(UNWRAPPED, {STEP: STEP + meeting})


WITH_OUTER_OPTIMIZER = {  # as in DiLoCo
    STEP: STEP
    + """\
            if _step % 4 == 3:
                for weight, common in zip(model.parameters(), outer.param_groups[0]["params"]):
                    common.grad = common.detach() - weight.detach()
                    dist.all_reduce(common.grad)
                    common.grad /= world_size
                outer.step()
                for weight, common in zip(model.parameters(), outer.param_groups[0]["params"]):
                    weight.data.copy_(common)
""",
    "    optimizer = ": """\
    copies = [weight.detach().clone().requires_grad_() for weight in model.parameters()]
    outer = torch.optim.SGD(copies, lr=0.7, momentum=0.9, nesterov=True)
    optimizer = """,
}


def seen(report: dict) -> str:
    (finding,) = (finding for finding in report["findings"] if finding["rule"] == RULE)
    return finding["seen"]


def test_local_steps_that_stop_between_two_averages_are_suspect(tmp_path):
    """Eight steps an epoch: averages after 3, 6, 11, 14, 19 and 22 of 24. What comes after the last is not seen."""
    report = check_text(tmp_path, averaging("_step % 3 == 2"))
    assert short(report, "BROKEN") == []
    assert has(report, "SUSPECT", RULE) and has(report, "NOTE", "gradients are equal"), short(report)
    assert seen(report) == "they differ after 17 of 23 steps, and are equal again within 5: local steps?"


@slow
def test_local_steps_that_end_with_an_average_are_suspect(tmp_path):
    report = check_text(tmp_path, averaging("_step % 4 == 3"))
    assert short(report, "BROKEN") == [] and has(report, "SUSPECT", RULE), short(report)
    assert seen(report) == "they differ after 18 of 23 steps, and are equal again within 4: local steps?"


@slow
def test_an_outer_optimizer_is_suspect(tmp_path):
    report = check_text(tmp_path, edited(UNWRAPPED, WITH_OUTER_OPTIMIZER))
    assert short(report, "BROKEN") == [] and has(report, "SUSPECT", RULE), short(report)


@slow
def test_a_stop_between_two_averages_is_seen_where_the_end_is(tmp_path):
    """The optimizer lives until the script ends, and with it what it has stepped."""
    text = averaging("_step % 3 == 2").replace("    optimizer = ", "    global optimizer\n    optimizer = ")
    assert seen(check_text(tmp_path, text)).endswith("After the last 2 they still differ")


@slow
def test_weights_that_are_averaged_no_more_are_broken(tmp_path):
    """After 2 and 4 steps, and then for 20 steps not at all: longer than it ever took."""
    report = check_text(tmp_path, averaging("epoch == 0 and _step in (1, 3)"))
    assert has(report, "BROKEN", "a model is wrapped"), short(report)


@slow
def test_weights_that_never_meet_are_broken(tmp_path):
    assert has(check_text(tmp_path, edited(UNWRAPPED)), "BROKEN", "a model is wrapped")


@slow
def test_the_script_is_clean_without_it(tmp_path):
    assert short(check_text(tmp_path, BASE.read_text())) == []
