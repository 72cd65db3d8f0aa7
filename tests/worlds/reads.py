"""Which settings a command reads: settings that note which of their fields the package looks at."""

import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import hashdist

_PACKAGE = str(Path(hashdist.__file__).parent)
_COPIES = ("dataclasses.py", "copy.py")


def watched(settings: Any, read: set[str], prefix: str = "") -> Any:
    """The same settings; the full names of those that the package looks at are added to `read`.

    A setting that is copied into changed settings is not looked at; nor is one that an artefact's name is made without.
    What workers look at is not seen: they get plain settings.
    """
    kind = type(settings)
    names = [field.name for field in fields(kind)]

    class Watched(kind):  # type: ignore[misc,valid-type]
        def __getattribute__(self, name: str) -> Any:
            value = object.__getattribute__(self, name)
            if name in names and not is_dataclass(value) and _looks(sys._getframe(1), kind, name):
                read.add(prefix + name)
            return value

        def __eq__(self, other: object) -> bool:
            """As plain settings are equal; comparing all of them is not looking at one."""
            values = [
                [object.__getattribute__(each, name) for name in names]
                for each in (self, other)
                if isinstance(each, kind)
            ]
            return len(values) == 2 and values[0] == values[1]

        __hash__ = kind.__hash__

        def __reduce__(self) -> Any:
            return kind, tuple(object.__getattribute__(self, name) for name in names)

    values = {name: getattr(settings, name) for name in names}
    return Watched(**{n: watched(v, read, f"{prefix}{n}.") if is_dataclass(v) else v for n, v in values.items()})


def _looks(frame: FrameType | None, kind: type, name: str) -> bool:
    while frame is not None and frame.f_code.co_filename.endswith(_COPIES):
        if frame.f_code.co_name in ("replace", "_replace"):
            return False
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(_PACKAGE):
        return False
    return frame.f_code.co_name != "_identity" or name not in getattr(kind, "RESOURCES", ())
