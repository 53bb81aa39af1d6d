"""What is wrapped, and what is called and stepped."""

from ddp_tutorial.check.judge.evidence import Evidence, are_alike, bars
from ddp_tutorial.check.judge.registry import broken, holds, note, rule, suspect

DRIFT = ("gradients are equal", "weights stay equal", "gradients are clipped after the exchange", "all ranks load")


@rule(
    "one model at the wrap",
    9,
    "build the layers in one order on all ranks: sort the names",
    (*DRIFT, "one start", "the script runs"),
)
def one_model(e: Evidence):
    """Proves that weights of other names or shapes stand at the same place: DDP averages by place, not by name."""
    for events in e.in_turn("wrap") if e.groups_are_whole else ():
        lists = [[(name, shape) for name, shape, _ in event["names"]] for event in events]
        if not are_alike(map(len, lists)):
            yield broken(f"the ranks wrap {bars(map(len, lists))} weights", events[0], "build the model alike")
            return
        if not are_alike(lists):
            i, row = next((i, row) for i, row in enumerate(zip(*lists, strict=True)) if not are_alike(row))
            names = [f"{name} {shape}" if are_alike(x for x, _ in row) else name for name, shape in row]
            yield broken(f"weight {i} is {bars(names)}: DDP averages by place, not by name", events[0])
            return
    if e.in_turn("wrap"):
        yield holds()


@rule("one start", 9, "let DDP send rank 0's weights: no init_sync=False, and no change right after", DRIFT)
def one_start(e: Evidence):
    """Proves that the weights differ right after the wrap."""
    for events in e.in_turn("wrapped") if e.groups_are_whole else ():
        names = [x for x in events[0]["weights"] if not are_alike(w["weights"].get(x) for w in events)]
        if names:
            yield broken(f"{len(names)} weights differ right after the wrap ({names[0]})", events[0])
            return
    if e.in_turn("wrapped"):
        yield holds()


@rule("a model is wrapped", 4, "model = DistributedDataParallel(model), and call that", DRIFT)
def is_wrapped(e: Evidence):
    """Proves that no model is wrapped, and that the gradients of the ranks differ and their weights drift apart."""
    if e.wraps:
        yield holds()
    elif e.has_met and (difference := e.drifting_step):
        (optimizer, n), names, events = difference
        seen = f"step {n + 1}: {count(names, events)} differ between ranks, and no model is wrapped"
        if e.begins_alike(optimizer):
            yield broken(f"{seen}: each rank trains its own", events[0])
        else:
            yield suspect(f"{seen}; they began with other weights, too: is each a part of one model?", events[0])


@rule("the wrapped model is what is called", 9, "call what DistributedDataParallel returned, in training", DRIFT)
def is_called(e: Evidence):
    """Proves that gradients differ after a backward pass that no forward of the wrapped model came before."""
    if not e.wraps:
        return
    difference = e.drifting_step
    if difference:
        key, names, events = difference
        backward = last_before(e, 0, events[0], "backward")
        if backward and not backward["forwards"]:
            line = backward.get("plain_at") or backward
            yield broken(f"step {key[1] + 1}: the plain model was called, and {count(names, events)} differ", line)
            return
    if e.any("forward"):
        yield holds()


@rule("nothing is frozen or unfrozen after the wrap", 9, "wrap again after requires_grad_(True)", DRIFT)
def nothing_unfrozen(e: Evidence):
    """Proves that weights which needed no gradient at the wrap have one now, and that it differs between ranks."""
    for key, events in e.hashed_steps.items():
        names = [x for x in events[0]["unfrozen"] if not are_alike(s["gradients"].get(x) for s in events)]
        if names:
            yield broken(
                f"step {key[1] + 1}: {count(names, events)} differ ({names[0]}): unfrozen after the wrap", events[0]
            )
            return
    if e.wraps and e.hashed_steps:
        yield holds()


@rule(
    "every weight gets a gradient",
    5,
    "leave the layer out, freeze it before the wrap, or find_unused_parameters=True",
    (*DRIFT, "the script runs", "no rank waits for ever", "no rank is left alone"),
)
def all_used(e: Evidence):
    """Proves by DDP's own error that a weight got no gradient: no loss uses it, or it was frozen after the wrap."""
    for event in e.any("crash"):
        if "Expected to have finished reduction" in event["error"]:
            yield broken(
                "DDP waits for gradients that never come: a layer that no loss uses, or frozen after the wrap", event
            )
            return
    if e.wraps and e.steps:
        yield holds()


@rule("the optimizer steps what is wrapped", 4, "make the optimizer of the model's parameters, all of them", DRIFT)
def steps_wrapped(e: Evidence):
    """Proves that weights outside of any DDP model are stepped with differing gradients; notes those never stepped."""
    if not e.wraps or not e.hashed_steps:
        return
    if difference := e.drifting_step:
        key, names, events = difference
        if all("not of a DDP model" in name for name in names):
            yield broken(
                f"step {key[1] + 1}: weights of no DDP model are stepped, and their gradients differ ({names[0]})",
                events[0],
            )
            return
    missing = [set(event["missing"]) for event in e.of(0, "step") if "missing" in event]
    never = set.intersection(*missing) if missing else set()
    if never:
        first = e.of(0, "step")[0]
        yield suspect(
            f"{len(never)} weights of the DDP model are in no optimizer ({min(never)})",
            first,
            "give the optimizer all of model.parameters(), or freeze the others before the wrap",
        )
    else:
        yield holds()


@rule(
    "BatchNorm sees its own rank only",
    5,
    "SyncBatchNorm.convert_sync_batchnorm(model), where a rank's batch is small",
    is_remark=True,
)
def batch_norm(e: Evidence):
    """Notes layers whose statistics are those of a rank's samples."""
    for event in e.of(0, "wrap") if e.n else ():
        if event["norms"]:
            yield note(f"{event['norms']} BatchNorm layers take mean and variance over their own rank's samples", event)
            return


@rule("unused weights are looked for", 5, "leave find_unused_parameters off where all weights are used", is_remark=True)
def unused(e: Evidence):
    """Notes that DDP walks through the graph in each step."""
    for event in e.of(0, "wrap") if e.n else ():
        if event["unused"]:
            yield note("find_unused_parameters is on: a walk through the graph in each step", event)
            return


def count(names: list[str], events: list[dict]) -> str:
    return f"{len(names)} of {len(events[0]['gradients'])} gradients"


def last_before(e: Evidence, rank: int, event: dict, kind: str) -> dict | None:
    events = e.ranks[rank]
    return next((x for x in reversed(events[: events.index(event)]) if x["kind"] == kind), None)
