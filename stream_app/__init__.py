"""The worker of the streaming re-ranker, and what speaks to it."""

from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

# `models` and `schemas` are common names: a foreign package of that name would be imported in place of ours,
# and the worker would fail late and strangely.
for _name in ("models", "schemas"):
    _spec = find_spec(_name)
    _origin = _spec.origin if _spec is not None else None
    if _origin is None or Path(_origin).resolve().parent != _ROOT / _name:
        raise ImportError(
            f"package {_name!r} comes from {_origin!r}, not from beside stream_app; the worker does not start; "
            "install stream-rerank into an environment of its own"
        )
