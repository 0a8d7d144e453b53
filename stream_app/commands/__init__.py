"""One module for each group of `rerank` commands."""
