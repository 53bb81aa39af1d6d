"""Rehearse four GPUs on one: torchrun --standalone --nproc-per-node=4 --nnodes=1 tests/one_gpu.py SCRIPT FLAGS...

The script runs unchanged; each rank believes that it has a GPU of its own. NCCL refuses two ranks of one host on one
GPU, so each rank names another host, and they talk through sockets. It is slow: a rehearsal, no benchmark.
"""

import os
import runpy
import sys

import torch

os.environ |= {"NCCL_HOSTID": f"rank {os.environ['RANK']}", "NCCL_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}
torch.cuda.init()  # asks for the true number of GPUs, and keeps it
torch.cuda.device_count = lambda: int(os.environ["LOCAL_WORLD_SIZE"])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
