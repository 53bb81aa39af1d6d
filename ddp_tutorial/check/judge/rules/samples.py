"""Each rank reads its own samples, each once, in another order each epoch; metrics are of all."""

from collections import defaultdict
from collections.abc import Iterator

from ddp_tutorial.check.judge.evidence import Evidence, are_alike, bars
from ddp_tutorial.check.judge.registry import broken, holds, note, rule, suspect

DEAL = "sampler=DistributedSampler(data), or deal one seeded draw out by rank"
SHARE = 1.5  # ranks that together read so many times the samples there are do not read a share each
TRAINED = 0.75  # of the samples read, unless batches are left out; one that is fetched ahead is not
FEW = 20  # a twentieth of the samples may be read by two ranks before anything is said
SOME = 5  # samples may look like others by chance
DRAWS = ("RandomSampler", "WeightedRandomSampler", "SubsetRandomSampler", "DistributedSampler")
ADD_UP = ("all_", "reduce", "gather", "isend", "send")


def learns(e: Evidence, loader: str, event: dict) -> bool:
    """Whether the loader is trained with; in a script without training, whether it looks like one for it."""
    if e.any("backward"):
        return e.trains(loader)
    return event["stream"] or event["sampler"] in DRAWS


def read_by(e: Evidence, key: tuple) -> list[list[int]]:
    return [e.read[(rank, *key)] for rank in range(e.n)]


def trained_by(e: Evidence, key: tuple) -> list[list[int]]:
    """Of a script that trains: the samples trained on, as far as is known."""
    return [e.learned[(rank, *key)] for rank in range(e.n)] if e.any("backward") else read_by(e, key)


def are_left_out(e: Evidence, key: tuple) -> bool:
    """Whether ranks read batches that they do not train on at once: they may deal them out so."""
    pairs = zip(trained_by(e, key), read_by(e, key), strict=True)
    return any(len(trained) < TRAINED * len(read) for trained, read in pairs)


def own_subsets(e: Evidence, loader: str) -> bool:
    """Whether the ranks read data sets that are shares of one: `Subset`s without a common index."""
    first = e.epochs.get((loader, 0))
    subsets = [event["subset"] for event in first or ()]
    return bool(subsets) and all(subsets) and not set.intersection(*map(set, subsets))


@rule(
    "the data are the same",
    9,
    "random_split(..., generator=torch.Generator().manual_seed(0)): one seed on all ranks",
    ("each rank reads its own samples", "metrics are of all samples"),
)
def same_split(e: Evidence):
    """Proves that one rank validates on what another one trains on: the split has another seed on each."""
    looked = False
    for (_, epoch), events in e.epochs.items():
        subsets = [event["subset"] for event in events]
        if epoch == 0 and all(subsets):
            looked = True
            overlap = len(set.intersection(*map(set, subsets)))
            if overlap and not are_alike(map(sorted, subsets)):
                seen = "the ranks have split the data differently: one validates on what another one trains on"
                yield broken(seen, events[0]["made"])
                return
    rows = rows_by_rank(e)
    for rank in range(e.n):
        for other in range(e.n):
            trained, validated = rows[rank][0], rows[other][1]
            shared = trained & validated
            if rank != other and len(shared) > max(SOME, len(validated) / 4) and not shared & rows[other][0]:
                line = next(x for x in e.of(other, "epoch") if not learns(e, x["loader"], x))
                seen = f"rank {rank} trains on {len(shared)} of {len(validated)} samples that rank {other} validates on"
                yield broken(seen, line["made"], "split with one seed on all ranks")
                return
    yield from other_samples(e)
    if looked:
        yield holds()


def rows_by_rank(e: Evidence) -> list[tuple[set[int], set[int]]]:
    """Of each rank: hashes of the samples trained on, and of those validated on."""
    pairs = []
    for rank in range(e.n):
        trained, validated = set(), set()
        for event in e.of(rank, "batch"):
            (trained if e.trains(event["loader"]) else validated).update(event["rows"])
        pairs.append((trained, validated) if e.trained else (set(), set()))
    return pairs


def known_rows(e: Evidence, rank: int) -> Iterator[tuple[str, int, int]]:
    """Loader, index, and the hash of the sample, of each that a rank has read and of which both are known."""
    for event in e.of(rank, "batch"):
        if len(event["indices"]) == len(event["rows"]):
            for index, row in zip(event["indices"], event["rows"], strict=True):
                yield event["loader"], index, row


def other_samples(e: Evidence):
    """Suspects that one index stands for another sample on each rank: where it is the same each time on a rank."""
    by_index = [defaultdict(lambda: defaultdict(set)) for _ in range(e.n)]
    for rank in range(e.n):
        for loader, index, row in known_rows(e, rank):
            by_index[rank][loader][index].add(row)
    for loader in set.intersection(*map(set, by_index)) if by_index else ():
        if own_subsets(e, loader):
            continue
        samples = [by_index[rank][loader] for rank in range(e.n)]
        common = set.intersection(*map(set, samples))
        fixed = [i for i in common if all(len(s[i]) == 1 for s in samples)]
        again = sum(len(rows) > 1 for s in samples for rows in s.values())
        different = [i for i in fixed if not are_alike(s[i] for s in samples)]
        if different and not again and len(different) > 0.9 * len(fixed) and is_read_again(e, loader):
            line = e.epochs[loader, 0][0]["made"] if (loader, 0) in e.epochs else None
            yield suspect(
                f"sample {min(different)} is another one on each rank", line, "make or shuffle the data with one seed"
            )
            return


def is_read_again(e: Evidence, loader: str) -> bool:
    """Whether rank 0 has read a sample twice: then it is known whether a sample is the same each time."""
    indices = [i for (rank, name, _), read in e.read.items() if rank == 0 and name == loader for i in read]
    return len(set(indices)) < len(indices)


@rule("each rank reads its own samples", 4, DEAL, ("metrics are of all samples",))
def own_samples(e: Evidence):
    """Proves that ranks read the same samples in an epoch of training, or that each reads all of them."""
    n_dealt = 0
    for key, events in e.epochs.items():
        event, samples, left_out = events[0], trained_by(e, key), are_left_out(e, key)
        if not learns(e, key[0], event) or own_subsets(e, key[0]):
            continue
        say = suspect if left_out else broken
        common = set.intersection(*map(set, samples))
        shares = [x["share"] or 0 for x in events]
        if event["stream"]:
            if common:
                yield say(
                    f"{len(common)} of {len(samples[0])} samples of a stream were read by {e.all_ranks}",
                    event["made"],
                    "deal the stream out by rank and by worker (get_worker_info)",
                )
                return
        elif all(samples) and are_alike(samples):
            yield say(
                f"{e.all_ranks} read the same {len(samples[0])} samples in the same order ({event['sampler']})",
                event["made"],
            )
            return
        elif not left_out and reads_all(event, shares) and have_same_rows(e, key[0]):
            yield broken(
                f"each of {e.n} ranks reads {shares[0]:,} of {event['samples']:,} samples an epoch "
                f"({event['sampler']})",
                event["made"],
            )
            return
        elif len(common) > len(samples[0]) / FEW and have_same_rows(e, key[0]):
            yield suspect(
                f"{len(common)} of {len(samples[0])} samples of an epoch were read by {e.all_ranks}", event["made"]
            )
            return
        n_dealt += all(map(bool, samples)) and not left_out
    if same := same_losses(e):
        yield suspect(f"{e.all_ranks} compute the same loss in each of {same} steps", e.of(0, "backward")[0])
    elif n_dealt:
        yield holds(f"in {n_dealt} epochs")


def reads_all(event: dict, shares: list[int]) -> bool:
    return bool(event["samples"]) and sum(shares) >= SHARE * event["samples"]


def have_same_rows(e: Evidence, loader: str) -> bool:
    """Whether an index stands for the same sample on all ranks, as far as that was seen."""
    rows = [{index: row for name, index, row in known_rows(e, rank) if name == loader} for rank in range(e.n)]
    common = set.intersection(*map(set, rows))
    return not common or any(are_alike(pairs[i] for pairs in rows) for i in common) or not fixed_rows(e, loader)


def fixed_rows(e: Evidence, loader: str) -> bool:
    """Whether a sample that rank 0 has read twice was the same both times: it was not augmented."""
    seen = defaultdict(set)
    for name, index, row in known_rows(e, 0):
        if name == loader:
            seen[index].add(row)
    return all(len(rows) == 1 for rows in seen.values()) and is_read_again(e, loader)


def same_losses(e: Evidence) -> int:
    """In how many backward passes, of more than two, all ranks had the same loss, and not always one number.

    None if their models were given other tensors.
    """
    inputs = [[event["tensor"] for event in e.of(rank, "input")] for rank in range(e.n)]
    if not are_alike(inputs):
        return 0
    losses = [[event["loss"] for event in e.of(rank, "backward")][:20] for rank in range(e.n)]
    alike = e.n > 1 and len(losses[0]) > 2 and are_alike(losses) and len(set(losses[0])) > 1
    return len(losses[0]) if alike and losses[0][0] != "None" else 0


@rule("each sample is read once an epoch", 9, "deal a stream out by rank and by worker (get_worker_info)")
def once(e: Evidence):
    """Proves that a rank reads a sample of a stream twice in an epoch."""
    n_looked = 0
    for key, events in e.epochs.items():
        if events[0]["stream"] and learns(e, key[0], events[0]):
            samples = e.read[(0, *key)]
            twice = len(samples) - len(set(samples))
            n_looked += bool(samples)
            if twice > len(samples) / FEW:
                yield broken(
                    f"rank 0 reads {twice} of {len(samples)} samples of a stream again, with "
                    f"{events[0]['workers']} workers",
                    events[0]["made"],
                )
                return
    if n_looked:
        yield holds(f"in {n_looked} epochs of a stream")


@rule("each epoch has another order", 4, "sampler.set_epoch(epoch) before each epoch")
def other_order(e: Evidence):
    """Proves that a sampler which shuffles gives the order of the epoch before."""
    n_compared, last = 0, {}
    for key, events in e.epochs.items():
        loader, event = key[0], events[0]
        if key not in e.trained or event["stream"]:
            continue
        order, before = e.read[(0, *key)], last.get(loader)
        last[loader] = order
        if not before or len(order) < 4 or (event["is_new"] and not goes_on(e, key)):
            continue
        n_compared += 1
        if before[: len(order)] == order[: len(before)]:
            epoch = key[1] + 1
            if event["shuffle"]:
                yield broken(
                    f"epoch {epoch} reads the same samples in the same order as epoch {epoch - 1}", event["made"]
                )
            else:
                yield note(
                    f"every epoch has the same order: {event['sampler']} does not shuffle",
                    event["made"],
                    "DistributedSampler(data) shuffles",
                )
            return
    if n_compared:
        yield holds(f"{n_compared + 1} epochs")


def goes_on(e: Evidence, key: tuple[str, int]) -> bool:
    """Whether an epoch's first step is one that follows on those of the epoch before: no other training begins."""
    step, before = e.first_step.get(key), e.first_step.get((key[0], key[1] - 1))
    if step is None or before is None:
        return step is before
    return step[0] == before[0] and step[1] > before[1]


@rule(
    "ranks have as many batches",
    5,
    "drop_last=True, or DistributedSampler, or join",
    (
        "ranks are at the same step",
        "the ranks make the same calls",
        "no rank waits for ever",
        "no rank is left alone",
        "metrics are of all samples",
    ),
)
def as_many(e: Evidence):
    """Proves that the ranks' training loaders have another number of batches, so that a rank waits at the end."""
    n_looked = 0
    for key, events in e.epochs.items():
        counts = [event["batches"] for event in events]
        if e.trains(key[0]) and None not in counts and not e.has_joined:
            n_looked += 1
            if not are_alike(counts):
                yield broken(f"{bars(counts)} batches an epoch", events[0]["made"])
                return
    if n_looked:
        yield holds(f"in {n_looked} epochs")


@rule("validation counts each sample once", 4, "range(rank, len(data), world_size) as the sampler", is_remark=True)
def pads(e: Evidence):
    """Notes that DistributedSampler pads, so that some samples of a validation count twice."""
    for (loader, _), events in e.epochs.items():
        event = events[0]
        if learns(e, loader, event) or not event["samples"] or not e.any("backward"):
            continue
        if event["sampler"] == "DistributedSampler" and len(events) * (event["share"] or 0) > event["samples"]:
            extra = len(events) * event["share"] - event["samples"]
            yield note(f"{extra} of {event['samples']} samples count twice: DistributedSampler pads", event["made"])
            return


@rule("metrics are of all samples", 4, "all_reduce the sums and the counts, then divide")
def of_all(e: Evidence):
    """Suspects that a metric is one rank's: each validates on its share, or one alone on the share of a sampler."""
    for (loader, _), events in e.epochs.items():
        event = events[0]
        if learns(e, loader, event) or not e.any("backward") or event["stream"]:
            continue
        samples = read_by(e, (loader, 0))
        is_share = all(samples) and not set.intersection(*map(set, samples))
        if is_share and not adds_up(e, loader):
            yield suspect("each rank validates on its share, and nothing adds the shares up", event["made"])
            return
        if is_share:
            yield holds()
            return
    alone = [e.aligned_alone(rank) for rank in range(e.n)]
    for rank, events in enumerate(alone):
        for event in events:
            if event["sampler"] == "DistributedSampler" and e.end == "ended" and not e.any("crash"):
                seen = f"rank {rank} alone reads this loader: {event['share']:,} of {event['samples']:,} samples"
                yield suspect(seen, event["made"], "no DistributedSampler where one rank reads alone")
                return


def adds_up(e: Evidence, loader: str) -> bool:
    """Whether rank 0 exchanges anything after it has begun to read from the loader."""
    events = e.ranks[0]
    first = next((i for i, x in enumerate(events) if x["kind"] == "batch" and x["loader"] == loader), len(events))
    later = [x for x in events[first:] if x["kind"] == "p2p" or (x["kind"] == "call" and x["name"].startswith(ADD_UP))]
    return bool(later)
