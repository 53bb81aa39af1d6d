"""The trained model against scikit-learn and against the best possible loss. `pytest -s` shows the numbers."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from tests.ranks import train


def standardized(folder, model):
    """The splits as the model's own first layer gives them: {split: (X, y)}."""
    mean, scale = model["0.mean"].double().numpy(), model["0.scale"].double().numpy()
    return {
        split: ((np.load(folder / f"X_{split}.npy") - mean) / scale, np.load(folder / f"y_{split}.npy"))
        for split in ("train", "val")
    }


def loss_and_accuracy(X, y, weight, bias):
    """Mean negative log-likelihood (nats) and accuracy, in float64 and with nothing of torch."""
    scores = X @ weight.T + bias
    scores -= scores.max(1, keepdims=True)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return log_loss(y, p, labels=range(len(weight))), (p.argmax(1) == y).mean()


def ours(part, model):
    return loss_and_accuracy(*part, *(model[f"1.linear.{name}"].double().numpy() for name in ("weight", "bias")))


def theirs(part, fitted):
    return loss_and_accuracy(*part, fitted.coef_, fitted.intercept_)


def show(name, ours, theirs):
    print(f"{name}: ours {ours[0]:.5f} nats, {ours[1]:.4f}; scikit-learn {theirs[0]:.5f} nats, {theirs[1]:.4f}")


def test_gaussian_reaches_the_optimum_of_scikit_learn(script, gaussian, tmp_path):
    """The classes overlap, so the likelihood has one maximum, and full batches come to it without noise."""
    flags = ("--batch-size", 4096, "--epochs", 500)
    model = train(0, script, gaussian, tmp_path, *flags).model
    parts = standardized(gaussian, model)
    fitted = LogisticRegression(C=np.inf, tol=1e-9, max_iter=10_000).fit(*parts["train"])
    for split in ("train", "val"):
        show(f"gaussian {split}", ours(parts[split], model), theirs(parts[split], fitted))
    at_optimum = theirs(parts["train"], fitted)[0]
    assert at_optimum - 1e-6 <= ours(parts["train"], model)[0] <= at_optimum + 1e-3
    assert ours(parts["val"], model)[0] == pytest.approx(theirs(parts["val"], fitted)[0], abs=5e-3)


def test_gaussian_comes_near_the_bayes_floor_of_each_split(gaussian, gaussian_run):
    floors = json.loads((gaussian / "meta.json").read_text())["bayes"]
    n_classes, n_features = gaussian_run.model["1.linear.weight"].shape
    # p free parameters take a training loss p / 2n nats below the loss of the truth on the same n samples, in
    # expectation, and leave the loss on others as far above it (Wilks, Akaike); thrice that leaves room for chance
    # and for the noise of the steps.
    expected = (n_classes - 1) * (n_features + 1) / (2 * len(np.load(gaussian / "y_train.npy")))
    last = gaussian_run.history[-1]
    train_gap, val_gap = (last[f"{split}_loss"] - floors[split]["cross_entropy_nats"] for split in ("train", "val"))
    print(f"gaussian, loss less its floor: train {train_gap:.4f}, val {val_gap:.4f}; in theory -/+{expected:.4f}")
    assert -3 * expected < train_gap < 0 < val_gap < 3 * expected
    assert last["val_accuracy"] == pytest.approx(floors["val"]["accuracy"], abs=0.01)


def test_digits_against_scikit_learn(script, digits, tmp_path):
    """Here the training set is separable: the likelihood has no maximum, and both sides stop short of it.

    scikit-learn by its default penalty, this script by its 100 epochs: so compare what both are for, unseen
    digits. scikit-learn gets the features at the unit variance that its penalty is meant for.
    """
    run = train(0, script, digits, tmp_path, "--batch-size", 64)
    model = run.model
    parts = standardized(digits, model)
    unit = {split: (X * X.shape[1] ** 0.5, y) for split, (X, y) in parts.items()}
    fitted = LogisticRegression(max_iter=10_000).fit(*unit["train"])
    for split in ("train", "val"):
        show(f"digits {split}", ours(parts[split], model), theirs(unit[split], fitted))
    (our_loss, our_accuracy), (their_loss, their_accuracy) = ours(parts["val"], model), theirs(unit["val"], fitted)
    # 360 digits: one standard error of either loss is about 0.02, of either accuracy 0.01.
    assert our_loss < their_loss + 0.02
    assert our_accuracy > their_accuracy - 0.03
    last = run.history[-1]
    assert (last["val_loss"], last["val_accuracy"]) == pytest.approx((our_loss, our_accuracy), rel=1e-5)
