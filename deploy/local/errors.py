"""What goes wrong while starting local servers."""

from stream_app.errors import SettingsError


class LocalStackError(SettingsError):
    """A local server cannot be started or steered; the message says value, consequence, remedy."""
