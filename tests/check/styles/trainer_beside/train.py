"""Run as a module; its trainer is a package beside it, and divides the loss by the number of ranks."""

import argparse

import torch.distributed as dist

from .trainer import Trainer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, required=True)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    Trainer().fit(args.epochs)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
