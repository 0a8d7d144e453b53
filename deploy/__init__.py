"""How the re-ranker runs: the local stack and the demonstration."""
