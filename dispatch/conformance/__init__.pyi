from attn_dispatch.conformance.check import Check as Check
from attn_dispatch.conformance.check import Outcome as Outcome
from attn_dispatch.conformance.check import run as run
from attn_dispatch.conformance.suite import Conformance as Conformance
from attn_dispatch.conformance.suite import backend_named as backend_named
from attn_dispatch.conformance.suite import checks_for as checks_for
from attn_dispatch.conformance.suite import verify as verify
