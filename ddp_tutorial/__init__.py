"""What the tutorial's notebooks and scripts share.

The modules of this folder are the lesson: data, model, loop. Nothing distributed stands there; the scripts hold it,
where the reader sees it. `ranks` is what `ddp_resilient.py` needs besides, `launcher` starts ranks on this machine, and
`show` is what a page needs.
"""

# Before any process group starts: torch would import it later by itself, whose default arguments then hold the
# group for good, and gloo's threads outlive `destroy_process_group`, to abort a rank now and then.
import torch.distributed.nn.functional  # noqa: F401
