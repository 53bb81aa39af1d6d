"""What ranks do together to survive: meet, agree on mistakes, stop, go on. Chapter 7 shows each part with its source.

Of the package, only this folder uses `torch.distributed`; the package's own `__init__.py` just imports a part of it early.
"""

from ddp_tutorial.ranks.exchange import prepare_exchange
from ddp_tutorial.ranks.failure import fail_together, report_errors
from ddp_tutorial.ranks.launch import check_environment, check_flags, meeting, parse
from ddp_tutorial.ranks.run import ResumableSampler, Run, settings

__all__ = ["ResumableSampler", "Run", "check_environment", "check_flags", "fail_together", "meeting", "parse", "prepare_exchange", "report_errors", "settings"]  # fmt: skip
