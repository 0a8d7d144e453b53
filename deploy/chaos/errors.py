"""What ends a chaos run before it has a verdict."""

from stream_app.errors import RerankError


class ChaosError(RerankError):
    """The run cannot start or cannot go on; the message says value, consequence, remedy."""
