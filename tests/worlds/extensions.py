"""The examples of docs/extend.md, imported as if each were the file that its first line names."""

import atexit
import importlib.util
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

from tests import REPOSITORY

_BLOCK = re.compile(r"^```python\n(# (?P<path>\S+\.py)\n.*?)^```$", re.DOTALL | re.MULTILINE)


def examples() -> dict[str, str]:
    """The text of each example by the path of its file."""
    text = (REPOSITORY / "docs" / "extend.md").read_text()
    return {found["path"]: found[1] for found in _BLOCK.finditer(text)}


@cache
def _folder() -> Path:
    made = tempfile.TemporaryDirectory(prefix="hashdist-extend-")
    atexit.register(made.cleanup)
    return Path(made.name)


@cache
def module(path: str) -> ModuleType:
    """The module of an example, under the name that it would have in the package."""
    name = path.removesuffix(".py").replace("/", ".")
    file = _folder() / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(examples()[path])
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made
