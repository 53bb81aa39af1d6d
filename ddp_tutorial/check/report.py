"""What was found, for a person or for a program."""

import json
import linecache
import os
import textwrap
from pathlib import Path

from ddp_tutorial.check.examine import Examination
from ddp_tutorial.check.judge import Finding
from ddp_tutorial.check.launch import Plan, Trial

WIDTH, INDENT = 112, " " * 9
COLORS = {"BROKEN": "1;31", "SUSPECT": "1;33", "NOTE": "1;36", "holds": "32", "not seen": "2"}
LEVELS = ("BROKEN", "SUSPECT", "NOTE")
LAST_LINES = 12  # of what a script that has failed said


def where_it_ran(plan: Plan) -> str:
    if plan.gpu == "real":
        return "the GPUs that are there"
    return "CPU, gloo, made-up GPUs" if plan.gpu == "made-up" else "CPU, gloo"


def how_it_ended(trial: Trial) -> str:
    if trial.end == "hang":
        return "until nothing moved"
    if trial.end == "time":
        return "until its time was over"
    codes = sorted({code for code in trial.codes if code})
    return f"exit code {', '.join(map(str, codes))}" if codes else "to its end"


def plural(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def head(examination: Examination) -> str:
    trial, evidence, _ = examination
    name = trial.plan.module or trial.plan.script.name
    count = plural(evidence.n_steps, "step")
    if evidence.n_epochs:
        count += f" in {plural(evidence.n_epochs, 'epoch')}"
    ranks = plural(max(evidence.n, trial.plan.ranks), "rank")
    return f"{name} on {ranks} ({where_it_ran(trial.plan)}): {count}, {how_it_ended(trial)}, {trial.seconds:.0f} s"


def where_it_wrote(trial: Trial) -> list[str]:
    """A line where the ranks' current folder is the user's own."""
    if trial.place.is_copy and trial.place.folder.is_relative_to(trial.place.temporary):
        return []
    if trial.place.is_copy:
        return [f"in {trial.place.folder}, of which there is no copy: what it wrote there stays"]
    why = "" if trial.plan.in_place else ", which has too many files for a copy"
    return [f"in its own folder{why}: what it wrote stays"]


def line_of(finding: Finding, trial: Trial) -> tuple[str, int, str] | None:
    """File as the user knows it, relative where that is shorter; line; its text."""
    if not finding.at:
        return None
    file = trial.place.in_original(finding.at[0])
    near = os.path.relpath(file)
    text = linecache.getline(file, finding.at[1]).strip()
    return (file if near.startswith("..") else near), finding.at[1], text


def wrapped(text: str, first: str = INDENT) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=INDENT) or [first.rstrip()]


def finding_lines(finding: Finding, examination: Examination) -> list[str]:
    chapter = f"chapter {finding.chapter}" if finding.chapter else ""
    title = f"{finding.level:<9}{finding.rule}"
    lines = [f"{title}{chapter:>{max(len(chapter) + 2, WIDTH - len(title))}}" if chapter else title]
    lines += wrapped(finding.seen)
    if place := line_of(finding, examination.trial):
        file, number, text = place
        lines.append(f"{INDENT}{Path(file).name if os.path.isabs(file) else file}:{number}    {text}")
    if finding.fix:
        lines += wrapped(f"fix: {finding.fix}")
    if finding.level == "BROKEN":
        for consequence in examination.verdict.consequences.get(finding.rule, ()):
            lines += wrapped(f"so, too: {consequence}")
    return lines


def last_words(trial: Trial) -> list[str]:
    lines = []
    for rank, words in enumerate(trial.words):
        text = words.replace(str(trial.place.copy), str(trial.place.original))
        said = [line for line in text.splitlines() if line.strip()][-LAST_LINES:]
        if said and said != lines[-len(said) :]:
            lines += [f"last words of process {rank}:", *said]
    return lines


def colored(line: str, use_colors: bool) -> str:
    for word, color in COLORS.items():
        if use_colors and line.startswith(word):
            return f"\033[{color}m{word}\033[0m{line[len(word) :]}"
    return line


def as_text(examination: Examination, use_colors: bool = False) -> str:
    """What a person reads."""
    trial, _, verdict = examination
    lines = [head(examination), *where_it_wrote(trial), ""]
    for level in LEVELS:
        for finding in verdict.findings:
            if finding.level == level:
                lines += [*finding_lines(finding, examination), ""]
    held = [finding.rule + (f" ({finding.seen})" if finding.seen else "") for finding in verdict.holds]
    lines += wrapped("; ".join(held) or "nothing", "holds    ")
    lines += wrapped("; ".join(verdict.not_seen) or "nothing", "not seen ")
    if any(trial.codes) and trial.end == "ended":
        lines += ["", *last_words(trial)]
    return "\n".join(colored(line, use_colors) for line in lines)


def as_json(examination: Examination) -> str:
    """What a program reads."""
    trial, evidence, verdict = examination
    findings = []
    for finding in verdict.findings:
        file, line, text = line_of(finding, trial) or (None, None, None)
        entry = {"level": finding.level, "rule": finding.rule, "seen": finding.seen, "file": file, "line": line}
        follows = verdict.consequences.get(finding.rule, []) if finding.level == "BROKEN" else []
        entry |= {"source": text, "fix": finding.fix, "chapter": finding.chapter, "consequences": follows}
        findings.append(entry)
    report = {
        "script": str(trial.plan.script),
        "ranks": max(evidence.n, trial.plan.ranks),
        "gpu": trial.plan.gpu,
        "steps": evidence.n_steps,
        "epochs": evidence.n_epochs,
        "end": trial.end,
        "exit_codes": trial.codes,
        "seconds": round(trial.seconds, 1),
        "in_copy": not where_it_wrote(trial),
        "broken": verdict.is_broken,
        "findings": findings,
        "holds": [{"rule": finding.rule, "seen": finding.seen} for finding in verdict.holds],
        "not_seen": verdict.not_seen,
    }
    return json.dumps(report, indent=1)
