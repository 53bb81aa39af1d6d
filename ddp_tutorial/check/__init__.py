"""The doctor: `python -m ddp_tutorial.check SCRIPT` launches any DDP script and says which rules of DDP it keeps.

`launch` starts the script's ranks, in a `scratch` copy of its folder. In each of their processes `inject` installs
`watch`, which writes down what the rank does, and `made_up`, which stands in for GPUs and downloads. Afterwards `judge`
compares what the ranks have written, and `report` says it. Nothing here makes a collective.
"""

import json
import os
from dataclasses import replace


def check(*words: str | os.PathLike | float) -> dict:
    """What `python -m ddp_tutorial.check --json *words` says, as a dictionary: for many scripts in a row.

    The ranks are copies of a process that has imported PyTorch, which saves seconds of each check. Raises `UserError`
    if the script cannot be checked.
    """
    # The ranks import this package, too, and need none of these.
    from ddp_tutorial.check import report
    from ddp_tutorial.check.examine import examine
    from ddp_tutorial.check.options import parser, plan_of

    args = parser().parse_args([str(word) for word in words])
    return json.loads(report.as_json(examine(replace(plan_of(args), fork=True), args.gpu)))
