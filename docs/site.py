"""What the site has besides the files of docs/: guides that lie beside what they describe, and notebooks as pages.

Links in the guides are written as they lead in the repository, so that they work there too. Here each becomes a link
between pages of the site; one that leads to a file the site does not have is a warning, which `--strict` makes an
error: such a file is named, not linked.
"""

import logging
import posixpath
import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
BESIDE = {
    "README.md": "start.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "cluster/README.md": "machines.md",
    "k8s/README.md": "kubernetes.md",
}
"""Pages of the site by the path in the repository of guides that are not in docs/."""

_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
_ELSEWHERE = re.compile(rb"https://unpkg\.com/[^\"'`]*")
_log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the guides that are not in docs/, and a page for every notebook."""
    for path, page in BESIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(REPOSITORY / path)))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = file.src_uri.removesuffix(".ipynb") + ".md"
        files.append(File.generated(config, page, content=as_markdown(Path(file.abs_src_path or ""))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site, outside of code."""
    here = page.file.src_uri
    folder = posixpath.dirname(next((path for path, to in BESIDE.items() if to == here), f"docs/{here}"))

    def linked(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[1]))
        target = BESIDE.get(path) or path.removeprefix("docs/").replace(".ipynb", ".md")
        if not files.get_file_from_path(target):
            _log.warning("%s links to %s, which is not a page of the site: name it instead", here, path)
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    parts = _CODE.split(markdown)
    return "".join(part if place % 2 else _LINK.sub(linked, part) for place, part in enumerate(parts))


def on_post_build(config: MkDocsConfig) -> None:
    """Take out of the theme's script what it would load from another server for diagrams and old browsers."""
    for script in Path(config.site_dir).glob("assets/javascripts/bundle.*.js"):
        script.write_bytes(_ELSEWHERE.sub(b"", script.read_bytes()))


def as_markdown(notebook: Path) -> str:
    """The cells of a notebook: text as it is, code and what it printed as blocks."""
    cells = nbformat.read(notebook, as_version=4).cells
    return "\n\n".join(cell.source if cell.cell_type == "markdown" else _code(cell) for cell in cells)


def _code(cell: nbformat.NotebookNode) -> str:
    printed = "".join(output.get("text") or output["data"]["text/plain"] for output in cell.outputs)
    shown = f"\n\n```text\n{printed.rstrip()}\n```" if printed else ""
    return f"```python\n{cell.source}\n```{shown}"
