"""Registration with Hugging Face transformers: the names under which a config finds the wrapper."""

from __future__ import annotations

import os

from .flash_attention_triton_sink import attention_forward, attention_mask
from .integrations.continuous_batching import PREFIX

NAME = "triton_attention_sink"
ALIAS = f"/{NAME}"  # for hosts that take a name of their own list or anything with a slash, as Axolotl does
MINIMUM = "4.57"
FOLDER = os.path.dirname(os.path.abspath(__file__))
# transformers 5 searches names for these words and replaces the attention of a name that contains one.
_REWRITTEN = ("flash", "sdpa", "flex")


def register() -> tuple[str, ...]:
    """Make ``attn_implementation=NAME``, and this package's folder as a path, known to transformers. Idempotent.

    Returns:
        The names registered: ``triton_attention_sink``, the same with a slash before it, then the folder as it was
        imported and as its real path, each with and without a trailing slash, unless ``path_problem`` holds against it.

    Raises:
        ImportError: transformers is missing, or older than 4.57 (no mask interface).
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"transformers must be installed and >= {MINIMUM}, got {_installed()}: {error}") from error
    names = registered_names()
    for name in (*names, PREFIX + NAME):  # the last: what continuous batching asks for, in some versions
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, attention_mask)
    return names


def registered_names() -> tuple[str, ...]:
    """The names that ``register`` registers, without doing so."""
    folders = dict.fromkeys((FOLDER, os.path.realpath(FOLDER)))
    paths = (path for folder in folders for path in (folder, folder + os.sep))
    return (NAME, ALIAS, *(path for path in paths if path_problem(path) is None))


def path_problem(path: str) -> str | None:
    """Why a folder cannot stand in ``attn_implementation``, or None if transformers takes it as written."""
    if not os.path.isabs(path):
        return f"attn_implementation must be an absolute path, got {path!r}: transformers takes others for a Hub name"
    for word in _REWRITTEN:
        if word in path:
            return f"a path in attn_implementation must not contain {word!r}, got {path!r}: transformers rewrites it"
    if "|" in path:
        return f"a path in attn_implementation must not contain '|', got {path!r}: transformers splits it there"
    return None


def _installed() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers")
    except PackageNotFoundError:
        return "none"
