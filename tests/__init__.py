"""How we know that it works: builders and corpora here, tests by what they need in the folders."""
