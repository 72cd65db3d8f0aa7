"""Pictures of a collection on pages that commands write."""

import base64
import io

from PIL import Image

from hashdist.collection.collection import Collection, open_collection
from hashdist.collection.decode import BadImage, decode
from hashdist.ground.errors import NotFound
from hashdist.index import Index


def open_pictures(index: Index) -> Collection | None:
    """The collection that the index was built from; None where none is named or it is not there any more."""
    if not index.collection_uri:
        return None
    try:
        return open_collection(index.collection_uri)
    except NotFound:
        return None


def picture_uri(collection: Collection | None, key: str) -> str | None:
    """Where the picture of a key lies; None where the collection is not known."""
    return None if collection is None else collection.picture_uri(key)


def picture_tag(data: bytes | None, side: int = 96) -> str:
    """An <img> with the picture inside it, at most `side` pixels; empty where there is none to show."""
    if data is None:
        return ""
    try:
        image = Image.fromarray(decode(data))
    except BadImage:
        return ""
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'
