"""Pages that commands write: one HTML file each, with the pictures inside it; nothing is loaded from outside."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image

from hashdist.collection.collection import Collection, open_collection
from hashdist.collection.decode import BadImage, decode
from hashdist.ground.errors import NotFound
from hashdist.index import Index

_SIDE = 96  # most pixels of a picture's side
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
.row{display:flex;flex-wrap:wrap;gap:6px;align-items:flex-start;margin:.6em 0}
figure{margin:0;text-align:center;font-size:11px;color:#555;max-width:12em;overflow-wrap:anywhere}
figure img{width:64px;height:64px;object-fit:contain;image-rendering:pixelated;border:3px solid #bbb}
figure.right img{border-color:#2a9d4a}figure.wrong img{border-color:#d1495b}figure.query img{border-color:#1d4e89}
"""


class Picture(NamedTuple):
    """A picture on a page.

    Attributes:
        data: encoded image; None where there is none to show.
        lines: of text, below it.
        kind: `query`, `right`, `wrong`, or nothing.
    """

    data: bytes | None
    lines: Sequence[str]
    kind: str = ""


def page(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: text of its head and first heading.
        body: HTML.
        style: CSS beside that of pictures.
    """
    title = html.escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}{style}</style>'
    return f'<!doctype html><html lang="en">{head}<h1>{title}</h1>{body}</html>\n'


def side_by_side(pictures: Iterable[Picture]) -> str:
    """HTML of pictures side by side: a query and what is found."""
    return f'<div class="row">{"".join(map(_figure, pictures))}</div>'


def _figure(picture: Picture) -> str:
    caption = "<br>".join(map(html.escape, picture.lines))
    return f'<figure class="{picture.kind}">{picture_tag(picture.data)}<figcaption>{caption}</figcaption></figure>'


def picture_tag(data: bytes | None) -> str:
    """An <img> with the picture inside it, made small; empty where there is none to show."""
    if data is None:
        return ""
    try:
        image = Image.fromarray(decode(data))
    except BadImage:
        return ""
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'


def open_pictures(index: Index) -> Collection | None:
    """The collection that the index was built from; None where none is named or it is not there any more."""
    if not index.collection_uri:
        return None
    try:
        return open_collection(index.collection_uri)
    except NotFound:
        return None
