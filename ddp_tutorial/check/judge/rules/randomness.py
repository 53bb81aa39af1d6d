"""Random numbers that must differ: between ranks, and between workers."""

from ddp_tutorial.check.judge.evidence import Evidence, are_alike
from ddp_tutorial.check.judge.registry import broken, holds, rule

FIRST = 5  # draws that are compared
OWN_NUMBERS = "torch.manual_seed(seed + rank) once the model is built"


@rule("ranks drop other units", 9, OWN_NUMBERS)
def dropout(e: Evidence):
    """Proves that dropout begins with the same state of the generator on all ranks, each time."""
    states = [[event["state"] for event in e.of(rank, "dropout")][:FIRST] for rank in range(e.n)]
    if e.n > 1 and all(states):
        if are_alike(states):
            yield broken(f"dropout draws the same random numbers on {e.all_ranks}", e.of(0, "dropout")[0])
        else:
            yield holds()


def draws(e: Evidence, rank: int) -> dict[tuple, dict]:
    """(worker, its batch, which generators) -> the first such draw."""
    events = {}
    for event in e.of(rank, "draw") + [x for x in e.workers[rank] if x["kind"] == "draw"]:
        events.setdefault((event["worker"], event["n"], tuple(event["which"])), event)
    return events


@rule("ranks augment differently", 9, f"{OWN_NUMBERS}, and before the loader is read")
def augmentation(e: Evidence):
    """Proves that a data set draws with the same states of its generators on all ranks."""
    by_rank = [draws(e, rank) for rank in range(e.n)]
    common = set.intersection(*map(set, by_rank)) if e.n > 1 else set()
    if not common:
        return
    if all(are_alike(events[key]["states"] for events in by_rank) for key in common):
        event = by_rank[0][min(common, key=str)]
        yield broken(f"the data set draws the same random numbers on {e.all_ranks}", event)
    else:
        yield holds()


@rule("workers augment differently", 12, "seed a generator of the data set's own in worker_init_fn, or use torch's")
def workers(e: Evidence):
    """Proves that two workers of a rank draw with the same states."""
    for rank in range(e.n):
        by_worker: dict[tuple, dict[int, list]] = {}
        events = draws(e, rank)
        for (worker, n, which), event in events.items():
            if worker is not None:
                by_worker.setdefault((n, which), {})[worker] = event["states"]
        pairs = [list(states.values()) for states in by_worker.values() if len(states) > 1]
        if pairs:
            if all(are_alike(states) for states in pairs):
                event = next(x for (worker, *_), x in events.items() if worker is not None)
                yield broken(f"the workers of rank {rank} draw the same random numbers", event)
            else:
                yield holds()
            return
