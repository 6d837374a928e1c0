"""The interface of a backend: everything that a backend's author needs, by one import.

`from attn_dispatch.interface import AttentionBackend, AttentionImpl, ...`; `kit` has the list. To
read the code, start with `backend`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_dispatch.interface.kit import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:  # on first use: a command's --help does not import torch
        return getattr(importlib.import_module("attn_dispatch.interface.kit"), name)
