"""A seeded run of faults against a whole system, and the oracle that says what must be left of it."""
