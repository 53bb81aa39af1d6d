"""Check any DDP script: launch it, unchanged, on a few ranks, and say which rules of data-parallel training hold.

`python -m ddp_tutorial.check --help` says more.
"""

import json
import os
import signal
import sys
from contextlib import suppress

from ddp_tutorial.check import report
from ddp_tutorial.check.examine import CannotCheck, examine
from ddp_tutorial.check.options import parser, plan_of
from ddp_tutorial.console import UserError


def main(argv: list[str] | None = None) -> int:
    as_json = False
    try:
        args = parser().parse_args(argv)
        as_json = args.json
        examination = examine(plan_of(args), args.gpu)
    except UserError as mistake:
        if as_json:
            print(json.dumps({"error": str(mistake)}))
        print(f"check: {mistake}", file=sys.stderr)
        if isinstance(mistake, CannotCheck) and mistake.trial and not as_json:
            print("\n".join(report.last_words(mistake.trial)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(report.as_json(examination) if as_json else report.as_text(examination, sys.stdout.isatty()))
    return int(examination.verdict.is_broken)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the ranks are ended
    code = 0
    with suppress(BrokenPipeError):  # of `| head`
        code = main()
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)
