"""python -m tests.mutants: what the tests would miss. Each mutant is a change of one line; it lives if its tests pass.

A change is made in a copy of the repository, alone, and the tests that guard the place run there, after they have
passed in the copy as it was. Prints each mutant's end; leaves with 1 if one lived, or could not be tried.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*cache", ".ipynb_checkpoints", "runs", "_build")
HANG = 1200  # seconds: ten times what the slowest mutant's tests take
ALL_PASSED, SOME_FAILED = 0, 1  # pytest's exit codes


class Mutant(NamedTuple):
    """`old`, which `file` has once, becomes `new`; `tests` are pytest's names, divided by blanks."""

    file: str
    old: str
    new: str
    tests: str
    why: str


class MutantError(Exception):
    """A mutant cannot be tried. The message names it."""


DATA, NPY, MODEL, TRAINING = (f"ddp_tutorial/{name}.py" for name in ("data", "npy", "model", "training"))
HISTORY, PROCESS, FILES, CONSOLE = (f"ddp_tutorial/{name}.py" for name in ("history", "process", "files", "console"))
CHECKPOINT, ENVIRONMENT, EXCHANGE, FAILURE, INVARIANTS, MEETING, RUN = (
    f"ddp_tutorial/ranks/{name}.py"
    for name in ("checkpoint", "environment", "exchange", "failure", "invariants", "meeting", "run")
)
SINGLE, DDP, RESILIENT = (f"notebooks/{name}.py" for name in ("single_sample", "ddp_sample", "ddp_resilient"))
TEST_EQUAL, TEST_TRAINING, TEST_DATA = (
    f"tests/test_{name}.py::test_" for name in ("ddp_equals_one_process", "model_and_training", "data")
)
TEST_BAD_INPUT, TEST_KEPT, TEST_FAILURES = (
    f"tests/test_{name}.py::test_" for name in ("bad_input", "checkpoint_and_history", "failures")
)
TEST_EXCHANGE, TEST_INVARIANTS, TEST_MACHINES, TEST_SHUTDOWN, TEST_DATA_GEN = (
    f"tests/test_{name}.py::test_" for name in ("exchange", "invariants", "several_machines", "shutdown", "data_gen")
)

MUTANTS: dict[str, Mutant] = {
    # The data
    "data-fill-the-gpu": Mutant(
        DATA,
        "n_bytes <= n_free / 2",
        "n_bytes <= n_free",
        TEST_DATA + "the_gpu_holds_the_data_if_half_of_its_free_memory_is_enough",
        "the data may take all of the GPU's memory, and leave none to train in",
    ),
    "data-keep-the-rest": Mutant(
        DATA,
        "order.split(self.loader.batch_size)[: len(self)]",
        "order.split(self.loader.batch_size)",
        TEST_DATA + "batches_gathered_on_the_device_are_the_loaders",
        "on the GPU the last, smaller batch is trained on, although it is to be dropped",
    ),
    "data-pickles": Mutant(
        NPY,
        'mmap_mode="r", allow_pickle=False',
        'mmap_mode="r", allow_pickle=True',
        TEST_DATA + "code_in_a_file_does_not_run",
        "a file of data runs code",
    ),
    "data-mean-of-the-rest": Mutant(
        NPY,
        "return mean + origin,",
        "return mean,",
        TEST_DATA + "mean_and_std_are_those_of_float64",
        "the mean is counted from the first row",
    ),
    "data-far-out": Mutant(
        DATA,
        "if times > FAR_OUT:",
        "if times < FAR_OUT:",
        TEST_DATA + "a_row_far_out_is_warned_of " + TEST_DATA + "of_other_features_nothing_is_said",
        "good data are warned of, and spoilt ones are not",
    ),
    "data-frequencies": Mutant(
        DATA,
        "frequencies = train_set.class_counts[: val_set.n_classes] / len(train_set)",
        "frequencies = val_set.class_counts / len(val_set)",
        TEST_DATA + "guessing_loss_is_that_of_the_class_frequencies",
        "guessing is given the frequencies of the validation set, which no run has",
    ),
    # The model and the loop
    "model-softmax": Mutant(
        SINGLE,
        "self.linear(x).log_softmax(dim=1)",
        "self.linear(x).softmax(dim=1)",
        TEST_TRAINING + "the_model_is_a_linear_layer_and_a_softmax",
        "the script's model gives probabilities to a loss that wants their logarithms",
    ),
    "model-scale": Mutant(
        MODEL,
        "(spread * len(std) ** 0.5)",
        "(spread)",
        TEST_TRAINING + "standardize_bounds_the_curvature",
        "the more features, the steeper the loss",
    ),
    "training-keep-gradients": Mutant(
        TRAINING,
        "        optimizer.zero_grad()\n",
        "",
        TEST_TRAINING + "train_one_epoch_takes_the_steps_of_sgd",
        "gradients add up from step to step",
    ),
    "training-means": Mutant(
        TRAINING,
        "torch.stack(losses) * sizes, sizes",
        "torch.stack(losses), sizes",
        TEST_TRAINING + "train_one_epoch_counts_each_sample_once",
        "the sums over ranks are sums of means",
    ),
    "training-eval-mode": Mutant(
        TRAINING,
        "    model.eval()\n",
        "",
        TEST_TRAINING + "evaluate_counts_each_sample_once",
        "dropout is on while the model is validated",
    ),
    # The record
    "history-seconds-add-up": Mutant(
        HISTORY,
        "        self.start = now\n",
        "",
        TEST_KEPT + "the_seconds_are_those_of_each_epoch",
        "the seconds count from the start of the run",
    ),
    "history-one-finite": Mutant(
        HISTORY,
        "all(values.isfinite().all() for values in sums)",
        "all(values.isfinite().any() for values in sums)",
        TEST_KEPT + "losses_that_are_not_finite",
        "a loss that is not finite goes unseen beside one that is",
    ),
    "history-chance": Mutant(
        HISTORY,
        "HARDLY = 0.98",
        "HARDLY = 2.0",
        TEST_KEPT + "a_run_that_ends_no_better_than_guessing_is_told_so",
        "a run that has learnt nothing ends in silence",
    ),
    "history-no-fsync": Mutant(
        HISTORY,
        "            os.fsync(file.fileno())\n",
        "",
        TEST_FAILURES + "a_kill_at_an_operation_on_a_file",
        "an epoch counts before the disk has its line",
    ),
    "files-no-fsync": Mutant(
        FILES,
        "            os.fsync(file.fileno())\n",
        "",
        TEST_FAILURES + "a_kill_at_an_operation_on_a_file",
        "a file has its name before the disk has its bytes",
    ),
    "files-shared-lock": Mutant(
        FILES,
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        TEST_MACHINES + "a_second_job_in_the_folder_is_refused",
        "two runs write to one folder",
    ),
    "process-whole-batch": Mutant(
        PROCESS,
        "return batch_size // world_size",
        "return batch_size",
        TEST_DATA + "a_batch_is_shared_equally",
        "every rank takes the whole batch: more ranks, another training",
    ),
    "console-exit-code": Mutant(
        CONSOLE,
        'kind, code = "error", 2',
        'kind, code = "error", 1',
        TEST_BAD_INPUT + "bad_flags_end_every_rank",
        "a user's mistake ends with the code of a failure",
    ),
    "process-all-speak": Mutant(
        PROCESS,
        'os.environ.get("RANK", "0").lstrip("0") == ""',
        'os.environ.get("RANK", "0").isdecimal()',
        TEST_BAD_INPUT + "help_is_printed_once",
        "every rank says everything",
    ),
    # The script with DDP
    "ddp-writer": Mutant(
        DDP,
        "        if rank == 0:  # DDP: one rank writes\n            line",
        "        if local_rank == 0:  # DDP: one rank writes\n            line",
        TEST_EQUAL + "ranks_of_two_machines_train_as_one_process",
        "one rank of each machine writes the history",
    ),
    "ddp-locker": Mutant(
        DDP,
        "writes=rank == 0",
        "writes=local_rank == 0",
        TEST_EQUAL + "ranks_of_two_machines_train_as_one_process",
        "one rank of each machine locks the folder, and the second is refused",
    ),
    "ddp-saver": Mutant(
        DDP,
        "    if rank == 0:  # DDP: one rank writes\n        save_model",
        "    if local_rank == 0:  # DDP: one rank writes\n        save_model",
        TEST_EQUAL + "ranks_of_two_machines_train_as_one_process",
        "one rank of each machine saves the model",
    ),
    "ddp-validation-shard": Mutant(
        DDP,
        "mine = range(rank, len(val_set), world_size)",
        "mine = range(local_rank, len(val_set), world_size)",
        TEST_EQUAL + "ranks_of_two_machines_train_as_one_process",
        "each machine validates on the same shards",
    ),
    "ddp-world-size": Mutant(
        DDP,
        "history.append(epoch, sums, val_sums, world_size)",
        "history.append(epoch, sums, val_sums, local_world_size)",
        TEST_EQUAL + "ranks_of_two_machines_train_as_one_process",
        "the history has the ranks of one machine for those of all",
    ),
    "ddp-padding": Mutant(
        DDP,
        "seed=args.seed, drop_last=True)  # DDP: my samples",
        "seed=args.seed, drop_last=False)  # DDP: my samples",
        TEST_EQUAL + "ranks_train_as_one_process",
        "the sampler repeats samples, and there is a step more",
    ),
    "ddp-padded-validation": Mutant(
        DDP,
        "mine = range(rank, len(val_set), world_size)",
        "mine = DistributedSampler(val_set, world_size, rank, shuffle=False)",
        TEST_EQUAL + "validation_is_exact",
        "the sampler repeats samples of the validation set",
    ),
    "ddp-one-order": Mutant(
        DDP,
        "sampler.set_epoch(epoch)",
        "sampler.set_epoch(0)",
        TEST_EQUAL + "the_samples_are_dealt_out",
        "every epoch has the same order",
    ),
    "ddp-no-wrap": Mutant(
        DDP,
        "DistributedDataParallel(model) if distributed else model",
        "model",
        TEST_EQUAL + "ranks_train_as_one_process",
        "each rank trains a model of its own",
    ),
    "ddp-local-sums": Mutant(
        DDP,
        "            dist.all_reduce(val_sums)",
        "            val_sums.clone()",
        TEST_EQUAL + "ranks_train_as_one_process",
        "the validation loss is that of the first rank's samples",
    ),
    "ddp-only-training-finite": Mutant(
        DDP,
        "check_finite(epoch, sums, val_sums)",
        "check_finite(epoch, sums)",
        TEST_TRAINING + "a_validation_that_diverges_in_the_only_epoch",
        "a run whose last validation is not finite ends well",
    ),
    "ddp-wrapped-model-saved": Mutant(
        DDP,
        "nn.Sequential(scale, model))  # DDP: the plain model",
        "nn.Sequential(scale, ddp_model))  # DDP: the plain model",
        TEST_EQUAL + "ranks_train_as_one_process",
        "the saved weights have names that the plain model has not",
    ),
    "ddp-group-left": Mutant(
        DDP,
        "        dist.destroy_process_group()",
        "        pass",
        TEST_SHUTDOWN + "no_gloo_thread_is_left",
        "gloo's threads outlive the training, and abort a rank now and then",
    ),
    # What survives
    "resilient-mistakes-alone": Mutant(
        FAILURE,
        "if dist.is_initialized() and exchange",
        "if False and exchange",
        TEST_BAD_INPUT + "one_rank_alone_meets_the_mistake",
        "the other ranks wait for one that has met a mistake",
    ),
    "resilient-from-the-start": Mutant(
        RUN,
        "super().__iter__(), self.n_done, None)",
        "super().__iter__(), 0, None)",
        TEST_FAILURES + "one_process_is_asked_to_stop",
        "a run that goes on in an epoch trains on samples that it has had",
    ),
    "resilient-random-numbers": Mutant(
        CHECKPOINT,
        '        torch.set_rng_state(state["rng"])\n',
        "",
        TEST_KEPT + "round_trip",
        "a run that goes on draws other random numbers",
    ),
    "resilient-no-checksum": Mutant(
        CHECKPOINT,
        "if CHECKSUM(content[:-CHECKSUM_SIZE]).digest() != content[-CHECKSUM_SIZE:]:",
        "if False:",
        TEST_KEPT + "an_edited_byte_is_noticed",
        "a checkpoint with an edited byte is gone on from",
    ),
    "resilient-pickles": Mutant(
        CHECKPOINT,
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        TEST_KEPT + "code_in_a_checkpoint_does_not_run",
        "a checkpoint runs code",
    ),
    "resilient-no-previous": Mutant(
        CHECKPOINT,
        ", keep=previous(path))",
        ")",
        TEST_KEPT + "the_previous_one_is_kept",
        "no checkpoint is left if the newest is damaged",
    ),
    "resilient-earlier-run": Mutant(
        CHECKPOINT,
        "return found if resume or of_this_launch else None",
        "return found",
        TEST_KEPT + "a_run_starts_afresh_unless_told_to_resume",
        "a new run goes on from an old one unasked",
    ),
    "resilient-unsettled-order": Mutant(
        EXCHANGE,
        "        model(x).sum().backward()\n",
        "",
        TEST_EXCHANGE + "a_prepared_model_adds_in_one_order_from_its_first_step",
        "the first step of a run that goes on adds in another order",
    ),
    "resilient-sum-of-gradients": Mutant(
        EXCHANGE,
        "lambda rows: rows.mean(dim=0)",
        "lambda rows: rows.sum(dim=0)",
        TEST_EXCHANGE + "the_mean_is_that_of_an_all_reduce",
        "more ranks, larger steps",
    ),
    "resilient-dead-ranks-counted": Mutant(
        MEETING,
        "return self.store.check([self._confirmed(group, rank, start)])",
        "return True",
        TEST_MACHINES + "a_rank_that_died_while_it_met_the_others_is_not_counted_on",
        "ranks meet in the group of a dead one",
    ),
    "resilient-other-data": Mutant(
        RUN,
        "if found[key] != expected[key]:",
        "if False:",
        TEST_BAD_INPUT + "ranks_with_other_data_end_together",
        "nodes whose folders differ train together",
    ),
    "resilient-alone": Mutant(
        ENVIRONMENT,
        "if args.nnodes and n_nodes < args.nnodes[0]:",
        "if False:",
        TEST_BAD_INPUT + "fewer_nodes_than_torchrun_was_promised",
        "a node whose torchrun has missed the others trains alone",
    ),
    "resilient-any-error-is-of-the-meeting": Mutant(
        MEETING,
        "or bool(no_connection)",
        "or True",
        TEST_MACHINES + "only_what_belongs_to_the_meeting_is_called_so",
        "whatever is wrong, the line says that the ranks have not met",
    ),
    "resilient-old-rate": Mutant(
        CHECKPOINT,
        "rates if keep_lr else ()",
        "()",
        TEST_KEPT + "another_learning_rate_on_purpose",
        "the learning rate of the checkpoint comes back, although another was meant",
    ),
    "resilient-all-ranks-for-a-group": Mutant(
        EXCHANGE,
        "lambda rows: rows.mean(dim=0), gradients, group)",
        "lambda rows: rows.mean(dim=0), gradients)",
        TEST_EXCHANGE + "the_mean_of_a_group_is_that_of_its_ranks",
        "the ranks of a group wait for others",
    ),
    "invariants-any-times": Mutant(
        INVARIANTS,
        "if (counts != 1).any():",
        "if (counts == 0).any():",
        TEST_INVARIANTS + "what_does_not_hold_is_raised_on_all_ranks",
        "a sample that was read twice is not noticed",
    ),
    # The generators
    "data-gen-one-seed": Mutant(
        "data_gen/gaussian.py",
        '("val", n_val, val_seed)',
        '("val", n_val, train_seed)',
        TEST_DATA_GEN + "training_and_validation_differ",
        "the validation set repeats the training set",
    ),
    "data-gen-correlation": Mutant(
        "data_gen/gaussian.py",
        "x *= np.sqrt(1 - rho)",
        "x *= 1 - rho",
        TEST_DATA_GEN + "samples_have_the_stated_distribution",
        "the classes are narrower than the floor says",
    ),
}


def mutated(name: str, mutant: Mutant, root: Path = ROOT) -> str:
    """The text of the mutant's file with its change. Raises `MutantError` unless the old text is there once."""
    text = (root / mutant.file).read_text()
    if (n := text.count(mutant.old)) != 1:
        raise MutantError(f"{name}: {mutant.file} has {mutant.old!r} {n} times: write the line as it is today")
    return text.replace(mutant.old, mutant.new)


def code_of(tests: set[str], copy: Path) -> int:
    """pytest's exit code for some tests of a copy of the repository; that of failed ones if they do not end."""
    env = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}  # a mutant may keep size and second
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *sorted(tests)]
    with open(copy / "pytest.log", "w") as log:
        try:
            return subprocess.run(command, cwd=copy, env=env, stdout=log, stderr=log, timeout=HANG).returncode
        except subprocess.TimeoutExpired:
            return SOME_FAILED


def last_words(copy: Path) -> str:
    return "\n".join((copy / "pytest.log").read_text().splitlines()[-15:])


def lives(name: str, mutant: Mutant, copy: Path) -> bool:
    """Whether the tests pass in spite of the mutant. Raises `MutantError`."""
    path = copy / mutant.file
    before = path.read_text()
    path.write_text(mutated(name, mutant, copy))
    try:
        code = code_of({*mutant.tests.split()}, copy)
    finally:
        path.write_text(before)
    if code not in (ALL_PASSED, SOME_FAILED):
        raise MutantError(f"{name}: its tests did not run:\n{last_words(copy)}")
    return code == ALL_PASSED


def hunt(mutants: dict[str, Mutant]) -> list[str]:
    """Try them, say how each ended, and return the names of those that lived. Raises `MutantError`."""
    for name, mutant in mutants.items():
        mutated(name, mutant)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
        tests = {test for mutant in mutants.values() for test in mutant.tests.split()}
        print(f"{len(mutants)} mutants, guarded by {len(tests)} tests, which pass without them:", end=" ", flush=True)
        start = time.monotonic()
        if code_of(tests, copy) != ALL_PASSED:
            raise MutantError(f"they do not:\n{last_words(copy)}")
        print(f"yes, after {time.monotonic() - start:.0f} s", flush=True)
        lived = []
        for i, (name, mutant) in enumerate(mutants.items(), 1):
            start = time.monotonic()
            if lives(name, mutant, copy):
                lived.append(name)
            verdict = "LIVED" if name in lived else "died"
            seconds = time.monotonic() - start
            print(f"[{i}/{len(mutants)}] {verdict:5} after {seconds:3.0f} s  {name}: {mutant.why}", flush=True)
    return lived


def main(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants alone")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print them and try none")
    args = parser.parse_args(words)
    if unknown := {*(args.only or ())} - {*MUTANTS}:
        parser.error(f"--only: no mutant is called {', '.join(sorted(unknown))}: see --list")
    names = args.only or list(MUTANTS)
    if args.sample is not None:
        if not 0 < args.sample <= len(names):
            parser.error(f"--sample: {args.sample} is not a number from 1 to {len(names)}")
        names = random.Random(args.seed).sample(names, args.sample)
    mutants = {name: MUTANTS[name] for name in names}
    if args.list:
        for name, mutant in mutants.items():
            print(f"{name}: {mutant.file}: {mutant.why}")
        return 0
    try:
        lived = hunt(mutants)
    except MutantError as error:
        print(f"python -m tests.mutants: error: {error}", file=sys.stderr)
        return 1
    print(f"{len(lived)} of {len(mutants)} mutants lived" + "".join(f"\n    {name}" for name in lived))
    return 1 if lived else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
