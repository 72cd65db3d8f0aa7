"""The command line: argv -> settings -> one command -> one result.

Commands stand in hashdist/commands/catalogue.py; flags and YAML come from the same dataclasses
(hashdist/ground/settings.py). Progress goes to stderr; the result goes to stdout, with --json as exactly one JSON
object. Exit codes: 0 done, 2 wrong input, 1 anything else.
"""

import difflib
import importlib
import json
import os
import sys
from argparse import ArgumentError
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from hashdist.commands.catalogue import COMMANDS, CONFIG, SWITCHES, Command, families, flags
from hashdist.ground import exporting
from hashdist.ground.errors import HashdistError, InvalidInput
from hashdist.ground.progress import plain, say
from hashdist.ground.settings import MetricsSettings, Settings

_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the process that a job was submitted to run."""

_ROOT = "hashdist"
"""Folder that everything is committed below, where no root is given."""

_FULL = ("--help-all", "--help_all")
_HELP = ("-h", "--help", *_FULL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        text = _about(words)
        if text is not None:
            print(text)  # noqa: T201
            return 0
        name, rest = _split(words)
        return _show(_run(name, rest), as_json)
    except HashdistError as error:
        for line in f"hashdist: {type(error).__name__}: {error}".split("\n"):
            say(line)
        if as_json:
            print(json.dumps({"error": {"kind": type(error).__name__, "message": str(error)}}))  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        say("hashdist: stopped; what is committed stays, and the same command goes on from there")
        return 130


def _about(words: Sequence[str]) -> str | None:
    """The answer to a question about the command line itself (--help, --version); None for any other words."""
    if words and words[0] == "--version":
        return str(_load("hashdist.commands.help:versions")())
    asked = next((word for word in words or ["--help"] if word in _HELP), None)
    if asked is None:
        return None
    names = list(takewhile(lambda word: not word.startswith("-"), words))
    if not names:
        return str(_load("hashdist.commands.help:overview")())
    if names in [[family] for family in families()]:
        return str(_load("hashdist.commands.help:of_family")(names[0]))
    return str(_load("hashdist.commands.help:of_command")(_split(words)[0], full=asked in _FULL))


def _load(target: str) -> Callable[..., Any]:
    """What `module:name` names."""
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _split(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name, of one or two words, and what follows it. Raises InvalidInput if there is no such command."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            return name, list(words[count:])
    family = families().get(words[0])
    if family and (len(words) == 1 or words[1].startswith("-")):
        raise InvalidInput(
            f"`hashdist {words[0]}` must be followed by what to do: {', '.join(family)}; "
            f"`hashdist {words[0]} --help` says what each does"
        )
    known = family or list(COMMANDS)
    near = nearest(" ".join(words[:2]), known) or nearest(words[0], known)
    typed = " ".join(words[:2]) if family else words[0]
    raise InvalidInput(f"no command `{typed}`{_hint(near)}; the commands are: {', '.join(known)}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one, whole or in its last part (`bits`: train.bits); None if none is."""
    names = list(known)
    by_name = {one.rpartition(".")[2]: one for one in reversed(names)} | {one: one for one in names}
    close = difflib.get_close_matches(name, by_name, 1)
    return by_name[close[0]] if close else None


def _hint(near: str | None) -> str:
    return f"; did you mean `{near}`?" if near else ""


def _run(name: str, words: Sequence[str]) -> dict[str, Any]:
    command = COMMANDS[name]
    settings, options = parse(name, words)
    settings = _with_root(command, settings)
    arguments = [*command.fixed, *([options] if command.options else [])]
    call = _load(command.target)
    with _observed(settings):
        result: dict[str, Any] = call(settings, *arguments)
    return result


def _with_root(command: Command, settings: Settings) -> Settings:
    """The settings with a root, which is ./hashdist where a command needs one and none is given.

    A submitted job is left without: its own folder is deleted when it ends. Raises InvalidInput where ./hashdist holds
    something else.
    """
    named = settings.root or (settings.index.uri and "collection" not in command.reads)
    if named or not command.rooted or _RAY_JOB in os.environ:
        return settings
    root = Path(_ROOT).absolute()
    if root.is_file() or (root / "__init__.py").exists():
        raise InvalidInput(f"a root is required, found none, and {root} is no folder for one; give --root URI")
    say(f"hashdist: the root is {root}, as none was given; --root FOLDER or --root s3://BUCKET/PREFIX names another")
    return replace(settings, root=str(root))


def _observed(settings: Settings) -> AbstractContextManager[object]:
    """While it is open, observations go where the settings say; else into Ray, if this is the process of a Ray job."""
    if _RAY_JOB in os.environ and settings.metrics == MetricsSettings():
        session: AbstractContextManager[object] = _load("hashdist.stages.cluster.session:observed_session")(settings)
        return session
    return exporting.exported(settings.metrics)


# Words into settings


def parse(name: str, words: Sequence[str]) -> tuple[Settings, Any]:
    """Settings and the command's own options from the words after its name. Raises InvalidInput."""
    command = COMMANDS[name]
    kinds = [Settings, *filter(None, [command.options])]
    parser = ArgumentParser(prog=f"hashdist {name}", description=command.help, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(f"--{CONFIG}", action="config")
    parser.add_argument("--json", action="store_true")
    for kind in kinds:
        parser.add_class_arguments(kind)
    try:
        spelled = _spelled(name, words)
        _check_files(spelled, kinds)
        given = parser.instantiate(parser.parse_args(spelled))
    except (ArgumentError, TypeError) as error:
        raise InvalidInput(f"{_plain(error)}; `hashdist {name} --help-all` lists every setting") from error
    return _made(Settings, given), _made(command.options, given) if command.options else None


def _spelled(name: str, words: Sequence[str]) -> list[str]:
    """The words as the parser reads them: each `--full.name=value`. Raises InvalidInput for what has no such name."""
    command, rest = COMMANDS[name], deque(words)
    known = {**command.own, **dict(flags(Settings))}
    spelled, free = [], []
    while rest:
        word = rest.popleft()
        if not _is_flag(word):
            free.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = _full_name(command, flag)
        if flag in SWITCHES:
            spelled.append(f"--{flag}{equals}{value}")
            continue
        if not _is_known(flag, known):
            near = nearest(flag, [*command.own, *command.settings, *SWITCHES, CONFIG]) or nearest(flag, known)
            raise InvalidInput(
                f"unknown setting `{word.partition('=')[0]}`{_hint(near and f'--{near}')}; "
                f"`hashdist {name} --help-all` lists every setting"
            )
        spelled.append(f"--{flag}={value if equals else _value(flag, known.get(flag), rest)}")
    return [*_first(name, free), *spelled]


def _is_flag(word: str) -> bool:
    """Whether a word is a flag: not a value, a lone dash, or a number below zero."""
    return len(word) > 1 and word[0] == "-" and not (word[1].isdigit() or word[1] == ".")


def _full_name(command: Command, flag: str) -> str:
    """`-k` as k, `--dry-run` as dry_run, `--method` as train.method where the command has that section for short."""
    if len(flag) == 2 and flag[1] in command.own:
        return flag[1]
    name = flag[2:].replace("-", "_") if flag.startswith("--") else flag
    taken = {*command.own, *SWITCHES, CONFIG, *(field.name for field in fields(Settings))}
    full = f"{command.short}.{name}"
    return full if command.short and name not in taken and _is_known(full, command.settings) else name


def _is_known(flag: str, known: Mapping[str, Any]) -> bool:
    """Whether it is a setting, a section of settings, or an entry of a setting that is a mapping."""
    flag = flag.removesuffix("+")
    mappings = tuple(f"{name}." for name, hint in known.items() if get_origin(hint) is dict)
    above = any(name.startswith(f"{flag}.") for name in known)
    return flag == CONFIG or flag in known or above or flag.startswith(mappings)


def _value(flag: str, hint: Any, rest: deque[str]) -> str:
    """The value that follows a flag; a flag of a setting that is true or false may stand alone."""
    if hint is bool:
        return rest.popleft() if rest and rest[0].lower() in ("true", "false") else "true"
    if not rest or rest[0].startswith("--"):
        raise InvalidInput(f"--{flag} must be followed by a value, found {rest[0] if rest else 'none'}")
    return rest.popleft()


def _first(name: str, words: Sequence[str]) -> list[str]:
    """The words without dashes as the setting that they stand for: one word, or all of them for a list."""
    if not words:
        return []
    command = COMMANDS[name]
    if not command.first:
        raise InvalidInput(f"`hashdist {name}` takes flags only, found `{words[0]}`; see `hashdist {name} --help`")
    flag = command.first if isinstance(command.first, str) else command.first(words[0])
    if get_origin({**command.own, **command.settings}[flag]) is list:
        return [f"--{flag}={json.dumps(list(words))}"]
    if len(words) > 1:
        raise InvalidInput(f"`hashdist {name}` takes one word without dashes, found {', '.join(words)}")
    return [f"--{flag}={words[0]}"]


def _made(kind: type, given: Namespace) -> Any:
    return kind(**{field.name: given[field.name] for field in fields(kind)})


def _plain(error: Exception) -> str:
    return " ".join(str(getattr(error, "message", error)).split())


def _check_files(words: Sequence[str], kinds: list[type]) -> None:
    """Refuse unknown keys of configuration files by name, with the known ones beside them."""
    for path in [word.partition("=")[2] for word in words if word.startswith(f"--{CONFIG}=")]:
        if not Path(path).is_file():
            raise InvalidInput(f"--config needs a YAML file, found none at {path}")
        try:
            data = yaml.safe_load(Path(path).read_text()) or {}
        except yaml.YAMLError as error:
            raise InvalidInput(f"{path} is not YAML: {_plain(error)}") from error
        if not isinstance(data, dict):
            raise InvalidInput(f"{path} must hold `setting: value` lines, found {type(data).__name__}")
        _check_keys(data, kinds, path, "")


def _check_keys(data: dict[str, Any], kinds: list[type], path: str, prefix: str) -> None:
    known = {field.name: get_type_hints(kind)[field.name] for kind in kinds for field in fields(kind)}
    for key, value in data.items():
        if key not in known:
            near = nearest(str(key), known)
            hint = _hint(near and f"{prefix}{near}")
            raise InvalidInput(f"unknown setting `{prefix}{key}` in {path}{hint}; known: {', '.join(known)}")
        if is_dataclass(known[key]) and isinstance(value, dict):
            _check_keys(value, [known[key]], path, f"{prefix}{key}.")


def _show(result: dict[str, Any], as_json: bool) -> int:
    """Print a result; returns its `exit_code`, which a command sets where what it looked at is not as it must be."""
    code = int(result.pop("exit_code", 0))
    if as_json:
        print(json.dumps({k: v for k, v in result.items() if k != "text"}))  # noqa: T201
    else:
        text = result.get("text") or str(_load("hashdist.commands.results:text")(result))
        print("\n".join(map(plain, text.split("\n"))))  # noqa: T201
    return code
