"""Everything that a backend's author needs, as `attn_dispatch.interface` exports it."""
# ruff: noqa: F403, PLC0414

from attn_dispatch.errors import *
from attn_dispatch.interface.backend import *
from attn_dispatch.interface.batch import *
from attn_dispatch.interface.capability import *
from attn_dispatch.interface.captured import *
from attn_dispatch.interface.contents import *
from attn_dispatch.interface.graphs import *
from attn_dispatch.interface.impl import *
from attn_dispatch.interface.kv_access import *
from attn_dispatch.interface.kv_blocks import *
from attn_dispatch.interface.kv_cache import *
from attn_dispatch.interface.kv_strides import *
from attn_dispatch.interface.kv_view import *
from attn_dispatch.interface.metadata import *
from attn_dispatch.interface.quantization import *
from attn_dispatch.interface.spec import *
from attn_dispatch.interface.types import *
from attn_dispatch.interface.unquantized import *
from attn_dispatch.interface.validation import *
from attn_dispatch.platforms.detect import *
from attn_dispatch.platforms.device import *
from attn_dispatch.platforms.libraries import import_library as import_library
