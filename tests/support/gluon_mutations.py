"""Changes of Gluon kernels, as the interpreter runs them."""

from __future__ import annotations

import inspect
import textwrap
from unittest import mock

__all__ = ["changed"]


def changed(function, before, after):
    """A context in which a @gluon.jit function, or method, has another text in one place."""
    source = textwrap.dedent(inspect.getsource(function.fn))
    source = source[source.index("def ") :]
    assert source.count(before) == 1, f"{before!r} is {source.count(before)} times in the source"
    names = {}
    code = compile(source.replace(before, after), inspect.getsourcefile(function.fn), "exec")
    exec(code, function.fn.__globals__, names)
    (own,) = names.values()
    return mock.patch.object(function, "fn", own)
