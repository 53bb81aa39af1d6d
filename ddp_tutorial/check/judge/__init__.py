"""Compare what the ranks have written. No torch in here: a rule is a function that reads events."""

from ddp_tutorial.check.judge.evidence import Evidence
from ddp_tutorial.check.judge.registry import RULES, Finding, Rule, Verdict
from ddp_tutorial.check.judge.rules import KINDS

__all__ = ["KINDS", "RULES", "Evidence", "Finding", "Verdict", "judge"]
FAULTS = ("BROKEN", "SUSPECT")


def findings_of(rule: Rule, evidence: Evidence) -> list[Finding]:
    try:
        found = list(rule.function(evidence))
    except Exception as error:  # events that nobody has thought of
        seen = f"it could not judge '{rule.name}': {error!r}"
        return [Finding("NOTE", "the doctor itself", seen, None, "tell those who wrote it", None)]
    return [f._replace(rule=rule.name, chapter=rule.chapter, fix=f.fix or rule.fix) for f in found]


def causes(found: dict[str, list[Finding]]) -> dict[str, str]:
    """Rule -> the broken rule that explains why it is broken, too. The one that is asked first is the cause."""
    broken = [rule for rule in RULES if any(f.level == "BROKEN" for f in found[rule.name])]
    cause: dict[str, str] = {}

    def first(name: str) -> str:
        while name in cause:
            name = cause[name]
        return name

    for rule in broken:
        above = first(rule.name)
        explained = [name for finding in found[rule.name] for name in finding.explains]
        for name in (*rule.explains, *explained):
            if name != above:
                cause.setdefault(name, above)
    return {name: first(name) for name in cause}


def judge(evidence: Evidence) -> Verdict:
    """Ask each rule. What follows from the fault that another rule has found is no finding of its own."""
    found = {rule.name: findings_of(rule, evidence) for rule in RULES}
    cause, verdict = causes(found), Verdict()
    for rule in RULES:
        if not found[rule.name] and not rule.is_remark:
            verdict.not_seen.append(rule.name)
        for finding in found[rule.name]:
            if finding.level == "holds":
                verdict.holds.append(finding)
            elif finding.level in FAULTS and rule.name in cause:
                verdict.consequences.setdefault(cause[rule.name], []).append(f"{rule.name}: {finding.seen}")
            else:
                verdict.findings.append(finding)
    return verdict
