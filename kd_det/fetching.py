"""Finds the files that a user names, on the disk or at a URL; writes nothing outside the cache."""

import os
import re
from urllib.parse import unquote

from detectron2.utils.file_io import PathManager

from kd_det.errors import InputError, UnreadableError, reason

# URL schemes that Detectron2's path manager supports.
SCHEMES = ("http", "https", "ftp", "detectron2", "catalog")


def is_url(path: str) -> bool:
    """Returns whether a path begins with a scheme, such as ``https://``."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path))


def fetch(path: str, key: str) -> str:
    """Returns the local path of a file or URL; downloads a URL unless the cache has it.

    The cache (``$FVCORE_CACHE``, or ``~/.torch/iopath_cache``) names files after their URLs, so that the file of a URL
    with ``..`` could be written anywhere. Such URLs are refused before anything is fetched.

    Args:
        path: A path or URL.
        key: The config key or argument that holds the path, for messages.

    Raises:
        InputError: If the URL is refused.
        UnreadableError: If the path cannot be fetched or does not exist.
    """
    if is_url(path):
        _check_url(path, key)
    try:
        local = PathManager.get_local_path(path)
    except Exception as error:  # Each handler of the path manager raises its own errors.
        raise UnreadableError(f"{key}: {path} cannot be fetched: {reason(error)}") from error
    if not os.path.isfile(local):
        raise UnreadableError(f"{key}: there is no file {path}.")
    return local


def find_file(path: str, key: str) -> str:
    """Fetches a checkpoint by :func:`fetch`; keeps a query at the end, such as ``?matching_heuristics=True``."""
    name, mark, query = path.partition("?")
    return fetch(name, key) + mark + query


def _check_url(url: str, key: str) -> None:
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise InputError(
            f"{key}: {url!r}: {scheme}:// is not supported; give a path, or a URL of {', '.join(SCHEMES)}."
        )
    plain = url
    while plain != unquote(plain):
        plain = unquote(plain)
    # URL parsers drop control characters and blanks, which turns ".\t." into "..".
    if re.search(r"[\x00-\x20\x7f\\]", plain) or ".." in re.split(r"[/?#;=&]", plain):
        raise InputError(
            f"{key}: {url!r} is refused: a URL may not hold '..', backslashes, blanks or control characters."
        )
