"""What is said of events that are made up here: no launch."""

from pathlib import Path

from ddp_tutorial.check.judge import Evidence, Verdict, judge
from ddp_tutorial.check.launch import Plan, Trial
from ddp_tutorial.check.scratch import Place

FOLDER = Path("/mine")
MET = {"kind": "met", "world": 2, "backend": "gloo"}
CALL = {"kind": "call", "name": "all_reduce", "shapes": [[2]], "dtype": "torch.float32", "whole": True}
WRAP = {"kind": "wrap", "model": 0, "names": [["weight", [3], True]], "norms": 0, "unused": False, "whole": True}
EXIT = {"kind": "exit", "group_is_open": False}


def judged(*logs: list[dict], end: str = "ended", codes: tuple[int, ...] = (0, 0), changed: tuple = ()) -> Verdict:
    """Of what each of two ranks has written."""
    place = Place(FOLDER, FOLDER, FOLDER, Path("/temporary"), {})
    trial = Trial(Plan(FOLDER / "train.py"), place, list(codes), end=end, changed=list(changed))
    for rank, log in enumerate(logs):
        begin = {"kind": "process", "pid": rank + 1, "owner": rank + 1, "rank": str(rank)}
        trial.logs[rank + 1] = [begin, *({**event, "rank": rank} if event["kind"] == "met" else event for event in log)]
    return judge(Evidence(trial))


def seen(verdict: Verdict, *levels: str) -> dict[str, str]:
    return {finding.rule: finding.seen for finding in verdict.findings if finding.level in levels}


def held(verdict: Verdict) -> set[str]:
    return {finding.rule for finding in verdict.holds}


def step(n: int, weights: str, gradients: str = "same") -> dict:
    facts = {"gradients": {"weight": gradients}, "weights": {"weight": weights}, "unfrozen": [], "missing": []}
    return {
        "kind": "step",
        "optimizer": 0,
        "n": n,
        "lr": [0.1],
        "backwards": 1,
        "zero": False,
        "partial": False,
        **facts,
    }


def test_a_group_that_never_was_is_not_left():
    assert "the group is left" in held(judged([MET, EXIT], [MET, EXIT]))
    assert "the group is left" not in held(judged([EXIT], [EXIT]))


def test_a_rank_that_has_left_is_named_with_its_exit_code():
    """It is why the other one waits."""
    verdict = judged([MET, CALL, CALL], [MET, CALL, EXIT], end="hang", codes=(-9, 2))
    text = seen(verdict, "BROKEN")["the ranks make the same calls"]
    assert text.startswith("2 | 1 calls: rank 0 waits in ") and text.endswith("; rank 1 has left with exit code 2")
    verdict = judged([MET, CALL, CALL], [MET, CALL], end="hang", codes=(-9, -9))
    assert "has left" not in seen(verdict, "BROKEN")["the ranks make the same calls"]


def drifts(error: str) -> Verdict:
    """Equal gradients, weights that differ after the first step, and then an exception."""
    crash = {"kind": "crash", "error": error}
    return judged(*([MET, WRAP, step(0, "same"), step(1, own), crash] for own in ("mine", "yours")), codes=(1, 1))


def test_weights_that_differ_are_why_an_assertion_fails():
    verdict = drifts("AssertionError: weight is not the same on all ranks")
    assert list(seen(verdict, "BROKEN")) == ["weights stay equal"]
    assert verdict.consequences["weights stay equal"][0].startswith("the script runs: ")


def test_weights_that_differ_are_not_why_a_file_is_missing():
    assert set(seen(drifts("FileNotFoundError: x"), "BROKEN")) == {"weights stay equal", "the script runs"}


def test_what_follows_from_a_consequence_is_said_of_the_cause():
    """A rank is alone because the other one has stopped, and that because the weights differ."""
    errors = ("AssertionError: other weights", "RuntimeError: Connection closed by peer")
    logs = [
        [MET, WRAP, step(0, "same"), step(1, own), {"kind": "crash", "error": error}]
        for own, error in zip(("mine", "yours"), errors, strict=True)
    ]
    verdict = judged(*logs, codes=(1, 1))
    assert list(seen(verdict, "BROKEN")) == ["weights stay equal"]
    rules = {text.partition(":")[0] for text in verdict.consequences["weights stay equal"]}
    assert rules == {"the script runs", "no rank is left alone"}


def backwards(inputs: str) -> list[dict]:
    facts = {"factors": [], "exchanges": True, "forwards": 1, "plain": 0}
    passes = [{"kind": "backward", "loss": repr(float(i)), **facts} for i in range(3)]
    return [MET, WRAP, *({"kind": "input", "tensor": f"{inputs} {i}"} for i in range(3)), *passes]


def test_one_loss_of_other_samples_is_no_sign_of_the_same_samples():
    rule = "each rank reads its own samples"
    assert rule in seen(judged(backwards("a"), backwards("a")), "SUSPECT")
    assert rule not in seen(judged(backwards("a"), backwards("b")), "SUSPECT")


def test_a_file_elsewhere_comes_with_a_fix():
    verdict = judged([MET, {"kind": "write", "path": "/theirs/log.txt"}], [MET])
    (finding,) = [f for f in verdict.findings if f.rule == "nothing is written outside of the copy"]
    assert finding.seen == "there was no copy: it wrote /theirs/log.txt"
    assert finding.fix == "keep its data in another folder"


def test_a_linked_file_that_has_changed_is_named():
    verdict = judged([MET], [MET], changed=[f"/mine/{i}" for i in range(12)])
    said = seen(verdict, "NOTE")["nothing is written outside of the copy"]
    assert "changed by it or meanwhile: /mine/0, " in said and said.endswith("/mine/9, and 2 more")
