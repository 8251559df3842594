"""The `parchgrad` command: arguments in, one library call, text out."""

from __future__ import annotations

import os
import sys

import click

from parchgrad import __version__
from parchgrad.cli.attack import attack
from parchgrad.cli.class_graph import class_graph_group
from parchgrad.cli.evaluate import evaluate
from parchgrad.cli.explain import explain
from parchgrad.cli.export import export
from parchgrad.cli.key import key_group
from parchgrad.cli.model import model_group
from parchgrad.cli.serve import serve
from parchgrad.cli.shared import EXIT_INTERRUPTED
from parchgrad.cli.table import table_group
from parchgrad.errors import DataError, ParchGradError, missing_package

EXIT_DATA = 3

# torch is imported inside the commands: `parchgrad --help` stays instant.


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="parchgrad")
def cli() -> None:
    """Predictions with ParchGrad saliency maps: model packages, selection tables, explanations."""
    # 'module:factory' architectures are looked up where the command is run, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def main() -> None:
    """Entry point: an error is one line on standard error; exit code 3 where images do not do, else 1."""
    try:
        sys.exit(cli(standalone_mode=False))
    except click.Abort:
        click.echo("Interrupted.", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if (named := missing_package("This command", error)) is None:
            raise
        click.echo(f"Error: {named}", err=True)
        sys.exit(1)
    except (ParchGradError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(EXIT_DATA if isinstance(error, DataError) else 1)


for command in (model_group, table_group, class_graph_group, explain, evaluate, attack, export, serve, key_group):
    cli.add_command(command)
