"""What the command line says of itself: `hashdist --help`, `hashdist COMMAND --help` and --help-all, `--version`.

The texts are made from the table of commands (hashdist/commands/catalogue.py) and the docstrings of the settings.
"""

import os
import platform
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from inspect import getdoc
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from hashdist import __version__
from hashdist.commands.catalogue import COMMANDS, CONFIG, GROUPS, SWITCHES, Command, families
from hashdist.ground.settings import Settings

_LEAST, _MOST = 80, 100  # columns
_NAMES = 30  # columns that a flag and its value may take before its text begins on the next line
_LIBRARIES = ("ray", "torch", "faiss-cpu", "faiss-gpu", "numba")
_VECTORS = {"avx512vpopcntdq": "AVX-512 with VPOPCNTDQ", "avx512f": "AVX-512", "avx2": "AVX2", "neon": "NEON"}


def overview() -> str:
    """All commands, below what people want."""
    lines = ["usage: hashdist COMMAND [WORD ...] [--flag VALUE ...]"]
    for heading, commands in GROUPS.items():
        lines += ["", f"{heading}:", *_listed(commands)]
    return "\n".join(
        [
            *lines,
            "",
            *_wrapped(
                "`hashdist COMMAND --help` shows examples and what people change, --help-all every setting that the "
                "command reads, `hashdist --version` versions. A setting on the command line wins over the file."
            ),
        ]
    )


def of_family(first: str) -> str:
    """The commands that begin with one word."""
    names = families()[first]
    usage = f"usage: hashdist {first} {{{','.join(name.partition(' ')[2] for name in names)}}} [--flag VALUE ...]"
    return "\n".join([usage, "", *_listed({name: COMMANDS[name] for name in names})])


def _listed(commands: dict[str, Command]) -> list[str]:
    width = max(map(len, COMMANDS))
    return [line for name, command in commands.items() for line in _entry(name, command.help, width)]


def of_command(name: str, *, full: bool = False) -> str:
    """What a command does, examples, its own options, and settings: those that people change, or all that it reads."""
    command = COMMANDS[name]
    word = f" [{command.word}]" if command.first else ""
    lines = [f"usage: hashdist {name}{word} [--flag VALUE ...]", ""]
    lines += [*_wrapped(f"{command.help[0].upper()}{command.help[1:]}."), "", "examples:"]
    lines += [f"  hashdist {example}" for example in command.examples]
    lines += ["", "options:", *_options(command)]
    if full:
        lines += _sections(command)
        return "\n".join(lines)
    if command.shown:
        lines += ["", "settings that people change:", *_settings(Settings, command.shown)]
    more = "every setting that this command reads is in"
    return "\n".join([*lines, "", *_wrapped(f"{more} `hashdist {name} --help-all`; docs/command_line.md says more")])


def _options(command: Command) -> list[str]:
    own = _settings(command.options, command.own) if command.options else []
    file = _entry(f"--{CONFIG} FILE.yaml", "settings of this and any other command, by section")
    return [*own, *file, *_entry("--json", SWITCHES["json"])]


def _sections(command: Command) -> Iterator[str]:
    """Every setting that a command reads, section by section."""
    for section in dict.fromkeys(name.partition(".")[0] for name in command.settings):
        names = [name for name in command.settings if name.partition(".")[0] == section]
        yield from ("", f"{section}:", *_settings(Settings, names))


def _settings(kind: type, names: Iterable[str]) -> list[str]:
    known, lines = described(kind), list[str]()
    for name in names:
        setting = known[name]
        letter = f"-{name}, " if len(name) == 1 else ""
        flag = f"{letter}--{name.replace('_', '-')} {metavar(setting.hint)}".rstrip()
        lines += _entry(flag, setting.text + _default(setting.default))
    return lines


def _default(value: Any) -> str:
    """A default in brackets; none for what the text explains, or what is nothing."""
    if value in ("", 0, -1, False, [], {}):
        return ""
    return f" [{','.join(map(str, value)) if isinstance(value, list) else value}]"


def _entry(flag: str, text: str, width: int = _NAMES) -> list[str]:
    """A flag, and beside it its text."""
    lines = textwrap.wrap(text, _columns() - width - 4) or [""]
    first = f"  {flag:<{width}}  "
    if len(flag) > width:
        return [f"  {flag}", *(" " * (width + 4) + line for line in lines)]
    return [first + lines[0], *(" " * (width + 4) + line for line in lines[1:])]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _columns())


def _columns() -> int:
    return max(_LEAST, min(_MOST, shutil.get_terminal_size((_MOST, 0)).columns))


def metavar(hint: Any) -> str:
    """What stands for a value of this type: nothing for true or false, the choices where there are some."""
    if hint is bool:
        return ""
    if get_origin(hint) in (list, dict):
        return "LIST" if get_origin(hint) is list else "MAP"
    return "|".join(choices(hint)) or {int: "N", float: "X"}.get(hint, "TEXT")


def choices(hint: Any) -> tuple[str, ...]:
    """The values that a setting may have, where its type names them."""
    values = get_args(hint)
    return values if values and all(isinstance(value, str) for value in values) else ()


class Setting(NamedTuple):
    """A setting: its type, what its docstring says, and its default."""

    hint: Any
    text: str
    default: Any


@cache
def described(kind: type, prefix: str = "") -> dict[str, Setting]:
    """Every setting of a class of settings by full name, with those of the classes inside it."""
    arguments = (getdoc(kind) or "").partition("Args:\n")[2]
    texts = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", arguments, re.MULTILINE))
    defaults, hints, found = kind(), get_type_hints(kind), dict[str, Setting]()
    for field in fields(kind):
        value = getattr(defaults, field.name)
        if is_dataclass(value):
            found |= described(hints[field.name], f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = Setting(
                hints[field.name], " ".join(texts[field.name].split()).rstrip("."), value
            )
    return found


def versions() -> str:
    """The version of this package, of the libraries that decide what it computes, and what its kernels use."""
    lines = [f"hashdist {__version__}"]
    for library in _LIBRARIES:
        with suppress(PackageNotFoundError):
            lines.append(f"{library} {version(library)}")
    return "\n".join([*lines, f"kernels: {_kernels()}"])


def _kernels() -> str:
    """The processor that numba compiles the kernels for, and its widest vectors."""
    try:
        from llvmlite import binding
    except ImportError:
        return "numba is not installed"
    named = os.environ.get("NUMBA_CPU_NAME") or binding.get_host_cpu_name()
    has = binding.get_host_cpu_features()
    widest = next((text for feature, text in _VECTORS.items() if has.get(feature)), "no vectors that are known here")
    return f"{platform.machine()}, {named}, {widest}"
