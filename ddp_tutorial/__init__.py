"""What the tutorial's notebooks and `ddp_sample.py` need besides distributed training.

No process group, no collective and no DDP wrap is in this package: every distributed line stands
in the script, where the reader sees it.
"""
