"""The programs that are compared: the scripts of the notebooks, and their peers in `benchmarks/peers/`."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.peers import DatasetKind

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@dataclass(frozen=True)
class Program:
    """A program that trains the model, takes the flags of `launch.TrainingFlags` and leaves `history.jsonl`."""

    name: str  # in tables and figures
    command: tuple[str, ...]  # a path, or "-m" and a module, and the flags that only this program needs
    dataset: DatasetKind | None = None  # None: no Dataset, or that of the scripts
    framework: str | None = None  # the package of others that it is written for
    obeys_device: bool = False  # it trains where --device says; others train on the CPU or choose for themselves

    @property
    def is_peer(self) -> bool:
        """It is started as a module, and may fail without ending the benchmark."""
        return self.command[0] == "-m"

    @property
    def is_installed(self) -> bool:
        return self.framework is None or find_spec(self.framework) is not None


def script(name: str) -> Program:
    """A script of the notebooks."""
    return Program(name, (str(NOTEBOOKS / name),))


def peer(name: str, module: str, dataset: DatasetKind, framework: str | None = None) -> Program:
    """A peer that reads the data as `dataset` does. Those of a framework train on any device."""
    command = ("-m", f"benchmarks.peers.{module}", "--dataset", str(dataset))
    return Program(name, command, dataset, framework, obeys_device=framework is not None)


OURS = script("ddp_sample.py")  # what all others are compared with
RESILIENT = script("ddp_resilient.py")
LIMIT = Program("bare loop in memory (the limit)", ("-m", "benchmarks.peers.limit"), obeys_device=True)
PER_SAMPLE = peer("hand-written, per sample", "hand_written", DatasetKind.PER_SAMPLE)
TENSOR_DATASET = peer("hand-written, TensorDataset", "hand_written", DatasetKind.TENSOR)
OTHERS = (
    RESILIENT,
    LIMIT,
    PER_SAMPLE,
    TENSOR_DATASET,
    peer("hand-written, our Dataset", "hand_written", DatasetKind.GATHER),
    peer("Accelerate, per sample", "with_accelerate", DatasetKind.PER_SAMPLE, "accelerate"),
    peer("Accelerate, our Dataset", "with_accelerate", DatasetKind.GATHER, "accelerate"),
    peer("Fabric, per sample", "with_fabric", DatasetKind.PER_SAMPLE, "lightning"),
    peer("Fabric, our Dataset", "with_fabric", DatasetKind.GATHER, "lightning"),
    peer("Lightning, per sample", "with_lightning", DatasetKind.PER_SAMPLE, "lightning"),
    peer("Lightning, our Dataset", "with_lightning", DatasetKind.GATHER, "lightning"),
)
