"""What a step and a decision depend on is the same on all ranks."""

from ddp_tutorial.check.judge.evidence import Evidence, are_alike, bars, first_unlike
from ddp_tutorial.check.judge.registry import broken, holds, rule, suspect

DRIFT = ("gradients are equal", "weights stay equal")


@rule(
    "one gradient scale",
    9,
    "load the scaler's state on all ranks",
    (*DRIFT, "all ranks load", "gradients are clipped after the exchange"),
)
def one_scale(e: Evidence):
    """Proves that DDP averages gradients of losses that were scaled by another number on each rank."""
    pairs = e.in_turn("scale")
    if unlike := first_unlike(pairs, "scale"):
        yield broken(f"GradScaler's scale is {bars(event['scale'] for event in unlike)}", unlike[0])
    elif pairs:
        yield holds(f"in {len(pairs)} steps")


@rule(
    "what a rank decides by is the same",
    9,
    "all_reduce the metric before anything is decided by it",
    (*DRIFT, "one learning rate"),
)
def decides(e: Evidence):
    """Proves that a schedule which follows a metric is told another one on each rank."""
    pairs = e.in_turn("plateau")
    if unlike := first_unlike(pairs, "metric"):
        yield broken(f"the schedule is told {bars(event['metric'][:8] for event in unlike)}", unlike[0])
    elif pairs:
        yield holds(f"{len(pairs)} times")


@rule("all ranks step the schedule", 9, "scheduler.step() on all ranks", (*DRIFT, "one learning rate"))
def scheduled(e: Evidence):
    """Proves that a schedule was stepped more often on one rank than on another, before the same step."""
    counts, last = [], {}
    for rank in range(e.n):
        so_far, at_step = 0, {}
        for event in e.ranks[rank]:
            if event["kind"] == "schedule":
                so_far += 1
                last[rank] = event
            elif event["kind"] == "step":
                at_step[event["optimizer"], event["n"]] = so_far
        counts.append(at_step)
    for key in counts[0] if counts and not e.has_joined else ():
        told = [count.get(key) for count in counts]
        if None not in told and not are_alike(told):
            event = last[told.index(max(told))]
            yield broken(f"before step {key[1] + 1} it was stepped {bars(told)} times", event)
            return
    if last and e.n > 1 and not e.has_joined:
        yield holds()


@rule("one learning rate", 9, "set the learning rate alike on all ranks", DRIFT)
def one_rate(e: Evidence):
    """Proves that ranks take the same step with another learning rate."""
    if unlike := first_unlike(e.steps.values(), "lr"):
        rates = (", ".join(f"{lr:.6g}" for lr in event["lr"]) for event in unlike)
        yield broken(f"step {unlike[0]['n'] + 1}: {bars(rates)}", unlike[0])
    elif e.steps and e.n > 1:
        yield holds(f"in {len(e.steps)} steps")


@rule("all ranks load", 9, "load optimizer, schedule and scaler on all ranks: DDP sends the weights only", DRIFT)
def all_load(e: Evidence):
    """Suspects that a state which DDP does not send was loaded on some ranks only."""
    loads = [[event["what"] for event in e.of(rank, "load")] for rank in range(e.n)]
    if not any(loads):
        return
    if are_alike(loads):
        yield holds(", ".join(sorted(set(loads[0]))))
    else:
        what = bars(", ".join(names) or "nothing" for names in loads)
        yield suspect(f"states loaded: {what}", e.any("load")[0])
