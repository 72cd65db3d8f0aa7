"""The command line: argv -> settings -> one command -> one result.

Flags and YAML come from the same dataclasses (hashdist/ground/settings.py). Progress goes to stderr; the result goes to
stdout, with --json as exactly one JSON object. Exit codes: 0 done, 2 wrong input, 1 anything else.
"""

import difflib
import importlib
import json
import os
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from hashdist.ground import exporting
from hashdist.ground.errors import HashdistError, InvalidInput
from hashdist.ground.options import (
    CompactOptions,
    CompareOptions,
    ConvertOptions,
    DedupOptions,
    PromoteOptions,
    ProtocolCheckOptions,
    ProtocolOptions,
    PurgeOptions,
    QuickstartOptions,
    ReindexOptions,
    ReportOptions,
    RollbackOptions,
    SearchOptions,
    StorageOptions,
    TagOptions,
    VacuumOptions,
)
from hashdist.ground.progress import plain, say
from hashdist.ground.settings import MetricsSettings, Settings
from hashdist.ground.version import __version__

_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the process that a job was submitted to run."""


@dataclass(frozen=True)
class Command:
    """A command: what it does, and the `module:function` that does it, imported only when it is called.

    The function takes the settings, then `fixed`, then the command's own options if it has any. `first`: the option
    that a first word without dashes stands for.
    """

    help: str
    target: str
    fixed: tuple[str, ...] = ()
    options: type | None = None
    short: str = ""
    """Section whose settings may be given without its name: `--method` for `--train.method`."""
    first: str = ""


def _stage(stage: str, text: str, short: str = "") -> Command:
    return Command(text, "hashdist.stages.pipeline:run_stage", (stage,), short=short)


COMMANDS = {
    "quickstart": Command(
        "real images through every stage, a search, an evaluation, a growth step and a report",
        "hashdist.commands.quickstart:run",
        options=QuickstartOptions,
    ),
    "pipeline": Command("every stage in order, skipping what is committed", "hashdist.stages.pipeline:run_all"),
    "collection": _stage("collection", "list the images and commit the listing"),
    "features": _stage("features", "one feature vector per image, or the user's own features"),
    "graph": _stage("graph", "exact kNN graph of the training sample"),
    "train": _stage("train", "train a hash function", short="train"),
    "encode": _stage("encode", "codes of the whole collection"),
    "index build": _stage("index", "build the sharded index from the codes"),
    "index log": Command("the versions of an index", "hashdist.commands.index:index_log"),
    "index tag": Command(
        "name a version, which then stays", "hashdist.commands.index:index_tag", options=TagOptions, first="name"
    ),
    "index rollback": Command(
        "a new version with the content of an older one",
        "hashdist.commands.index:index_rollback",
        options=RollbackOptions,
    ),
    "index promote": Command(
        "serve the candidate that waits", "hashdist.commands.index:index_promote", options=PromoteOptions
    ),
    "index discard": Command("drop the candidate that waits", "hashdist.commands.index:index_discard"),
    "index verify": Command("read and check every byte of every kept version", "hashdist.commands.index:index_verify"),
    "index vacuum": Command(
        "expire old versions, and delete what nothing needs",
        "hashdist.commands.index:index_vacuum",
        options=VacuumOptions,
    ),
    "index compact": Command(
        "merge small shards and drop deleted rows", "hashdist.commands.index:index_compact", options=CompactOptions
    ),
    "index purge": Command(
        "erase images from all versions and artefacts",
        "hashdist.commands.purge:index_purge",
        options=PurgeOptions,
        first="keys",
    ),
    "search": Command("search by image, key or code", "hashdist.commands.search:run", options=SearchOptions),
    "dedup": Command("clusters of near-duplicates", "hashdist.commands.dedup:dedup", options=DedupOptions),
    "evaluate": _stage("evaluate", "mAP, precision and recall by a protocol"),
    "compare": Command(
        "methods x code lengths x seeds on one protocol: tables and figures",
        "hashdist.commands.compare:run",
        options=CompareOptions,
    ),
    "reindex": Command(
        "index what was added, changed or removed since: what a cron runs",
        "hashdist.reindex.run:reindex",
        options=ReindexOptions,
    ),
    "serve": Command("the search service, with a page: until it is stopped", "hashdist.service.app:serve"),
    "report": Command("one HTML page of a run", "hashdist.commands.report:write", options=ReportOptions),
    "protocol make": Command(
        "write the query, training and database sets of a protocol to a file",
        "hashdist.commands.protocol:protocol_make",
        options=ProtocolOptions,
    ),
    "protocol check": Command(
        "check a protocol file, and that a collection has its images",
        "hashdist.commands.protocol:protocol_check",
        options=ProtocolCheckOptions,
        first="file",
    ),
    "dataset convert": Command(
        "write a data set in its own layout as a parquet collection with labels",
        "hashdist.commands.protocol:dataset_convert",
        options=ConvertOptions,
    ),
    "storage check": Command(
        "prove what a store must do to be written to",
        "hashdist.commands.storage:storage_check",
        options=StorageOptions,
        first="uri",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())  # noqa: T201
        return 0
    if words[0] == "--version":
        print(__version__)  # noqa: T201
        return 0
    as_json = "--json" in words
    try:
        name, rest = _split(words)
        return _show(_run(name, rest), as_json)
    except HashdistError as error:
        say(f"hashdist: {type(error).__name__}: {error}")
        if as_json:
            print(json.dumps({"error": {"kind": type(error).__name__, "message": str(error)}}))  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        say("hashdist: stopped; what is committed stays, and the same command goes on from there")
        return 130


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hashdist COMMAND [--config FILE.yaml] [--json] [--section.setting VALUE ...]",
            "",
            *lines,
            "",
            "`hashdist COMMAND --help` lists every setting. A setting on the command line wins over the file.",
        ]
    )


def _split(words: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one or two words, and what follows it."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            return name, words[count:]
    near = difflib.get_close_matches(" ".join(words[:2]), COMMANDS, 1) or difflib.get_close_matches(words[0], COMMANDS)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    raise InvalidInput(f"no command `{words[0]}`{hint}; the commands are: {', '.join(COMMANDS)}")


def _run(name: str, words: list[str]) -> dict[str, Any]:
    command = COMMANDS[name]
    settings, options = parse(name, words)
    module, function = command.target.split(":")
    call = getattr(importlib.import_module(module), function)
    arguments = [*command.fixed, *([options] if command.options else [])]
    with _observed(settings):
        result: dict[str, Any] = call(settings, *arguments)
    return result


def _observed(settings: Settings) -> AbstractContextManager[object]:
    """While it is open, observations go where the settings say; else into Ray, if this is the process of a Ray job."""
    if _RAY_JOB in os.environ and settings.metrics == MetricsSettings():
        distributed = importlib.import_module("hashdist.stages.cluster.session")
        session: AbstractContextManager[object] = distributed.observed_session(settings)
        return session
    return exporting.exported(settings.metrics)


def parse(name: str, words: Sequence[str]) -> tuple[Settings, Any]:
    """Settings and the command's own options from the words after its name. Raises InvalidInput."""
    command = COMMANDS[name]
    words = _with_first(command, list(words))
    words = _spelled([_long(word, command.short) for word in words], [Settings, *filter(None, [command.options])])
    parser = ArgumentParser(prog=f"hashdist {name}", description=command.help, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object on stdout")
    parser.add_class_arguments(Settings)
    if command.options:
        parser.add_class_arguments(command.options)
    try:
        _check_files(words, [Settings, *([command.options] if command.options else [])])
        given = parser.instantiate(parser.parse_args(list(words)))
    except (ArgumentError, TypeError) as error:
        raise InvalidInput(f"{_plain(error)}; `hashdist {name} --help` lists every setting") from error
    return _made(Settings, given), _made(command.options, given) if command.options else None


def _with_first(command: Command, words: list[str]) -> list[str]:
    """The words before the first flag as the option that they stand for: one word, or all of them for a list."""
    if not command.first or not words or words[0].startswith("-"):
        return words
    assert command.options is not None
    if get_type_hints(command.options)[command.first] is str:
        return [f"--{command.first}", *words]
    count = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    return [f"--{command.first}={json.dumps(words[:count])}", *words[count:]]


def _long(word: str, section: str) -> str:
    """`--method` as `--train.method`, where the command has such a section and no setting of its own of that name."""
    name = word.removeprefix("--").partition("=")[0]
    known = {field.name for field in fields(getattr(Settings(), section))} if section else set()
    own = {"config", "json", *(field.name for field in fields(Settings))}
    return f"--{section}.{word.removeprefix('--')}" if word.startswith("--") and name in known - own else word


def _spelled(words: Sequence[str], kinds: list[type]) -> list[str]:
    """Flags as the dataclasses spell them: `--dry-run` alone stands for `--dry_run=true`."""
    switches = {name for kind in kinds for name in _switches(kind, "")}
    spelled = []
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            name = name.replace("-", "_").replace("__", "--", 1)
            following = words[place + 1] if place + 1 < len(words) else ""
            if not equals and name[2:] in switches and following.lower() not in ("true", "false"):
                equals, value = "=", "true"
        spelled.append(f"{name}{equals}{value}")
    return spelled


def _switches(kind: type, prefix: str) -> Iterator[str]:
    """The settings that are true or false, by full name."""
    for name, hint in get_type_hints(kind).items():
        if hint is bool:
            yield prefix + name
        elif is_dataclass(hint) and isinstance(hint, type):
            yield from _switches(hint, f"{prefix}{name}.")


def _made(kind: type, given: Namespace) -> Any:
    return kind(**{field.name: given[field.name] for field in fields(kind)})


def _plain(error: Exception) -> str:
    return " ".join(str(getattr(error, "message", error)).split())


def _check_files(words: Sequence[str], kinds: list[type]) -> None:
    """Refuse unknown keys of configuration files by name, with the known ones beside them."""
    for place, word in enumerate(words):
        value = word.removeprefix("--config=") if word.startswith("--config=") else None
        path = value if value else words[place + 1] if word == "--config" and place + 1 < len(words) else None
        if path is None:
            continue
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
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean `{prefix}{near[0]}`?" if near else ""
            raise InvalidInput(f"unknown setting `{prefix}{key}` in {path}{hint}; known: {', '.join(known)}")
        if is_dataclass(known[key]) and isinstance(value, dict):
            _check_keys(value, [known[key]], path, f"{prefix}{key}.")


def _show(result: dict[str, Any], as_json: bool) -> int:
    """Print a result; returns its `exit_code`, which a command sets where what it looked at is not as it must be."""
    code = int(result.pop("exit_code", 0))
    if as_json:
        print(json.dumps({k: v for k, v in result.items() if k != "text"}))  # noqa: T201
    else:
        text = result.get("text") or yaml.safe_dump(result, sort_keys=False).rstrip()
        print("\n".join(map(plain, text.split("\n"))))  # noqa: T201
    return code
