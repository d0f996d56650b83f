"""BN108: layers that were converted when their weights were saved, and are plain BN now."""

from __future__ import annotations

from bnprobe.config.targets import TARGETS
from bnprobe.records import Severity, Verdict
from bnprobe.rules.facts import Anatomy, Facts
from bnprobe.rules.interface import AnatomyRule


class UndoneConversion(AnatomyRule):
    """The weights are those of converted layers, and the model has plain BN in their place.

    What:
        The names in the checkpoint, against the layers of the model. A layer that was converted to `per-domain`,
        `gated`, `mabn` or `cross-iteration` has tensors there that BN has not; it fails where the layer of that name is
        `nn.BatchNorm` or `nn.SyncBatchNorm`. It is an error where plain BN gives other outputs at inference, and a
        warning where only training would. Without a checkpoint nothing shows what a layer was. Layers of
        `example-weighing` and `instance-renorm` have the names of BN, too: their files are known by the mark that
        bnprobe writes into them, and refused where the model has plain BN.

    Why:
        `checkpoint.strict: false` (in torch `strict=False`) leaves out what the model has no place for. A repair can be
        lost this way without an error: the model is built without it, or something turns its layers back after it, as
        functions do that make every BN layer a `SyncBatchNorm`.

    Example:
        A discriminator keeps statistics for real and for generated images. The script that evaluates it builds the
        network as it was before, and loads the weights with `strict=False`: both kinds of images are normalized with
        the statistics of all.

    Remedy:
        Convert the layers in `load_model()` before the weights are loaded, by `bnprobe.convert(model, layers, to=...)`,
        and call what synchronizes BN layers before that.

    Reference:
        PyTorch documentation of torch.nn.SyncBatchNorm.convert_sync_batchnorm (it replaces all BatchNorm layers).
    """

    code = "BN108"
    title = "conversion undone"
    cause = "undone_conversion"
    severity = "warning"
    unit = ""
    finding = "the checkpoint is of converted layers, and the model has plain BN there"
    remedy = "Convert the layers in load_model() before the weights are loaded: bnprobe.convert(model, [...], to=...)."

    def _judge(self, layer: Anatomy, facts: Facts) -> Verdict:
        to = facts.undone.get(layer.name)
        if to is None:
            return self.passed(layer.name, "No tensor in a checkpoint shows that the layer was converted.")
        deploys = TARGETS[to].deploys
        severity: Severity = "warning" if deploys else "error"
        then = "trains as plain BN does, while inference is the same" if deploys else "gives other outputs"
        message = f"The checkpoint has tensors of a layer converted to {to}, but the layer is {layer.kind}: it {then}."
        remedy = self.remedy.replace("to=...", f'to="{to}"')
        return self.failed(layer.name, message, severity=severity, remedy=remedy)
