"""Real handwriting: the 1,797 digits of 8 x 8 pixels that scikit-learn carries.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998 (its test set, CC BY 4.0), as `sklearn.datasets.load_digits`.
"""

import numpy as np

from data_gen.output import Output


def generate(output: Output, *, n_val: int, seed: int) -> dict:
    """Write the digits to `output`: X (N, 64) float32, pixels from 0 to 16; y (N,) int64, 0 to 9.

    The split is drawn with `seed` and holds every digit in the same share in both parts.
    """
    from sklearn.datasets import load_digits  # here, because it takes a second, and the other generator needs none
    from sklearn.model_selection import train_test_split

    X, y = load_digits(return_X_y=True)
    X_train, X_val, y_train, y_val = train_test_split(X, y, test_size=n_val, random_state=seed % 2**32, stratify=y)
    for name, values, dtype in (
        ("X_train", X_train, np.float32),
        ("y_train", y_train, np.int64),
        ("X_val", X_val, np.float32),
        ("y_val", y_val, np.int64),
    ):
        array = output.array(f"{name}.npy", values.shape, dtype)
        array[:] = values
        array.flush()
    return {
        "summary": f"{len(X_train):,} training and {len(X_val):,} validation digits of 8 x 8 pixels",
        "source": "UCI Optical Recognition of Handwritten Digits, as sklearn.datasets.load_digits",
    }
