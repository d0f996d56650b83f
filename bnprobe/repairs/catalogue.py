"""The repairs there are."""

from __future__ import annotations

import difflib

from bnprobe.errors import RepairError
from bnprobe.repairs.batch_renorm import BatchRenormRepair
from bnprobe.repairs.frozen import FrozenRepair
from bnprobe.repairs.gated import GatedRepair
from bnprobe.repairs.group_norm import GroupNormRepair
from bnprobe.repairs.instance_renorm import InstanceRenormRepair
from bnprobe.repairs.interface import Repair
from bnprobe.repairs.sync import SyncRepair

REPAIRS: tuple[Repair, ...] = (
    BatchRenormRepair(),
    FrozenRepair(),
    GroupNormRepair(),
    SyncRepair(),
    InstanceRenormRepair(),
    GatedRepair(),
)
"""Everything a layer can be converted to. A new repair is one file, one line here and its name in ``bnprobe.spec``."""


def repair_named(name: str) -> Repair:
    """The repair of a name.

    Raises:
        RepairError: There is none; says which there are.
    """
    for repair in REPAIRS:
        if repair.name == name:
            return repair
    known = [repair.name for repair in REPAIRS]
    nearest = difflib.get_close_matches(name, known, 1, cutoff=0.0)[0]
    raise RepairError(f'Layers cannot be converted to "{name}" (known: {", ".join(known)}); the nearest is {nearest}.')
