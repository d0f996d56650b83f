"""The checker of annotations that jaxtyping's import hook applies to bnprobe.stats while testing."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""As beartype, but an int will do where a float is asked for (PEP 484)."""
