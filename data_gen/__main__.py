"""Command line: ``python -m data_gen gaussian --out DIR`` and ``python -m data_gen digits --out DIR``."""

import argparse
import json
import math
import signal
import sys
from pathlib import Path

from data_gen import digits, gaussian
from data_gen.output import FILES, OutputError, one_at_a_time, open_output

FORMAT = 2  # of meta.json


def number(kind: type, low: float, high: float):
    """An argparse type: a `kind` from `low` to `high`, both included."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its message
    return parse


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one line, without the usage before it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}: see --help\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m data_gen",
        description="Make X_train.npy, y_train.npy, X_val.npy, y_val.npy and meta.json in one folder.",
    )
    count = number(int, 1, 10**12)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    common.add_argument(
        "--seed",
        type=number(int, 0, 2**63),
        default=0,
        help="the same seed gives the same bytes (%(default)s)",
    )
    existing = common.add_mutually_exclusive_group()
    existing.add_argument("--force", action="store_true", help="replace the five files if DIR holds some already")
    existing.add_argument(
        "--reuse",
        action="store_true",
        help="do nothing if DIR holds these very data; replace other data of this command",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="gaussian|digits")

    p = kinds.add_parser(
        "gaussian",
        parents=[common],
        help="Gaussian classes that share one covariance; the best possible loss is known",
    )
    p.add_argument("--n-train", type=count, default=4096, help="training samples (%(default)s)")
    p.add_argument("--n-val", type=count, default=8192, help="validation samples (%(default)s)")
    p.add_argument("--n-features", type=count, default=20, help="features of a sample (%(default)s)")
    p.add_argument("--n-classes", type=number(int, 2, 10**6), default=4, help="classes (%(default)s)")
    p.add_argument(
        "--separation",
        type=number(float, 0, 1e6),
        default=2.0,
        help="typical distance of a class mean from 0, in standard deviations of one feature (%(default)s)",
    )
    p.add_argument(
        "--correlation",
        type=number(float, 0, 0.999),
        default=0.3,
        help="correlation of any two features within a class (%(default)s)",
    )

    p = kinds.add_parser("digits", parents=[common], help="the 1,797 handwritten digits bundled with scikit-learn")
    p.add_argument(
        "--n-val",
        type=number(int, 10, 1787),
        default=360,
        help="validation samples; the rest is for training (%(default)s)",
    )
    return parser.parse_args(argv)


def parameters_of(out: Path) -> dict | None:
    """What the data in `out` were made with; None unless this command made them and all five files are there."""
    try:
        meta = json.loads((out / "meta.json").read_text())
        return meta["parameters"] if all((out / name).is_file() for name in FILES) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def make(args: argparse.Namespace) -> dict | None:
    """Make the data that `args` ask for, and return what is known of them; None if they are there already."""
    parameters = {k: v for k, v in vars(args).items() if k not in ("out", "force", "reuse")}
    generate = {"gaussian": gaussian.generate, "digits": digits.generate}[args.kind]
    with one_at_a_time(args.out):  # another process may be making them: then they are there when it has
        present = parameters_of(args.out)
        if args.reuse and present == parameters | {"format": FORMAT}:
            return None
        with open_output(args.out, replace=args.force or (args.reuse and present is not None)) as output:
            facts = generate(output, **{k: v for k, v in parameters.items() if k != "kind"})
            output.write_meta({"parameters": parameters | {"format": FORMAT}, **facts})
    return facts


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the unfinished files are removed
    try:
        facts = make(args)
    except (OutputError, MemoryError) as error:
        print(f"python -m data_gen: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"python -m data_gen: interrupted; nothing was written to {args.out}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    if facts is None:
        print(f"{args.out} holds these data already")
        return 0
    print(f"{args.out}: {facts['summary']}")
    if "bayes" in facts:
        train, val, equal_guesses = facts["bayes"]["train"], facts["bayes"]["val"], math.log(args.n_classes)
        print(
            f"the true probabilities have training loss {train['cross_entropy_nats']:.4f} nats, validation loss"
            f" {val['cross_entropy_nats']:.4f} (equal guesses: {equal_guesses:.4f}) and accuracy {val['accuracy']:.4f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
