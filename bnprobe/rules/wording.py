"""Numbers and names as the messages of rules show them: those of ``bnprobe.wording``."""

from bnprobe.wording import count, listed, number, percent

__all__ = ["count", "listed", "number", "percent"]
