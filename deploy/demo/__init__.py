"""`rerank demo`: the whole system on real data, from an empty machine to numbers read off the output topic."""
