"""torchvision's data sets with made-up pixels: as many samples as the real ones have, the same on all ranks."""

import importlib
import sys

import numpy as np
from torch.utils.data import Dataset

from ddp_tutorial.check.watch.record import SETTINGS

SIZES = (60_000, 10_000)  # samples for training, for testing
SETS = {  # name -> shape of an image, how many samples, how many classes
    "MNIST": ((28, 28), SIZES, 10),
    "FashionMNIST": ((28, 28), SIZES, 10),
    "KMNIST": ((28, 28), SIZES, 10),
    "CIFAR10": ((32, 32, 3), (50_000, 10_000), 10),
    "CIFAR100": ((32, 32, 3), (50_000, 10_000), 100),
    "ImageFolder": ((256, 256, 3), (512, 512), 1000),
}


class MadeUp(Dataset):
    """Images of random pixels, made when they are read. `transform` and `target_transform` are applied."""

    def __init__(self, name: str, train: bool, transform=None, target_transform=None):
        self.name, self.train, self.transform, self.target_transform = name, train, transform, target_transform
        self.shape, sizes, n_classes = SETS[name]
        self.targets = np.random.RandomState(train).randint(0, n_classes, sizes[not train]).tolist()
        self.classes = [str(i) for i in range(n_classes)]
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        from PIL import Image  # torchvision needs it, too

        index = range(len(self))[index]
        pixels = np.random.RandomState(2 * index + self.train).randint(0, 256, self.shape, dtype=np.uint8)
        image, label = Image.fromarray(pixels), self.targets[index]
        image = self.transform(image) if self.transform else image
        return image, self.target_transform(label) if self.target_transform else label


def made_up(name: str):
    """What takes the place of the class `name`: takes its arguments."""
    if name == "ImageFolder":
        return lambda root, transform=None, target_transform=None, **kwargs: MadeUp(
            name, "train" in str(root), transform, target_transform
        )
    return lambda root=None, train=True, transform=None, target_transform=None, download=False: MadeUp(
        name, train, transform, target_transform
    )


def install() -> None:
    """torchvision.datasets has just been imported."""
    if SETTINGS["data"] == "made-up":
        module = importlib.import_module("torchvision.datasets")
        for name in SETS:
            original = getattr(module, name)
            for place in (module, sys.modules[original.__module__]):
                setattr(place, name, made_up(name))
