"""The oracle of the fault tests is the one that `rerank chaos` asks."""

from deploy.chaos.oracle import Expected, Record, fold

__all__ = ["Expected", "Record", "fold"]
