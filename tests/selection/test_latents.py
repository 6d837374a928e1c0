"""Layers of latents are served by backends for latents, and no other layers are."""

from __future__ import annotations

import pytest

from attn_dispatch import Phase, UnsupportedError, resolve
from attn_dispatch.interface.capability import NOT_NONE
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.selection.priorities import BUILTIN
from attn_dispatch.selection.registry import registry
from support.cases import layer_spec
from support.selection import mla_layer

pytestmark = pytest.mark.filterwarnings("ignore:REFERENCE")  # it is slow on a GPU

LAYERS = {
    "latents": mla_layer(),
    "latents, fp8": mla_layer(kv_cache_dtype="fp8_e4m3"),
    "latents, lse": mla_layer(returns_lse=True, num_heads=128),
    "heads": layer_spec(),
    "heads of the latents' size": layer_spec(num_kv_heads=1, head_size=576, head_size_v=512),
}


def takes_latents(name):
    return registry.candidates()[name].loaded_cls.capabilities.fields.get("mla") is NOT_NONE


@pytest.mark.parametrize("phase", [None, Phase.PREFILL, Phase.DECODE])
@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx942", "gfx1100", "cpu"])
@pytest.mark.parametrize("layer", LAYERS)
def test_only_backends_for_latents_serve_them(layer, arch, phase):
    spec = LAYERS[layer]
    picked = resolve(spec, KNOWN_DEVICES[arch], phase=phase).name
    assert takes_latents(picked) is (spec.mla is not None)


@pytest.mark.parametrize("name", BUILTIN)
def test_a_required_backend_of_the_other_kind_is_rejected(name):
    spec = LAYERS["heads" if takes_latents(name) else "latents"]
    with pytest.raises(UnsupportedError, match="mla"):
        resolve(spec, KNOWN_DEVICES["sm90"], backend=name)
