"""``python -m ddp_tutorial``: sample data, the script, four ranks, a picture of the losses."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from ddp_tutorial import cli, history, plotting
from ddp_tutorial.script import write_script


def run(what: str, *command: str) -> None:
    """Run a Python module with arguments; its output goes to the terminal. Raises `UserError` if it fails."""
    print(f"\n{what}\n$ python -m {' '.join(command)}", flush=True)
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    if subprocess.run([sys.executable, "-m", *command], env=environment).returncode:
        raise cli.UserError("the command above failed: its own message says why")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_tutorial",
        description="Make sample data, write ddp_sample.py, train it on several ranks and draw the losses.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for all of it")
    parser.add_argument("--ranks", type=cli.positive_int, default=4, help="processes to train with")
    parser.add_argument("--epochs", type=cli.positive_int, default=100, help="passes over the training set")
    args = parser.parse_args()
    data, script, results = args.out / "data", args.out / "ddp_sample.py", args.out / "results"
    try:
        run("1. Sample data: Gaussian classes", "data_gen", "gaussian", "--out", str(data), "--reuse")
        write_script(script, force=True)
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}", "--nnodes=1"]
        flags = ["--data-dir", str(data), "--out", str(results), "--epochs", str(args.epochs)]
        run("2. Train on several ranks (torchrun, by its module's name)", *launch, str(script), *flags)
    except (cli.UserError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    floor = json.loads((data / "meta.json").read_text())["bayes"]["cross_entropy_nats"]
    epochs = history.read(results)
    plotting.use_style()
    curves = {"training": [e["train_loss"] for e in epochs], "validation": [e["val_loss"] for e in epochs]}
    title = f"The loss on {args.ranks} ranks comes down to the best possible"
    figure = plotting.loss_curves(curves, title, floor, ylabel="loss (nats)")
    figure.savefig(results / "losses.png", dpi=150)
    jupyter = "jupyter" if "VIRTUAL_ENV" in os.environ else Path(sys.executable).with_name("jupyter")
    print(f"""
3. Look
validation loss {epochs[-1]["val_loss"]:.4f}, of which no classifier can avoid {floor:.4f}
  {str(results / "losses.png"):<38} the losses, drawn
  {str(results / "history.jsonl"):<38} the losses, one line per epoch
  {str(results / "checkpoint.pt"):<38} the trained model
  {script!s:<38} the script: run it on your own .npy files with --data-dir
Next, open the notebooks:
$ {jupyter} lab notebooks""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
