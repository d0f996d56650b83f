"""The digits sample, tested on images of "another camera": brighter, and with less contrast."""

import importlib.util
from pathlib import Path

_DIGITS = Path(__file__).parents[2] / "sample_configs" / "digits" / "model.py"
_spec = importlib.util.spec_from_file_location("digits_model", _DIGITS)
_digits = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_digits)
load_model, load_data, loss, metric = _digits.load_model, _digits.load_data, _digits.loss, _digits.metric


def load_eval_data(batch_size):
    loader = _digits.load_eval_data(batch_size)
    return [(images * 0.5 + 0.5, labels) for images, labels in loader]
