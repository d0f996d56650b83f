"""Write digits.npz from scikit-learn's copy of the UCI digits (bnprobe itself does not need scikit-learn)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DESTINATION = Path(__file__).parent / "digits.npz"


def main() -> None:
    """Store images (1797, 8, 8) of 0..16, labels of 0..9 and the stratified 80/20 split."""
    images, labels = load_digits(return_X_y=True)
    _, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    is_eval = np.zeros(len(labels), dtype=bool)
    is_eval[held_out] = True
    np.savez_compressed(
        DESTINATION,
        images=images.reshape(-1, 8, 8).astype(np.uint8),
        labels=labels.astype(np.uint8),
        is_eval=is_eval,
    )
    print(f"{DESTINATION.name}: {len(labels)} images, {is_eval.sum()} of them for evaluation")


if __name__ == "__main__":
    main()
