"""Gradients are averaged, once, and the weights stay equal."""

from math import isclose

from ddp_tutorial.check.judge.evidence import Evidence, are_alike, bars
from ddp_tutorial.check.judge.registry import broken, holds, note, rule, suspect
from ddp_tutorial.check.judge.rules.meeting import CONSEQUENCES
from ddp_tutorial.check.judge.rules.model import count, last_before


def steps_with_other_gradients(e: Evidence) -> list[list[dict]]:
    """The steps, with an event of each rank, whose gradients are not the same on all ranks."""
    return [
        events
        for events in e.hashed_steps.values()
        if not are_alike(sorted(step["gradients"].items(), key=str) for step in events)
    ]


@rule("gradients are clipped after the exchange", 9, "clip after the last backward(), outside of no_sync()")
def clipped_late(e: Evidence):
    """Proves that ranks clip by another norm and step by the same gradients: they are averaged after the clipping."""
    if not e.hashed_steps or steps_with_other_gradients(e):
        return  # the rules on gradients say why; the norms only follow
    pairs = e.in_turn("clip")
    for i, events in enumerate(pairs if e.wraps else ()):
        if not are_alike(event["norm"] for event in events) and are_alike(x["since"] for x in events):
            yield broken(f"the norm is {bars(x['norm'][:8] for x in events)} in call {i + 1}", events[0])
            return
    if pairs:
        yield holds()


@rule(
    "the last backward exchanges",
    5,
    "forward and backward of the last piece stand outside of no_sync()",
    ("gradients are equal", "weights stay equal"),
)
def last_exchanges(e: Evidence):
    """Proves that gradients differ at a step before which the last backward was inside no_sync()."""
    difference = e.drifting_step if e.wraps else None
    if difference:
        key, names, events = difference
        backward = last_before(e, 0, events[0], "backward")
        if backward and backward["forwards"] and not backward["exchanges"]:
            seen = f"step {key[1] + 1}: {count(names, events)} differ: the last backward() was inside no_sync()"
            yield broken(seen, backward)
            return
    if any(not event["exchanges"] for event in e.any("backward")):
        yield holds()


@rule("gradients are equal", 5, "let DDP average them, or average all of them yourself", ("weights stay equal",))
def equal(e: Evidence):
    """Proves that gradients differ between ranks before a step, and the weights do not come together again."""
    if not e.wraps and e.drifting_step:
        return  # the rule on the wrap says it
    if difference := e.drifting_step:
        key, names, events = difference
        yield broken(f"step {key[1] + 1}: {count(names, events)} differ between ranks ({names[0]})", events[0])
    elif e.hashed_steps and e.n > 1:
        some_differ = steps_with_other_gradients(e)
        if some_differ:
            seen = (
                f"they differ in {len(some_differ)} of {len(e.hashed_steps)} steps, and the weights are averaged later"
            )
            yield note(seen, some_differ[0][0], "this is right where it is meant")
        else:
            yield holds(f"in {len(e.hashed_steps)} steps")


@rule("weights stay equal", 9, "what else changes them on one rank: a loaded state, a running average, a clamp?")
def weights_equal(e: Evidence):
    """Proves that weights differ after a step, though the gradients were equal, and do not come together again.

    Where they come together, the script averages them itself, which may be meant.
    """
    checked, apart = 0, []
    for optimizer, n in sorted(e.weights):
        names = e.differing_weights(optimizer, n)
        checked += n > 0
        if names and (e.is_averaged_later(optimizer, n) or e.waits_for_average(optimizer, n)):
            apart += [(optimizer, n)] * (n > 0)
        elif names and (e.wraps or e.begins_alike(optimizer)):
            events = e.steps.get((optimizer, n)) or e.steps.get((optimizer, n - 1))
            total = len(e.weights[optimizer, n][0])
            when = f"after step {n}" if n else "before the first step"
            seen = f"{when} {len(names)} of {total} weights differ between ranks ({names[0]})"
            own = all("not of a DDP model" in name for name in names)
            found = (suspect if own and n == 0 else broken)(seen, changed_by(e, optimizer, n) or events[0])
            yield found._replace(explains=("the script runs",) if fails_by_assertion(e) else ())
            return
    if apart:
        yield averaged_by_hand(e, apart, checked)
    elif checked and e.n > 1:
        yield holds(f"after {checked} steps")


def fails_by_assertion(e: Evidence) -> bool:
    """Whether the script stops at a check of its own: it has most likely seen the same."""
    errors = [event["error"] for event in e.any("crash")]
    own = [error for error in errors if not any(word in error for word in CONSEQUENCES)]
    return bool(own) and all(error.startswith("AssertionError") for error in own)


def averaged_by_hand(e: Evidence, apart: list[tuple[int, int]], checked: int):
    """Of steps after which weights differ: they come together again, or wait for it when the script ends."""
    optimizer, n = apart[0]
    period = max(e.averaging_period(optimizer) for optimizer, _ in apart)
    seen = f"they differ after {len(apart)} of {checked} steps, and are equal again within {period}: local steps?"
    sees_end = (optimizer, 1 + max(m for o, m in e.steps if o == optimizer)) in e.weights
    at_the_end = [m for o, m in apart if sees_end and o == optimizer and not e.is_averaged_later(o, m)]
    if at_the_end:
        seen += f" After the last {len(at_the_end)} they still differ"
    fix = "where local steps are meant, this is right" + (", once all ranks have met at the end" if at_the_end else "")
    return suspect(seen, (e.steps.get((optimizer, n - 1)) or e.steps[optimizer, n])[0], fix)


def changed_by(e: Evidence, optimizer: int, n: int) -> dict | None:
    """The step, if it was the step that made them differ."""
    after = e.aligned("stepped", key=lambda x: (x["optimizer"], x["n"])).get((optimizer, n - 1))
    return after[0] if after and not are_alike(x["weights"] for x in after) else None


@rule("something is learned", 2, "look at the loss: does it depend on the weights? (one class? detached?)")
def learns(e: Evidence):
    """Proves that all gradients are zero in all steps."""
    hashed = [event for event in e.any("step") if "zero" in event]
    if hashed and all(event["zero"] for event in hashed):
        yield broken(f"all gradients are zero in all of {len(hashed)} steps", hashed[0])
    elif hashed:
        yield holds()


@rule("accumulation exchanges once a step", 5, "with model.no_sync(): around all pieces but the last", is_remark=True)
def accumulates(e: Evidence):
    """Notes that each of several backward passes of a step sends the gradients."""
    if not e.wraps or not e.n:
        return
    several = [event for event in e.of(0, "step") if event["backwards"] > 1]
    if 2 * len(several) > len(e.of(0, "step")) and all(event["exchanges"] for event in e.of(0, "backward")):
        seen = f"{several[0]['backwards']} backward passes a step, and each sends the gradients"
        yield note(seen, several[0])


def divided_by_ranks(e: Evidence) -> dict | None:
    """A backward whose loss was just divided by the number of ranks, or by that times the pieces of a step.

    Where a step has as many pieces as there are ranks, one division is by the pieces: a second one is not.
    """
    pieces = {event["backwards"] for event in e.of(0, "step")} if e.n else set()
    both = [e.n * n for n in pieces if n > 1]
    for event in e.of(0, "backward") if e.n else ():
        by_ranks = sum(isclose(factor * e.n, 1, rel_tol=1e-6) for factor in event["factors"])
        by_both = any(isclose(factor * n, 1, rel_tol=1e-6) for factor in event["factors"] for n in both)
        if by_ranks > (e.n in pieces) or by_both:
            return event
    return None


@rule("the loss is a mean, once", 9, "leave the division out: DDP takes the mean over the ranks already")
def mean_once(e: Evidence):
    """Suspects that the loss is divided by the number of ranks. That the divisor follows that number proves it."""
    if not e.wraps or not e.any("backward"):
        return
    event = divided_by_ranks(e)
    other = e.other_size
    if not event:
        yield holds()
    elif other is None:
        yield suspect(f"it is divided by {e.n} before backward(), and there are {e.n} ranks", event)
    elif divided_by_ranks(other):
        yield broken(f"it is divided by {e.n} on {e.n} ranks and by {other.n} on {other.n}", event)
    else:
        yield holds(f"what divides it does not follow the number of ranks, {e.n} and {other.n}")


@rule("gathered tensors keep their gradient", 9, "torch.distributed.nn.functional.all_gather")
def keep_gradient(e: Evidence):
    """Proves that a loss is computed with rows of all_gather, which carry no gradient, beside others that do."""
    for event in e.any("cut_gradient")[:1]:
        yield broken("all_gather returns rows without a gradient, and the loss is computed with them", event)
