"""What goes wrong in the demo."""

from typing import ClassVar

from stream_app.errors import RerankError


class DemoError(RerankError):
    """The demo ends here; the message says value, consequence, remedy."""

    exit_code: ClassVar[int] = 1


class DataError(DemoError):
    """There is no data to show anything on; the caller can name other data."""

    exit_code: ClassVar[int] = 2
