"""The events of all ranks, and what is often asked of them."""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path

Event = dict
STACK_FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')
WAITING = ("/torch/distributed/", "/torch/autograd/", "/torch/nn/parallel/")


def are_alike(values: Iterable) -> bool:
    values = list(values)
    return all(value == values[0] for value in values)


def bars(values: Iterable) -> str:
    """One value for each rank: a | b."""
    return " | ".join(map(str, values))


def first_unlike(turns: Iterable, value: str) -> tuple[Event, ...] | None:
    """Of events of all ranks, in turn, the first whose `value` is not the same on all."""
    return next((events for events in turns if not are_alike(event[value] for event in events)), None)


class Evidence:
    """What a trial has left, by rank."""

    def __init__(self, trial):
        self.plan, self.end, self.codes = trial.plan, trial.end, trial.codes
        self.world, self.logs, self.words = trial.plan.ranks, trial.logs, "\n".join(trial.words)
        self.place, self.changed = trial.place, trial.changed
        self.other_size: Evidence | None = None  # of the same script on one rank more, where that was launched
        pids = self._pids()
        self.ranks: list[list[Event]] = [trial.logs[pid] for pid in pids]
        self.stacks = [trial.stacks.get(pid, "") for pid in pids]
        self.workers = [self._workers_of(pid) for pid in pids]

    def _pids(self) -> list[int]:
        """Of the processes that are ranks, by rank: those that have met, else those that were told a rank."""
        known: dict[int, int] = {}
        for pid, events in self.logs.items():
            for event in events:
                if event["kind"] == "met":
                    known.setdefault(event["rank"], pid)
                    break
        for pid, events in self.logs.items():
            first = next((event for event in events if event["kind"] == "process"), None)
            if first and first["rank"] is not None and first["owner"] == pid:
                known.setdefault(int(first["rank"]), pid)
        return [known[rank] for rank in sorted(known)]

    def _workers_of(self, pid: int) -> list[Event]:
        owned = []
        for other, events in self.logs.items():
            if other != pid and any(e["kind"] == "process" and e["owner"] == pid for e in events[:3]):
                owned += events
        return owned

    @cached_property
    def n(self) -> int:
        return len(self.ranks)

    @property
    def all_ranks(self) -> str:
        return "both ranks" if self.n == 2 else f"all {self.n} ranks"

    def of(self, rank: int, *kinds: str) -> list[Event]:
        return [event for event in self.ranks[rank] if event["kind"] in kinds]

    def any(self, *kinds: str) -> list[Event]:
        """Those of all ranks, one rank after the other."""
        return [event for rank in range(self.n) for event in self.of(rank, *kinds)]

    def in_turn(self, *kinds: str) -> list[tuple[Event, ...]]:
        """The first of each rank, the second of each, as far as all have one."""
        return list(zip(*(self.of(rank, *kinds) for rank in range(self.n)), strict=False))

    def aligned(self, *kinds: str, key: Callable[[Event], Hashable]) -> dict[Hashable, list[Event]]:
        """Events that have the same key on all ranks: key -> one of each."""
        by_rank = [{key(event): event for event in self.of(rank, *kinds)} for rank in range(self.n)]
        if not by_rank:
            return {}
        return {k: [events[k] for events in by_rank] for k in by_rank[0] if all(k in events for events in by_rank)}

    # steps

    @cached_property
    def has_met(self) -> bool:
        return self.n > 1 and all(self.of(rank, "met") for rank in range(self.n))

    @cached_property
    def wraps(self) -> bool:
        return any(self.of(rank, "wrap") for rank in range(self.n))

    @cached_property
    def has_joined(self) -> bool:
        """Whether ranks that are done make the calls of the others: `join`."""
        return bool(self.any("join"))

    @cached_property
    def steps(self) -> dict[tuple[int, int], list[Event]]:
        """(optimizer, number of the step) -> the events of all ranks before it; none with join: a rank takes fewer."""
        if self.has_joined or not self.groups_are_whole:
            return {}
        return self.aligned("step", key=lambda e: (e["optimizer"], e["n"]))

    @cached_property
    def hashed_steps(self) -> dict[tuple[int, int], list[Event]]:
        """Those whose gradients and weights can be compared."""
        return {
            key: events
            for key, events in self.steps.items()
            if all("gradients" in e and not e["partial"] for e in events)
            and are_alike(sorted(e["weights"]) for e in events)
        }

    @cached_property
    def weights(self) -> dict[tuple[int, int], list[dict[str, str]]]:
        """(optimizer, n) -> the weights of all ranks after n steps and whatever came after them."""
        if self.has_joined or not self.groups_are_whole:
            return {}
        events = self.aligned("step", "final", key=lambda e: (e["optimizer"], e["n"]))
        full = {key: es for key, es in events.items() if all("weights" in e and not e.get("partial") for e in es)}
        return {
            key: [e["weights"] for e in es] for key, es in full.items() if are_alike(sorted(e["weights"]) for e in es)
        }

    @cached_property
    def groups_are_whole(self) -> bool:
        """Whether each DDP model is shared by all ranks."""
        return all(event["whole"] for event in self.any("wrap"))

    def begins_alike(self, optimizer: int) -> bool:
        """Whether all ranks have the same weights before the first step."""
        return are_alike(self.weights.get((optimizer, 0), []))

    def differing_weights(self, optimizer: int, n: int) -> list[str] | None:
        """Names of those that differ between ranks after n steps; None if that is not known."""
        weights = self.weights.get((optimizer, n))
        return weights and [name for name in weights[0] if not are_alike(w[name] for w in weights)]

    @cached_property
    def equal_after(self) -> dict[int, list[int]]:
        """Optimizer -> the numbers of steps, in order, after which all ranks had the same weights."""
        equal = defaultdict(list)
        for optimizer, n in sorted(self.weights):
            if self.differing_weights(optimizer, n) == []:
                equal[optimizer].append(n)
        return equal

    def is_averaged_later(self, optimizer: int, n: int) -> bool:
        """Whether weights that differ after n steps are equal again after more of them."""
        return any(m >= n for m in self.equal_after[optimizer])

    def averaging_period(self, optimizer: int) -> int:
        """The most steps after which weights were equal again; 1 if they never differed, 0 if it is not known."""
        return max((b - a for a, b in pairwise(self.equal_after[optimizer])), default=0)

    def waits_for_average(self, optimizer: int, n: int) -> bool:
        """Whether weights that differ after n steps, until the end, have done so before for as long, and met again."""
        equal = self.equal_after[optimizer]
        period = self.averaging_period(optimizer)
        last = max((m for o, m in self.weights if o == optimizer), default=n)
        return period > 1 and last - max(equal) <= period and n > max(equal)

    @cached_property
    def drifting_step(self) -> tuple[tuple[int, int], list[str], list[Event]] | None:
        """The first step whose gradients differ between ranks, where the weights do not come together again.

        What comes after the last step is not always seen: it is as it was after the steps before.
        """
        are_averaged = False
        for (optimizer, n), events in self.hashed_steps.items():
            names = [x for x in events[0]["gradients"] if not are_alike(s["gradients"].get(x) for s in events)]
            if not names:
                continue
            if self.is_averaged_later(optimizer, n + 1) or self.waits_for_average(optimizer, n + 1):
                are_averaged = True
            elif not (are_averaged and (optimizer, n + 1) not in self.weights):
                return (optimizer, n), names, events
        return None

    # passes and calls, in order

    def tokens(self, rank: int) -> list[Event]:
        """What meets the same of the other ranks: calls, backward passes, and forwards that send buffers."""

        def meets(e: Event) -> bool:
            return (
                (e["kind"] == "call" and e["whole"])
                or (e["kind"] == "forward" and e["sends_buffers"])
                or (e["kind"] == "backward" and e["forwards"] and e["exchanges"])
            )

        return [e for e in self.ranks[rank] if meets(e)]

    def short(self, event: Event | None) -> str:
        at = event and event.get("at")
        return f"{Path(at[0]).name}:{at[1]}" if at else "a line that is not the script's"

    def described(self, event: Event) -> str:
        if event["kind"] == "call":
            what = event["name"]
        elif event["kind"] == "backward":
            what = "backward()"
        else:
            what = "the forward of the DDP model" + ("" if event["grad"] else " (without gradients)")
        return f"{what} at {self.short(event)}"

    def standing(self, rank: int) -> tuple[str, int, bool] | None:
        """Where a rank stood when nothing moved: file, line, and whether it waited for others."""
        frames = STACK_FRAME.findall(self.stacks[rank])
        users = [(file, int(line)) for file, line, _ in frames if self.is_users(file)]
        if not users:
            return None
        index = next(i for i, (file, _, _) in enumerate(frames) if self.is_users(file))
        waits = any(part in file for file, _, _ in frames[:index] for part in WAITING)
        return *users[0], waits

    def waits_for_worker(self, rank: int) -> bool:
        """Whether it stood in a DataLoader, to which none of its workers gave a batch."""
        return "in _try_get_data" in self.stacks[rank]

    def is_parting(self, rank: int) -> bool:
        """Whether it stood in `destroy_process_group`."""
        return "in destroy_process_group" in self.stacks[rank]

    def is_users(self, file: str) -> bool:
        folders = (self.place.copy, self.place.original)
        return (
            any(Path(file).is_relative_to(folder) for folder in folders)
            and "/site-packages/" not in file
            and ("/ddp_tutorial/check/" not in file)
        )

    # samples

    @cached_property
    def epochs(self) -> dict[tuple[str, int], list[Event]]:
        """(loader, epoch) -> the events of all ranks."""
        return self.aligned("epoch", key=lambda e: (e["loader"], e["epoch"]))

    def aligned_alone(self, rank: int) -> list[Event]:
        """The epochs of loaders that no other rank reads from."""
        others = {event["loader"] for r in range(self.n) if r != rank for event in self.of(r, "epoch")}
        return [event for event in self.of(rank, "epoch") if event["loader"] not in others]

    @cached_property
    def trained(self) -> set[tuple[str, int]]:
        """The epochs in which rank 0 trains."""
        return {(e["loader"], e["epoch"]) for e in self.of(0, "trains")} if self.n else set()

    @cached_property
    def read(self) -> dict[tuple[int, str, int], list[int]]:
        """(rank, loader, epoch) -> the samples read: indices, or hashes of their rows."""
        samples = defaultdict(list)
        for rank in range(self.n):
            for e in self.of(rank, "batch"):
                samples[rank, e["loader"], e["epoch"]] += e["indices"] or e["rows"]
        return samples

    @cached_property
    def learned(self) -> dict[tuple[int, str, int], list[int]]:
        """As `read`, of those batches that were trained on before the rank read the next one of the loader."""
        samples = defaultdict(list)
        for rank in range(self.n):
            last: dict[str, Event] = {}
            for e in self.ranks[rank]:
                if e["kind"] == "batch":
                    last[e["loader"]] = e
                elif e["kind"] == "backward" or (e["kind"] == "forward" and e["grad"] and e["train"]):
                    for batch in last.values():
                        samples[rank, batch["loader"], batch["epoch"]] += batch["indices"] or batch["rows"]
                    last.clear()
        return samples

    @cached_property
    def first_step(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Epoch -> (optimizer, number) of the first step that rank 0 takes in it."""
        steps, epoch = {}, None
        for e in self.ranks[0] if self.n else ():
            if e["kind"] == "batch":
                epoch = e["loader"], e["epoch"]
            elif e["kind"] == "step" and epoch:
                steps.setdefault(epoch, (e["optimizer"], e["n"]))
        return steps

    def trains(self, loader: str) -> bool:
        return any(name == loader for name, _ in self.trained)

    @cached_property
    def n_steps(self) -> int:
        return max((len(self.of(rank, "step")) for rank in range(self.n)), default=0)

    @cached_property
    def n_epochs(self) -> int:
        """Of training."""
        counts = defaultdict(int)
        for loader, _ in self.trained:
            counts[loader] += 1
        return max(counts.values(), default=0)
