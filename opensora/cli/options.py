"""Options read one by one or made from configuration dataclasses."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import jsonargparse

from opensora.cli import CommandError
from opensora.config_files import config_from_dict

Config = TypeVar("Config")


class Parser(jsonargparse.ArgumentParser):
    """Raises CommandError instead of printing a usage text and leaving."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"opensora {command}", description=description, exit_on_error=False)

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The options, nested by their dots."""
        try:
            return self.parse_args(list(arguments)).as_dict()
        except (jsonargparse.ArgumentError, argparse.ArgumentError) as error:
            raise CommandError(str(error).replace('Parser key "', 'option "')) from error


def early_option(arguments: Sequence[str], flag: str, default: str) -> str:
    """The value of one option, read before the others are known: their defaults depend on it."""
    reader = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    reader.add_argument(flag, default=default, dest="value")
    try:
        return reader.parse_known_args(list(arguments))[0].value
    except argparse.ArgumentError as error:
        raise CommandError(str(error)) from error


def add_config_options(parser: Parser, default: Any, aliases: dict[str, tuple[str, ...]]) -> None:
    """An option for every leaf of a configuration: run.log_every becomes --run.log-every."""
    for name, hint, value in _leaves(default):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, *aliases.get(name, ()), type=hint, default=value)


def config_from_options(config_type: type[Config], options: dict[str, Any]) -> Config:
    names = {item.name for item in fields(config_type)}  # type: ignore[arg-type]
    return config_from_dict(config_type, {name: value for name, value in options.items() if name in names})


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    hints = get_type_hints(type(config))
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", hints[item.name], value


class OrNone:
    """A converter that also takes "none"; help and errors show it by its name."""

    def __init__(self, convert: Callable[[str], Any]) -> None:
        self._convert = convert
        self.__name__ = f"{convert.__name__} or none"

    def __call__(self, text: str) -> Any:
        return None if str(text).lower() in ("none", "null", "") else self._convert(text)

    def __repr__(self) -> str:
        return self.__name__
