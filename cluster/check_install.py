"""Runs what the Dockerfile would install, in a fresh virtual environment: `python check_install.py cpu|gpu [FOLDER]`.

There is no container engine where the project is tested, so this takes the COPY and RUN lines of the stages named
install* in their order, in one build folder and with the environment as PREFIX, and then imports from there what the
image is for. The stages that come after them (Debian packages, the user) are linted only.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKERFILE = Path(__file__).with_name("Dockerfile")

IMPORTS = """
import json, faiss, ray, torch, torchvision
import hashdist
images = torch.rand(2, 3, 64, 64)
features = torchvision.models.resnet18(weights=None).eval()(images).detach().numpy()
index = faiss.IndexFlatIP(features.shape[1])
index.add(features)
binary = faiss.IndexBinaryFlat(64)
binary.add(features.view("uint8")[:, :8].copy())
assert index.ntotal == binary.ntotal == 2
print(json.dumps({m.__name__: m.__version__ for m in (hashdist, torch, torchvision, faiss, ray)}))
"""


def instructions(text: str) -> Iterator[tuple[str, str, str]]:
    """(stage, instruction, arguments) of a Dockerfile, continued lines as one, without comments."""
    stage = ""
    for line in re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stage = rest.rpartition(" AS ")[2] if " AS " in rest else ""
        if word:
            yield stage, word, " ".join(rest.split())


def install(variant: str, folder: Path) -> Path:
    """A virtual environment with what the image of `variant` has; returns its interpreter."""
    build, prefix = folder / "build", folder / "venv"
    build.mkdir(parents=True)
    venv.create(prefix, with_pip=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"VARIANT": variant, "PREFIX": str(prefix), "PATH": f"{prefix}/bin:{os.environ['PATH']}"}
    environment |= {"PIP_QUIET": "2", "PIP_NO_COMPILE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for stage, word, arguments in instructions(DOCKERFILE.read_text()):
        if not stage.startswith("install"):
            continue
        if word == "COPY" and not arguments.startswith("--from="):  # what stages hand on is in the folder already
            *sources, target = arguments.split()
            for source in sources:
                _copy(REPOSITORY / source, build / target)
        elif word == "RUN":
            begun = time.monotonic()
            subprocess.run(["/bin/sh", "-ec", arguments], cwd=build, env=environment, check=True)
            print(f"{time.monotonic() - begun:6.1f} s  {stage}: {arguments}", flush=True)  # noqa: T201
    return prefix / "bin" / "python"


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target / source.name)


def main(variant: str, folder: str = "") -> None:
    """Install, import, say versions and size; a folder of our own is removed."""
    base = Path(folder or tempfile.mkdtemp(prefix="hashdist-image-"))
    try:
        python = install(variant, base)
        done = subprocess.run(
            [python, "-c", IMPORTS], cwd=base, check=True, capture_output=True, text=True, timeout=300
        )
        versions = json.loads(done.stdout.splitlines()[-1])
        shown = subprocess.check_output([python.with_name("hashdist"), "--version"], text=True).splitlines()[0]
        if shown != f"hashdist {versions['hashdist']}":
            raise SystemExit(f"`hashdist --version` must begin with hashdist {versions['hashdist']}, found {shown}")
        size = sum(path.lstat().st_size for path in (base / "venv").rglob("*"))
        print(f"{variant}: {size / 1e9:.1f} GB, {versions}")  # noqa: T201
    finally:
        if not folder:
            shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
