"""Write cancer.npz from scikit-learn's copy of the UCI table (bnprobe itself does not need scikit-learn)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

DESTINATION = Path(__file__).parent / "cancer.npz"


def main() -> None:
    """Store features (569, 30), labels (1: benign) and the stratified 80/20 split."""
    features, labels = load_breast_cancer(return_X_y=True)
    _, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    is_eval = np.zeros(len(labels), dtype=bool)
    is_eval[held_out] = True
    np.savez_compressed(
        DESTINATION,
        features=features.astype(np.float32),
        labels=labels.astype(np.uint8),
        is_eval=is_eval,
    )
    print(f"{DESTINATION.name}: {len(labels)} patients, {is_eval.sum()} of them for evaluation")


if __name__ == "__main__":
    main()
