"""What several commands share: kinds of option values, Celery's options that are refused or ignored, and plurals."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

import click

from fastq.cli.errors import Misuse
from fastq.net.urls import mask_one

F = TypeVar("F", bound=Callable[..., Any])


def name_list(text: str) -> tuple[str, ...]:
    """Return the names between commas, without the blanks around them."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def json_array(text: str) -> list[Any]:
    """Return a decoded JSON array. Raises BadParameter when the text is anything else."""
    value = _json(text)
    if not isinstance(value, list):
        raise click.BadParameter(f"{text!r} is not a JSON array, such as [1, 2]")
    return value


def json_object(text: str) -> dict[str, Any]:
    """Return a decoded JSON object. Raises BadParameter when the text is anything else."""
    value = _json(text)
    if not isinstance(value, dict):
        raise click.BadParameter(f'{text!r} is not a JSON object, such as {{"x": 1}}')
    return value


def _json(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not JSON: {error}") from None


def moment(text: str) -> datetime:
    """Return a moment given in ISO 8601. Raises BadParameter when the text is none."""
    try:
        # Python 3.10 does not read the Z that everybody writes.
        return datetime.fromisoformat(f"{text[:-1]}+00:00" if text.endswith("Z") else text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a moment such as 2030-01-31T12:00:00+00:00") from None


def moment_or_seconds(text: str) -> datetime | float:
    """Return seconds as a float, anything else as a moment."""
    try:
        return float(text)
    except ValueError:
        return moment(text)


def refused(*names: str, takes_value: bool = True, why: str = "") -> Callable[[F], F]:
    """Recognize an option of Celery's and answer that it is not carried: exit 2 and one line, not "no such option"."""

    def refuse(ctx: click.Context, param: click.Parameter, value: object) -> None:
        if value is None or value is False:
            return
        reason = why or "remove it from the command line"
        raise Misuse(f"option {'/'.join(param.opts)} is not carried by this version of fastq; {reason}")

    return click.option(
        *names, callback=refuse, is_flag=not takes_value, default=None, hidden=True, expose_value=False, is_eager=True
    )


def accepted(*names: str) -> Callable[[F], F]:
    """Take a switch of Celery's that changes nothing here, so that unit files keep working."""
    return click.option(*names, is_flag=True, hidden=True, expose_value=False)


def misplaced_globals(function: F) -> F:
    """Answer to a global option after the command with where it belongs."""

    def refuse(ctx: click.Context, param: click.Parameter, value: object) -> None:
        if value is not None:
            name = param.opts[0]
            shown = mask_one(str(value))
            raise Misuse(f"option {name} stands before the command: fastq {name} {shown} {ctx.info_name} ...")

    for names in (("-A", "--app"), ("-b", "--broker"), ("--result-backend",)):
        # No environment variable: those set the option where it belongs.
        function = click.option(
            *names, callback=refuse, default=None, hidden=True, expose_value=False, allow_from_autoenv=False
        )(function)
    return function


def plural(count: int, noun: str) -> str:
    """Return the count with its noun: ``1 node``, ``2 nodes``, ``no nodes``."""
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"
