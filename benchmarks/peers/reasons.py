"""Why failures stand, by check and family of layers, for the table."""

from __future__ import annotations

_FOLDED = (
    "AIMET takes every class derived from nn.BatchNorm1d or 2d for BN, folds the running statistics into its weight,"
    " and asks no layer whether these are all that it uses"
)
_OTHER = "refused in training, where the layer reads another module, its convolution"
_PER_PART = "statistics of every ghost batch are kept, of which the check has one for each two samples of 7 positions"
_PER_SAMPLE = "four statistics of every sample and channel are kept, which the check's few positions do not outweigh"

REASONS: dict[tuple[str, str], str] = {
    ("aimet_folding", "domain"): _FOLDED,
    ("aimet_folding", "instance"): _FOLDED,
    ("aimet_folding", "weighed"): _FOLDED,
    ("factory_kwargs", "average"): "the averages of a layer in half precision are made in float32",
    ("precise_bn", "renorm"): (
        "fvcore renews four classes of PyTorch and those derived from them; SyncBatchRenorm, which takes 2 to 5"
        " dimensions, is none: bnprobe.recalibrate renews it"
    ),
    ("saved_tensors", "ghost"): _PER_PART,
    ("saved_tensors", "instance"): _PER_SAMPLE,
    ("saved_tensors_in_half_precision", "ghost"): _PER_PART,
    ("saved_tensors_in_half_precision", "instance"): _PER_SAMPLE,
    ("saved_tensors_in_half_precision", "gated"): (
        "statistics are differentiated in float32, whose copy of the input is kept"
    ),
    ("script", "following"): _OTHER,
    ("script_changes_mode", "following"): _OTHER,
    ("trace", "following"): _OTHER,
    ("autocast", "following"): "refused without a call of its convolution just before",
    ("activation_checkpointing", "following"): "refused: the window would hold the batch twice",
}
