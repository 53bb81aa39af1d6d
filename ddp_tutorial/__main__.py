"""``python -m ddp_tutorial``: sample data, four ranks, a picture of the losses."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from ddp_tutorial import flags, history
from ddp_tutorial.console import UserError
from ddp_tutorial.show import figures, prepare_launches

SCRIPT = Path(__file__).resolve().parents[1] / "notebooks" / "ddp_sample.py"


def run(what: str, *command: str) -> None:
    """Run a Python module with arguments; its output goes to the terminal. Raises `UserError` if it fails."""
    print(f"\n{what}\n$ python -m {' '.join(command)}", flush=True)
    if subprocess.run([sys.executable, "-m", *command]).returncode:
        raise UserError("the command above failed: its own message says why")


def name(path: Path) -> str:
    """`path` as it is called from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_tutorial",
        description="Make sample data, train ddp_sample.py on several ranks and draw the losses.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for all of it")
    parser.add_argument("--ranks", type=flags.positive_int, default=4, help="processes to train with")
    parser.add_argument("--epochs", type=flags.positive_int, default=100, help="passes over the training set")
    args = parser.parse_args()
    data, results = args.out / "data", args.out / "results"
    prepare_launches()
    try:
        if not SCRIPT.exists():
            raise UserError(f"{SCRIPT} is missing: install the clone with 'pip install -e .'")
        run("1. Sample data: Gaussian classes", "data_gen", "gaussian", "--out", str(data), "--reuse")
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}", "--nnodes=1"]
        options = ["--data-dir", str(data), "--out", str(results), "--epochs", str(args.epochs)]
        run("2. Train on several ranks (torchrun, by its module's name)", *launch, name(SCRIPT), *options)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    bayes = json.loads((data / "meta.json").read_text())["bayes"]
    epochs = history.read(results)
    figures.use_style()
    curves = {"training": [e["train_loss"] for e in epochs], "validation": [e["val_loss"] for e in epochs]}
    floors = {split: bayes[key]["cross_entropy_nats"] for split, key in (("training", "train"), ("validation", "val"))}
    gap = max(abs(losses[-1] - floors[split]) for split, losses in curves.items())
    title = f"On {args.ranks} ranks each loss ends within {gap:.3f} nats of its floor"
    figures.loss_curves(curves, floors, title).savefig(results / "losses.png", dpi=150)
    jupyter = "jupyter" if "VIRTUAL_ENV" in os.environ else Path(sys.executable).with_name("jupyter")
    print(f"""
3. Look
validation loss {epochs[-1]["val_loss"]:.4f}; the true probabilities have {floors["validation"]:.4f}
  {str(results / "losses.png"):<38} the losses, drawn
  {str(results / "history.jsonl"):<38} the losses, one line per epoch
  {str(results / "model.pt"):<38} the trained model
  {name(SCRIPT):<38} the script: run it on your own .npy files with --data-dir
Next, open the notebooks:
$ {jupyter} lab notebooks""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
