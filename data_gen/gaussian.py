"""Gaussian classes with one shared covariance, whose best possible classifier is known.

Class c has the mean m_c; every class has the covariance S = (1 - rho) I + rho 11^T, all classes are
equally likely. By Bayes' rule the true posterior is exactly softmax(W x + b) with W_c = S^-1 m_c and
b_c = -m_c^T S^-1 m_c / 2 (linear discriminant analysis; Hastie, Tibshirani and Friedman, "The
Elements of Statistical Learning", section 4.3). So one linear layer and a softmax can be optimal.
"""

import numpy as np
from tqdm import tqdm

from data_gen.output import Output

CHUNK_BYTES = 8 * 2**20  # of float64: some tens of MB at work, whatever the size of the files


def sample(rng: np.random.Generator, means: np.ndarray, rho: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `n` samples: x (n, F) float32 and y (n,) int64.

    Two features share one normal variable, which gives them the correlation `rho`. Only elementwise
    operations are used, whose results, unlike those of a matrix product, do not depend on the machine.
    """
    n_classes, n_features = means.shape
    y = rng.integers(n_classes, size=n)
    x = rng.standard_normal((n, n_features))
    x *= np.sqrt(1 - rho)
    x += np.sqrt(rho) * rng.standard_normal((n, 1))
    x += means[y]
    return x.astype(np.float32), y


def log_posterior(x: np.ndarray, means: np.ndarray, rho: float) -> np.ndarray:
    """The true log p(y | x): (n, C) float64, for x (n, F)."""
    n_features = means.shape[1]
    # S^-1 = (I - rho / (1 - rho + rho F) 11^T) / (1 - rho), by Sherman and Morrison
    shrink = rho / (1 - rho + rho * n_features)
    weight = (means - shrink * means.sum(1, keepdims=True)) / (1 - rho)
    logits = x.astype(np.float64) @ weight.T - 0.5 * (means * weight).sum(1)
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def generate(
    output: Output,
    *,
    n_train: int,
    n_val: int,
    n_features: int,
    n_classes: int,
    separation: float,
    correlation: float,
    seed: int,
) -> dict:
    """Write the four arrays to `output`, chunk by chunk; return the facts for `meta.json`.

    Under "bayes" stand, for "train" and for "val", the mean cross-entropy (nats) and the accuracy of the true
    posterior on the samples of that split, each with its standard error, and their number.
    """
    output.reserve((n_train + n_val) * (4 * n_features + 8))
    train_seed, val_seed, means_seed = np.random.SeedSequence(seed).spawn(3)
    means = (
        np.random.default_rng(means_seed).standard_normal((n_classes, n_features)) * separation / np.sqrt(n_features)
    )
    rows = max(1, CHUNK_BYTES // (8 * max(n_features, n_classes)))
    bayes = {}
    with tqdm(total=n_train + n_val, unit=" samples", unit_scale=True, disable=None) as progress:
        for split, n, split_seed in (("train", n_train, train_seed), ("val", n_val, val_seed)):
            rng = np.random.default_rng(split_seed)
            loss = loss_squared = correct = 0.0
            X = output.array(f"X_{split}.npy", (n, n_features), np.float32)
            y = output.array(f"y_{split}.npy", (n,), np.int64)
            for start in range(0, n, rows):
                stop = min(start + rows, n)
                X[start:stop], y[start:stop] = sample(rng, means, correlation, stop - start)
                log_p = log_posterior(X[start:stop], means, correlation)
                nll = -log_p[np.arange(stop - start), y[start:stop]]
                loss += nll.sum()
                loss_squared += (nll**2).sum()
                correct += (log_p.argmax(1) == y[start:stop]).sum()
                progress.update(stop - start)
            X.flush()
            y.flush()
            bayes[split] = best_possible(n, loss, loss_squared, correct)
    samples = f"{n_train:,} training and {n_val:,} validation samples"
    return {"summary": f"{samples}, {n_features:,} features, {n_classes:,} classes", "bayes": bayes}


def best_possible(n: int, loss: float, loss_squared: float, correct: float) -> dict:
    """What `meta.json` says of the true posterior on `n` samples, from sums over them."""
    mean, accuracy = loss / n, correct / n
    return {
        "cross_entropy_nats": float(mean),
        "cross_entropy_standard_error": float(np.sqrt(max(0.0, loss_squared / n - mean**2) / n)),
        "accuracy": float(accuracy),
        "accuracy_standard_error": float(np.sqrt(accuracy * (1 - accuracy) / n)),
        "n_samples": n,
    }
