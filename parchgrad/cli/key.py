"""`parchgrad key`: tokens for the service's callers."""

from __future__ import annotations

import hashlib
import re
import secrets

import click


@click.group("key")
def key_group() -> None:
    """API keys of the service: callers keep the token, the service's settings only its digest."""


@key_group.command("new")
@click.argument("name")
@click.option("--rate", type=click.IntRange(1, 999_999_999), help="Requests a minute; without it, any number.")
def new(name: str, rate: int | None) -> None:
    """Make a random token for caller NAME; it is shown this once and kept nowhere.

    Standard output is the token alone, standard error what the service is given.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        raise click.ClickException(f"NAME is {name!r}; allowed: 1 to 64 letters, digits, '.', '_' and '-'.")
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    # Standard output has the token alone: `key new NAME > file` makes what --api-key-file takes.
    click.echo("The token, for the caller ('Authorization: Bearer TOKEN'); it cannot be shown again:", err=True)
    click.echo(token)
    click.echo("For the service, in PARCHGRAD_API_KEYS or PARCHGRAD_ADMIN_KEYS or a line of a file of keys:", err=True)
    click.echo(f"{name}:{digest}" + (f":{rate}" if rate else ""), err=True)
