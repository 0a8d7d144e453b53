"""Records on topics, their bytes, the topic table, JSON Schema and golden bytes."""
