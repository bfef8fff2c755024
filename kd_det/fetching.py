"""Finds the files that a user names, on the disk or behind a URL; nothing is written outside the cache."""

import os
import re
from urllib.parse import unquote

from detectron2.utils.file_io import PathManager

from kd_det.errors import InputError, UnreadableError, reason

# Those of Detectron2's path manager.
SCHEMES = ("http", "https", "ftp", "detectron2", "catalog")


def is_url(path: str) -> bool:
    """Whether a path names its scheme, such as ``https://``."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path))


def fetch(path: str, key: str) -> str:
    """Return the local path of a file or URL, which is downloaded unless the cache has it.

    The cache (``$FVCORE_CACHE``, or ``~/.torch/iopath_cache``) names its files as their URLs do, so that what a URL
    with ``..`` names could be written anywhere. Such URLs are refused before anything is fetched.

    Args:
        path: A path or URL.
        key: The config key or argument that names it, for messages.

    Raises:
        InputError: If the URL is refused.
        UnreadableError: If it cannot be fetched, or there is no such file.
    """
    if is_url(path):
        _check_url(path, key)
    try:
        local = PathManager.get_local_path(path)
    except Exception as error:  # Each handler of the path manager has its own.
        raise UnreadableError(f"{key}: {path} cannot be fetched: {reason(error)}") from error
    if not os.path.isfile(local):
        raise UnreadableError(f"{key}: there is no file {path}.")
    return local


def find_file(path: str, key: str) -> str:
    """:func:`fetch` a checkpoint; a query behind its path, such as ``?matching_heuristics=True``, is kept."""
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
    # Control characters and blanks are dropped by URL parsers, which turns "./." with a tab into "..".
    if re.search(r"[\x00-\x20\x7f\\]", plain) or ".." in re.split(r"[/?#;=&]", plain):
        raise InputError(
            f"{key}: {url!r} is refused: a URL may not hold '..', backslashes, blanks or control characters."
        )
