"""Which trials a script needs before it can be judged: plain or with made-up GPUs, whole or cut, on one more rank."""

import re
from dataclasses import replace
from typing import NamedTuple

from ddp_tutorial.check import launch
from ddp_tutorial.check.judge import Evidence, Verdict, judge
from ddp_tutorial.check.launch import Plan, Trial
from ddp_tutorial.console import UserError

ASKS_FOR_GPUS = re.compile(r"cuda|nvidia|nccl|\bgpu", re.I)
MISSING = re.compile(r"No module named '([^'.]+)")
MEAN_ONCE = "the loss is a mean, once"


class Examination(NamedTuple):
    trial: Trial
    evidence: Evidence
    verdict: Verdict


class CannotCheck(UserError):
    """The script does not come so far that anything can be said."""

    def __init__(self, message: str, trial: Trial | None = None):
        super().__init__(message)
        self.trial = trial


def has_stepped(trial: Trial) -> bool:
    return bool(trial.events("step"))


def has_started(trial: Trial) -> bool:
    """Whether two ranks have met, or at least taken steps."""
    kinds = [{event["kind"] for event in events} for events in trial.logs.values()]
    return sum(bool(k & {"met", "step"}) for k in kinds) > 1


def asks_for_gpus(trial: Trial) -> bool:
    crashes = [event["error"] for event in trial.events("crash")]
    return any(ASKS_FOR_GPUS.search(text) for text in (*trial.words, *crashes))


def was_cut(trial: Trial) -> bool:
    return any(event["cut"] for event in trial.events("read"))


def run(plan: Plan, gpu: str) -> Trial:
    """The trial from which to judge. `gpu` is "auto", "none", "made-up" or "real"."""
    plan = replace(plan, gpu="none" if gpu == "auto" else gpu)
    trial = launch.run(plan)
    if gpu == "auto" and not has_stepped(trial) and asks_for_gpus(trial):
        trial = launch.run(plan := replace(plan, gpu="made-up"))
    if plan.spawns and not has_started(trial):  # it starts processes, and they are no ranks
        other = launch.run(replace(plan, spawns=False))
        if has_started(other) or has_stepped(other):
            trial, plan = other, other.plan
    if trial.events("crash") and was_cut(trial):  # is it the script that fails, or has it counted its batches?
        trial = launch.run(replace(plan, batches=0))
    return trial


def why_not(trial: Trial) -> str:
    """One line: why nothing can be said of the script."""
    name = trial.plan.module or trial.plan.script.name
    if crashes := trial.events("crash"):
        error, at = crashes[0]["error"].splitlines()[0], crashes[0].get("at")
        if missing := MISSING.search(error):
            return f"{name} needs the package {missing[1]!r}: install it"
        return f"{name} stops{f' in line {at[1]}' if at else ''} before its ranks have met: {error}"
    said = [line.strip() for words in trial.words for line in words.splitlines() if line.strip()]
    if missing := MISSING.search("\n".join(said)):
        return f"{name} needs the package {missing[1]!r}: install it"
    if trial.end == "hang":
        return f"{name} stands still before its ranks have met, {trial.plan.patience:.0f} s without a sign of life"
    if any(trial.codes) and trial.end == "ended":
        return (
            f"{name} leaves with {trial.codes[0]} before its ranks have met: {said[-1] if said else 'it says nothing'}"
        )
    if trial.end == "time":
        return f"{name} has not come to a process group or a step in {trial.seconds:.0f} s: give it more --seconds"
    return f"{name} starts no process group and takes no step: is it a training script that torchrun would launch?"


def is_for_lack_of(trial: Trial) -> bool:
    """Whether all ranks have stopped before the first step for want of a package or a file."""
    crashes = [event["error"] for event in trial.events("crash")]
    missing = ("ModuleNotFoundError", "FileNotFoundError")
    return bool(crashes) and not has_stepped(trial) and all(error.startswith(missing) for error in crashes)


def examine(plan: Plan, gpu: str = "auto") -> Examination:
    """Launch the script as often as is needed, and judge. Raises `CannotCheck`."""
    trial = run(plan, gpu)
    evidence = Evidence(trial)
    verdict = judge(evidence)
    has_not_met = any(finding.rule == "a process group is started" for finding in verdict.findings)
    if is_for_lack_of(trial) or not (has_started(trial) or has_not_met):
        raise CannotCheck(why_not(trial), trial)
    if any(finding.rule == MEAN_ONCE for finding in verdict.findings):  # by chance, or by the number of ranks?
        other = Evidence(launch.run(replace(trial.plan, ranks=trial.plan.ranks + 1)))
        if other.any("backward"):
            evidence.other_size = other
            verdict = judge(evidence)
    return Examination(trial, evidence, verdict)
