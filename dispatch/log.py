"""The library's logger. It is silent unless the application configures logging.

INFO: which backends a layer is bound to, and why. WARNING: a backend failed and another serves.
"""

from __future__ import annotations

import logging

__all__ = ["logger"]

logger = logging.getLogger("attn_dispatch")
logger.addHandler(logging.NullHandler())
