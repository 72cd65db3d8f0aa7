"""`hashdist completion bash|zsh`: a script that completes commands, their subcommands and flags, choices and files."""

from argparse import ArgumentParser
from typing import Any

import shtab

from hashdist.commands.catalogue import COMMANDS, SWITCHES, Command, families
from hashdist.commands.help import Setting, choices, described
from hashdist.ground.errors import InvalidInput
from hashdist.ground.options import CompletionOptions
from hashdist.ground.settings import Settings

SHELLS = ("bash", "zsh")


def write(settings: Settings, options: CompletionOptions) -> dict[str, Any]:  # noqa: ARG001
    """The script for a shell, as the text of the result. Raises InvalidInput for another shell."""
    if options.shell not in SHELLS:
        raise InvalidInput(f"a shell is required, {' or '.join(SHELLS)}, found {options.shell!r}")
    script = shtab.complete(parser(), options.shell)
    return {"shell": options.shell, "script": script, "text": script}


def parser() -> ArgumentParser:
    """All commands and their flags as the standard library's parser, which nothing but completion is made from."""
    whole = ArgumentParser("hashdist", allow_abbrev=False)
    whole.add_argument("--version", action="store_true", help="versions, and the kernels in use")
    commands = whole.add_subparsers()
    below = {}
    for first, names in families().items():
        text = ", ".join(name.partition(" ")[2] for name in names)
        below[first] = commands.add_parser(first, help=text).add_subparsers()
    for name, command in COMMANDS.items():
        first, _, second = name.partition(" ")
        _add_flags((below[first] if second else commands).add_parser(second or name, help=command.help), command)
    return whole


def _add_flags(made: ArgumentParser, command: Command) -> None:
    """The flags that `--help-all` lists, and the words that may be given without one."""
    if command.first:
        words = made.add_argument("word", nargs="*", choices=SHELLS if command.options is CompletionOptions else None)
        if words.choices is None:
            words.complete = shtab.FILE  # type: ignore[attr-defined]
    made.add_argument("--config", help="YAML file of settings").complete = shtab.FILE  # type: ignore[attr-defined]
    for switch, text in {**SWITCHES, "help-all": "every setting that the command reads"}.items():
        made.add_argument(f"--{switch}", action="store_true", help=text)
    own = described(command.options) if command.options else {}
    read = described(Settings)
    for name, setting in {**own, **{name: read[name] for name in command.settings}}.items():
        _add_flag(made, name, setting)


def _add_flag(made: ArgumentParser, name: str, setting: Setting) -> None:
    flags = [f"--{name.replace('_', '-')}", *([f"-{name}"] if len(name) == 1 else [])]
    text = setting.text.replace("%", "%%")
    if setting.hint is bool:
        made.add_argument(*flags, action="store_true", help=text)
        return
    flag = made.add_argument(*flags, choices=choices(setting.hint) or None, help=text)
    if setting.hint is str:
        flag.complete = shtab.FILE  # type: ignore[attr-defined]
