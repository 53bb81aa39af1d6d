"""All ranks make the same calls, in the same order, at the same step."""

from collections import defaultdict

from ddp_tutorial.check.judge.evidence import Evidence, are_alike, bars
from ddp_tutorial.check.judge.registry import broken, holds, note, rule, suspect
from ddp_tutorial.check.judge.rules.meeting import crashes

TOGETHER = "let all ranks decide together what to leave out, and go through names in one order (sorted)"
LOST_WORKER = (
    "see with num_workers=0 in which line the data set stands; before 3.11.10, Python itself could lose a new worker: "
    "https://github.com/python/cpython/issues/112275"
)
FOLLOWS = ("the ranks make the same calls", "shapes agree", "no rank waits for ever", "no rank is left alone")
DRIFT = (
    "gradients are equal",
    "weights stay equal",
    "what a rank decides by is the same",
    "the script runs",
    "gradients are clipped after the exchange",
    "all ranks step the schedule",
    "metrics are of all samples",
    "one learning rate",
    "the last backward exchanges",
)


@rule("ranks are at the same step", 9, TOGETHER, (*FOLLOWS, *DRIFT))
def same_step(e: Evidence):
    """Proves that a rank left out a backward pass, or that ranks meet in one call with another value of a loop."""
    if e.has_joined or e.n < 2:
        return
    left_out = backward_left_out(e)
    if left_out:
        yield left_out
        return
    other_value = loop_values_differ(e)
    if other_value:
        yield other_value
    elif all(e.tokens(rank) for rank in range(e.n)):
        yield holds()


def backward_left_out(e: Evidence):
    passes = [
        [x for x in e.ranks[rank] if x["kind"] == "backward" or (x["kind"] == "forward" and x["grad"] and x["train"])]
        for rank in range(e.n)
    ]
    for i, events in enumerate(zip(*passes, strict=False)):
        if not are_alike(x["kind"] for x in events):
            rank = next(r for r, x in enumerate(events) if x["kind"] != "backward")
            other = next(x for x in events if x["kind"] == "backward")
            n_done = sum(x["kind"] == "backward" for x in passes[rank][:i])
            seen = (
                f"rank {rank} has left out the backward() of {e.short(other)} after {n_done} of them: from then on it "
                "meets the others one step late"
            )
            return broken(seen, passes[rank][i - 1])
    return None


def loop_values_differ(e: Evidence):
    """A call in which the `for` loops around it have come to other values on each rank."""
    values_at = [defaultdict(list) for _ in range(e.n)]  # of each rank: (line, name) -> values, call by call
    for rank in range(e.n):
        for x in e.tokens(rank):
            for name, value in x.get("loops", {}).items():
                values_at[rank][tuple(x.get("at", ())), name].append(value)
    for i, events in enumerate(zip(*(e.tokens(rank) for rank in range(e.n)), strict=False)):
        lines = [tuple(x.get("at", ())) for x in events]
        if not are_alike(lines):
            continue
        for name in sorted(set.intersection(*(set(x.get("loops", {})) for x in events))):
            values = [x["loops"][name] for x in events]
            all_values = [of_rank[lines[0], name] for of_rank in values_at]
            if not are_alike(values) and mean_the_same(all_values):
                pairs = ", ".join(f"rank {rank} with {name} = {value!r}" for rank, value in enumerate(values))
                seen = f"call {i + 1}: {pairs} meet in one {events[0].get('name') or events[0]['kind']}"
                return broken(seen, events[0])
    return None


def mean_the_same(all_values: list[list]) -> bool:
    """Whether a loop goes through the same names on all ranks, or counts: not through what each rank has of its own."""
    if all(isinstance(value, str) for values in all_values for value in values):
        return are_alike(map(sorted, map(set, all_values)))
    counts = [len(values) > 2 and is_counting(values) for values in all_values]
    return all(counts) and are_alike(values[0] for values in all_values)


def is_counting(values: list) -> bool:
    """Whether each value is above the one before, or the first one again."""
    if not all(isinstance(value, int) for value in values):
        return False
    return all(b >= a or b == values[0] for a, b in zip(values, values[1:], strict=False))


def nature(event: dict) -> tuple:
    return event["kind"], event.get("name"), event["kind"] == "forward" and (event["grad"], event["train"])


@rule(
    "the ranks make the same calls",
    9,
    "let every rank make this call, or none: to validate on one rank, call the plain model",
    ("shapes agree", "no rank waits for ever", "no rank is left alone", *DRIFT),
)
def same_calls(e: Evidence):
    """Proves that the ranks' calls are of another kind at the same place, or that one rank makes more of them."""
    if e.has_joined or e.n < 2:
        return
    lists = [e.tokens(rank) for rank in range(e.n)]
    for i, events in enumerate(zip(*lists, strict=False)):
        if not are_alike(map(nature, events)):
            where = "; ".join(f"rank {rank} is in {e.described(x)}" for rank, x in enumerate(events))
            odd = next((x for x in events if x["kind"] != "backward"), events[0])
            yield broken(f"call {i + 1}: {where}", odd)
            return
    counts = [len(x) for x in lists]
    if not are_alike(counts) and e.end != "time":
        rank = counts.index(max(counts))
        if e.end == "hang" and e.waits_for_worker(counts.index(min(counts))):
            return  # it would make the call too, once its worker has given it a batch
        extra = lists[rank][min(counts)]
        waits = "makes one more" if e.end == "ended" and not any(e.codes) else "waits"
        left = has_left(e, counts.index(min(counts)))
        yield broken(f"{bars(counts)} calls: rank {rank} {waits} in {e.described(extra)}{left}", extra)
    elif min(counts):
        yield holds(f"{min(counts)} of them")


def has_left(e: Evidence, rank: int) -> str:
    """What to say of a rank that has ended by itself, and not well."""
    code = e.codes[rank] if e.n == len(e.codes) else None  # the script has started its ranks itself
    return f"; rank {rank} has left with exit code {code}" if code and code > 0 else ""


@rule("shapes agree", 9, "exchange the sizes, pad to the largest, and cut again")
def same_shapes(e: Evidence):
    """Proves that tensors of other shapes, or types, meet in one collective."""
    if e.has_joined or e.n < 2:
        return
    n_seen = 0
    for events in zip(*([x for x in e.tokens(rank) if x["kind"] == "call"] for rank in range(e.n)), strict=False):
        if not are_alike(x["name"] for x in events):
            return
        if events[0]["name"].endswith(("object", "list", "group")):
            continue
        n_seen += 1
        for what in ("shapes", "dtype"):
            values = [x[what][0] if x[what] and what == "shapes" else x[what] for x in events]
            if not are_alike(values) and all(values):
                yield broken(f"{events[0]['name']} of {bars(values)}", events[0])
                return
    if n_seen:
        yield holds(f"in {n_seen} calls")


@rule(
    "no rank waits for ever", 9, "look for what the other rank does in place of this call", ("no rank is left alone",)
)
def moves(e: Evidence):
    """Proves that nothing moves any more, and says in which line each rank stands."""
    if e.end != "hang":
        if e.n > 1 and e.end == "ended":
            yield holds()
        return
    if e.n and all(e.of(rank, "exit") for rank in range(e.n)):
        yield note("the ranks have ended, and processes that they have started have not")
        return
    if all(e.of(rank, "exit") or e.is_parting(rank) for rank in range(e.n)):
        yield note(
            "a rank does not come back from destroy_process_group(): gloo may hang so while a DDP model lives",
            fix="let go of the model first: train in a function, and call destroy_process_group() after it",
        )
        return
    words, waiting, lines = [], None, []
    for rank in range(e.n):
        stands = e.standing(rank)
        if e.of(rank, "exit"):
            words.append(f"rank {rank} has ended")
        elif stands:
            file, line, waits = stands
            does = "waits" if waits else "stands"
            does = "waits for a worker of its DataLoader" if e.waits_for_worker(rank) else does
            words.append(f"rank {rank} {does} at {e.short({'at': [file, line]})}")
            lines.append([file, line])
            waiting = waiting or (waits and [file, line])
        else:
            words.append(f"rank {rank} stands in no line of the script")
    seen = f"nothing has moved for {e.plan.patience:.0f} s: {'; '.join(words)}"
    late = [e.standing(rank) for rank in range(e.n) if e.waits_for_worker(rank)]
    if late:
        yield suspect(seen, late[0] and list(late[0][:2]), LOST_WORKER)
        return
    yield broken(seen, waiting) if waiting else suspect(seen, lines[0] if lines else None, "or give it more --patience")


@rule("no rank is left alone", 9, "look for what the other rank did", is_remark=True)
def left_alone(e: Evidence):
    """Proves by an error of the connection that another rank has gone, where no rule tells why."""
    yield from crashes(e, of_others=True)
