"""One rank writes, and what it writes can be read without DDP."""

from pathlib import Path

from ddp_tutorial.check.judge.evidence import Evidence
from ddp_tutorial.check.judge.registry import broken, holds, note, rule, suspect

SHOWN = 10  # paths that are named


@rule("one rank writes each file", 4, "if rank == 0:")
def one_writes(e: Evidence):
    """Proves that several ranks save to one file; suspects it of other files that they open for writing."""
    by_rank = []
    for rank in range(e.n):
        events = {}
        for event in e.of(rank, "write", "save"):
            if event.get("path") and not event.get("append"):
                events[event["path"]] = event
        by_rank.append(events)
    if not any(by_rank) or e.n < 2:
        return
    for path in sorted(set().union(*by_rank)):
        writers = [rank for rank, events in enumerate(by_rank) if path in events]
        if len(writers) > 1:
            event = by_rank[writers[-1]][path]
            say = broken if event["kind"] == "save" else suspect
            yield say(f"{e.all_ranks if len(writers) == e.n else len(writers)} write {Path(path).name}", event)
            return
    yield holds()


@rule("checkpoints are of the plain model", 4, "save model.module.state_dict()")
def plain_names(e: Evidence):
    """Notes names with "module." before them: the plain model cannot load them."""
    saves = e.any("save")
    for event in saves:
        if event["prefixed"] or event["whole"]:
            what = (
                "the DDP model itself is saved" if event["whole"] else 'the names that are saved begin with "module."'
            )
            yield note(what, event)
            return
    if saves:
        yield holds()


@rule("one rank downloads", 4, "download before the launch, or on one rank before a barrier")
def one_downloads(e: Evidence):
    """Suspects that all ranks fetch the same address."""
    urls = [{event["url"]: event for event in e.of(rank, "download")} for rank in range(e.n)]
    shared = set.intersection(*map(set, urls)) if e.n > 1 else set()
    if shared:
        yield suspect(f"{e.all_ranks} fetch {min(shared)}", urls[0][min(shared)])


@rule(
    "nothing is written outside of the copy",
    7,
    "let it write in its own folder, of which there is a copy",
    is_remark=True,
)
def elsewhere(e: Evidence):
    """Notes files that were written outside of the copy in which the script ran, or that there was no copy."""
    paths = [event["path"] for event in e.any("write", "save") if event.get("path")]
    outside = sorted({path for path in paths if not Path(path).is_relative_to(e.place.temporary)})
    if outside and e.place.is_copy:
        yield note(f"it wrote {some(outside)}")
    elif outside:
        fix = "leave out --in-place" if e.plan.in_place else "keep its data in another folder"
        yield note(f"there was no copy: it wrote {some(outside)}", fix=fix)
    if e.changed:
        seen = f"too large for the copy, and changed by it or meanwhile: {some(e.changed)}"
        yield note(seen, fix="move other files out of its folder: then these are copied")


def some(paths: list[str]) -> str:
    more = f", and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more
