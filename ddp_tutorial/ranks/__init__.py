"""What ranks do together to survive: meet, agree on mistakes, stop, go on. Chapter 7 shows each part with its source.

Of the package, only this folder uses `torch.distributed`; `__init__.py` of the package just imports a part of it early.
"""

from ddp_tutorial.ranks.environment import check_environment, check_flags, check_shares, parse
from ddp_tutorial.ranks.exchange import prepare_exchange
from ddp_tutorial.ranks.failure import fail_together, report_errors
from ddp_tutorial.ranks.meeting import rendezvous
from ddp_tutorial.ranks.run import ResumableSampler, Run, agree_on_settings

__all__ = [
    "ResumableSampler",
    "Run",
    "agree_on_settings",
    "check_environment",
    "check_flags",
    "check_shares",
    "fail_together",
    "parse",
    "prepare_exchange",
    "rendezvous",
    "report_errors",
]
