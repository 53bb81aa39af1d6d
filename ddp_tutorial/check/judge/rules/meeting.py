"""The ranks start, meet, and part."""

from collections.abc import Iterator

from ddp_tutorial.check.judge.evidence import Evidence, bars
from ddp_tutorial.check.judge.registry import Finding, broken, holds, note, rule

EXPLAINED = {  # in the message of an error -> what it means, and what to do
    "Received data size doesn't match": ("the ranks make different calls", "let all ranks make the same calls"),
    "closed by peer": ("another rank has left", "look for what that rank did"),
    "reset by peer": ("another rank has left", "look for what that rank did"),
    "Timed out waiting": ("another rank has not come", "look for where that rank was"),
    "mark a variable ready only once": (
        "a weight got its gradient twice in one pass",
        "with activation checkpointing: use_reentrant=False",
    ),
}
CONSEQUENCES = (
    "closed by peer",
    "reset by peer",
    "Timed out waiting",
    "Broken pipe",
    "Received data size doesn't match",
)
NO_GROUP = "Default process group has not been initialized"


def explained(error: str) -> tuple[str, str]:
    return next((words for key, words in EXPLAINED.items() if key in error), ("", ""))


def crashes(e: Evidence, of_others: bool) -> Iterator[Finding]:
    """The exceptions that came to the top of ranks, each once: those that come `of_others`, or the ranks' own."""
    events = [(rank, event) for rank in range(e.n) for event in e.of(rank, "crash")]
    if not events:  # of a process that starts ranks
        events = [(None, event) for log in e.logs.values() for event in log if event["kind"] == "crash"]
    said = set()
    for rank, event in events:
        line = next((x for x in event["error"].splitlines() if x.strip()), "")[:300]
        if any(word in event["error"] for word in CONSEQUENCES) != of_others or line in said:
            continue
        said.add(line)
        meaning, fix = explained(event["error"])
        who = "" if rank is None else f"rank {rank}: "
        yield broken(f"{who}{line}" + (f" ({meaning})" if meaning else ""), event, fix)


@rule(
    "a process group is started",
    4,
    'dist.init_process_group("gloo"), or "nccl" on GPUs, before the model is wrapped',
    (
        "the script runs",
        "a model is wrapped",
        "gradients are equal",
        "weights stay equal",
        "metrics are of all samples",
    ),
)
def meets(e: Evidence):
    """Proves that ranks which have trained never met: each has a model of its own."""
    without = [event for event in e.any("crash") if NO_GROUP in event["error"]]
    if e.has_met:
        yield holds(f"{e.n} ranks")
    elif without:
        yield broken(NO_GROUP, without[0])
    elif not any(e.of(rank, "met") for rank in range(e.n)) and sum(bool(e.of(r, "step")) for r in range(e.n)) > 1:
        yield broken(
            f"init_process_group was never called: each of {e.n} processes trains a model of its own",
            e.any("step")[0],
        )


@rule(
    "the script runs",
    9,
    "mend what the message says",
    is_remark=True,
    explains=("the ranks make the same calls", "no rank waits for ever", "no rank is left alone"),
)
def runs(e: Evidence):
    """Proves by an exception that came to the top of a rank that the script fails."""
    if not any(NO_GROUP in event["error"] for event in e.any("crash")):
        yield from crashes(e, of_others=False)


@rule(
    "all ranks take part",
    4,
    "start as many processes as world_size says, and let each call init_process_group",
    (
        "each rank reads its own samples",
        "ranks drop other units",
        "ranks augment differently",
        "gradients are equal",
        "weights stay equal",
        "one rank writes each file",
        "the loss is a mean, once",
        "the script runs",
        "gradients are clipped after the exchange",
    ),
)
def take_part(e: Evidence):
    """Proves that the group is smaller than the launch, or that some rank never came to the meeting."""
    sizes = {event["world"] for event in e.any("met")}
    if sizes and not e.plan.spawns and sizes != {e.world}:
        yield broken(f"{e.world} processes were started; the group has {bars(sizes)}", e.any("met")[0])
    elif e.has_met:
        yield holds()


@rule("each rank has its own GPU", 4, "torch.cuda.set_device(local_rank), and no 'cuda' without a number before it")
def own_gpu(e: Evidence):
    """Proves that two ranks of one machine use the same GPU."""
    used = [{event["gpu"]: event for event in reversed(e.of(rank, "gpu"))} for rank in range(e.n)]
    shared = set.intersection(*map(set, used)) if e.n > 1 else set()
    if shared:
        gpu = min(shared)
        yield broken(f"{e.all_ranks} use cuda:{gpu}", used[-1][gpu])
    elif e.n > 1 and all(used):
        yield holds()


@rule("the group is left", 4, "dist.destroy_process_group() at the end")
def leaves(e: Evidence):
    """A group that is open when the process ends: some releases of gloo and NCCL warn, wait, or abort then."""
    ends = e.any("exit")
    if not e.any("met") or e.any("crash") or e.end != "ended" or not ends:
        return
    if any(event["group_is_open"] for event in ends):
        yield note("the process group is still open when the script ends")
    else:
        yield holds()


@rule("only DDP is checked", 10, is_remark=True)
def sharded(e: Evidence):
    """Says so where the weights are sharded: no rank has a whole one, and there is nothing to compare."""
    parts = [x for x in e.any("step") if "a part" in x.get("weights", {}).values()]
    if parts:
        yield note("the weights are sharded (FSDP2): only samples, calls and files were compared", parts[0])
    elif not e.groups_are_whole:
        part = next(x for x in e.any("wrap") if not x["whole"])
        yield note("a model is wrapped for some of the ranks: only samples, calls and files were compared", part)


@rule("the doctor itself", 9, is_remark=True)
def watcher(e: Evidence):
    """Says which of its own hooks have failed: what they would have seen is not known."""
    errors = sorted({event["error"] for log in e.logs.values() for event in log if event["kind"] == "watcher"})
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        yield note(f"a part of it failed, and has seen nothing: {errors[0][:300]}{more}")
