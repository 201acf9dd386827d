"""Command lines of the scripts: fields, of those that train a preset and the fields that differ from it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

import tyro

Config = TypeVar("Config")


def given_config(script: str, kind: type[Config], arguments: Sequence[str] | None, description: str | None) -> Config:
    """The configuration that a command line without presets gives, see `chosen_config`."""
    return tyro.cli(kind, args=arguments, prog=_called(script), description=description)


def chosen_config(
    script: str, presets: Mapping[str, tuple[str, Config]], arguments: Sequence[str] | None, description: str | None
) -> Config:
    """The configuration that a command line gives; ends the process where it gives none.

    Args:
      script: called as `python -m experiments.script`.
      presets: description and configuration of each, by name.
      arguments: the command line's; None is this process's.
      description: of the script.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command = _called(script)
    if not arguments or arguments[0] not in presets:
        return tyro.extras.overridable_config_cli(presets, args=arguments, prog=command, description=description)
    # Not as the subcommand it is above: tyro's messages would name fields below a name of its own.
    name, *fields = arguments
    summary, preset = presets[name]
    return tyro.cli(
        type(preset),
        default=preset,
        args=fields,
        prog=f"{command} {name}",
        description=summary,
        config=(tyro.conf.AvoidSubcommands,),
    )


def _called(script: str) -> str:
    return f"python -m experiments.{script}"
