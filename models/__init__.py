"""Networks, training, export and evaluation. The worker imports `models.manifest` and nothing else from here."""
