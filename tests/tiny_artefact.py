"""The tiny artefact of the tests is the one that `rerank chaos` serves by default."""

from deploy.chaos.artefact import DIM, ITEMS, item_ids, write_tiny_artefact

__all__ = ["DIM", "ITEMS", "item_ids", "write_tiny_artefact"]
