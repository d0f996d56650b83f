"""Why failures stand, by check and family of layers, for the table."""

from __future__ import annotations

_COPY = "statistics are differentiated in float32, whose copy of the input is kept"
_OTHER = "refused in training, where the layer reads another module, its convolution"

REASONS: dict[tuple[str, str], str] = {
    ("saved_tensors", "instance"): (
        "plain operations in both modes, so that training gives bit for bit what inference gives; they keep the centred"
        " input as well"
    ),
    ("saved_tensors_in_half_precision", "instance"): f"as in float32; and {_COPY}",
    ("saved_tensors_in_half_precision", "gated"): _COPY,
    ("script", "following"): _OTHER,
    ("script_changes_mode", "following"): _OTHER,
    ("trace", "following"): _OTHER,
    ("autocast", "following"): "refused without a call of its convolution just before",
    ("activation_checkpointing", "following"): "refused: the window would hold the batch twice",
}
