"""The doctor's look at the environment: variables that no setting knows, and values that no setting takes."""

import difflib
from collections.abc import Iterable, Mapping

from pydantic import BaseModel

from stream_app.commands.findings import Finding, fail, ok, warn
from stream_app.errors import SettingsError
from stream_app.settings import ENV_PREFIX, Settings, load_settings

_NESTED = "__"


def examine_settings(environment: Mapping[str, str]) -> tuple[Settings | None, list[Finding]]:
    """Read the settings; None for them when the worker would not start.

    The value of a variable that no setting knows is never shown: it may be a misspelt password.
    """
    unknown = unknown_variables(environment)
    findings = [_unknown(name) for name in unknown]
    if any(_NESTED in name for name in unknown):
        return None, findings
    try:
        settings = load_settings()
    except SettingsError as error:
        remedy = "correct or unset it; the other checks wait for that"
        return None, findings + [fail("settings", line, remedy) for line in str(error).splitlines()]
    return settings, findings or [ok("settings", "every RERANK_ variable is a setting")]


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the RERANK_ variables that no setting reads, sorted."""
    known = set(_variables(Settings, ENV_PREFIX))
    return sorted(name for name in map(str.upper, environment) if name.startswith(ENV_PREFIX) and name not in known)


def _variables(model: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in model.model_fields.items():
        variable = prefix + name.upper()
        yield variable
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _variables(field.annotation, variable + _NESTED)


def _unknown(name: str) -> Finding:
    close = difflib.get_close_matches(name, list(_variables(Settings, ENV_PREFIX)), n=1)
    remedy = f"did you mean {close[0]}? else unset it" if close else "unset it, or correct its name"
    if _NESTED in name:
        return fail("settings", f"{name}: no setting has this name, the worker does not start", remedy)
    return warn("settings", f"{name}: no setting has this name, it is ignored", remedy)
