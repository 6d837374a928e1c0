"""Devices: those that are known, those that are detected, and asking about those elsewhere."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import attn_dispatch
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.capability import OneOf, ReasonCode
from attn_dispatch.platforms import detect
from attn_dispatch.platforms.detect import _describe_cuda, detect_device, resolve_device
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.known_devices import ALIASES, KNOWN_DEVICES, known_device
from attn_dispatch.platforms.libraries import LIBRARIES
from attn_dispatch.selection import resolve as selection_resolve
from attn_dispatch.selection.priorities import BUILTIN, LAST_RESORT, PLATFORMS, backend_order
from attn_dispatch.selection.resolve import (
    ReferenceFallbackWarning,
    explain,
    explained_device,
    resolve,
)
from attn_dispatch.selection.selector import select
from support.selection import Forbidden, layer, make_backend, mla_layer, registered


@pytest.fixture(autouse=True)
def _nothing_decided_yet(monkeypatch):
    """No context of selection exists, and no warning was given."""
    monkeypatch.setattr(selection_resolve, "_contexts", {})
    monkeypatch.setattr(selection_resolve, "_warned", set())


# --- Known devices ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
def test_a_known_device_is_found_by_architecture(arch):
    assert known_device(arch).arch == arch


@pytest.mark.parametrize("alias", ALIASES)
def test_a_known_device_is_found_by_product(alias):
    assert known_device(alias.upper()) is KNOWN_DEVICES[ALIASES[alias]]


@pytest.mark.parametrize("name", ["RTX 4090", "rtx_4090", "Rtx4090"])
def test_spellings_of_a_product(name):
    assert known_device(name).arch == "sm89"


def test_an_unknown_device_is_rejected_with_the_known_ones():
    with pytest.raises(InvalidInputError, match=r"'sm75' is not known.*sm80.*gfx942.*cpu.*h200"):
        known_device("sm75")


@pytest.mark.parametrize("profile", KNOWN_DEVICES.values(), ids=KNOWN_DEVICES)
def test_every_known_device_belongs_to_one_platform(profile):
    assert sum(platform.match.matches(profile) for platform in PLATFORMS) == 1


# --- Detection --------------------------------------------------------------------------------

H200_PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block_optin=232448,
    L2_cache_size=62914560,
)
MI300X_PROPERTIES = SimpleNamespace(
    name="AMD Instinct MI300X",
    gcnArchName="gfx942:sramecc+:xnack-",
    major=9,
    minor=4,
    multi_processor_count=304,
)


def test_the_profile_of_an_nvidia_gpu():
    profile = _describe_cuda(H200_PROPERTIES, hip_version=None)
    assert (profile.vendor, profile.arch, profile.capability) == ("nvidia", "sm90", (9, 0))
    assert (profile.name, profile.num_sms) == ("NVIDIA H200", 132)
    assert (profile.shared_memory_bytes, profile.l2_bytes) == (232448, 62914560)


def test_the_profile_of_an_amd_gpu():
    profile = _describe_cuda(MI300X_PROPERTIES, hip_version="7.0")
    assert (profile.vendor, profile.arch, profile.capability) == ("amd", "gfx942", None)
    assert (profile.shared_memory_bytes, profile.l2_bytes) == (None, None)  # this PyTorch is silent


def test_an_unlisted_gpu_gets_a_profile():
    properties = SimpleNamespace(name="NVIDIA T4", major=7, minor=5, multi_processor_count=40)
    profile = _describe_cuda(properties, hip_version=None)
    assert (profile.arch, profile.memory_bandwidth) == ("sm75", None)


def test_detection_adds_the_libraries():
    # The record of the installed package may leave out what the build appends ("+cu130").
    assert torch.__version__.startswith(str(detect_device("cpu").library("torch").version))


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:99", "nonsense", "meta", "cpu:x"])
def test_an_unusable_device_is_an_error_with_a_remedy(name):
    if name.startswith("cuda") and torch.cuda.is_available() and name != "cuda:99":
        pytest.skip("there is a GPU here")
    with pytest.raises(InvalidInputError, match=f"'{name}' cannot be used here.*doctor"):
        detect_device(name)


def test_detecting_a_device_imports_no_backend():
    code = (
        "import sys\nfrom attn_dispatch.platforms.detect import detect_device\n"
        "detect_device('cpu')\n"
        "print([name for name in sys.modules if name.startswith('attn_dispatch.backends')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_default_device_is_looked_up_for_every_decision(monkeypatch):
    resolve(layer())  # remembered, for the CPU
    monkeypatch.setattr(detect, "default_torch_device", lambda: torch.device("xpu"))
    assert resolve(layer()).report.device.arch == "xpu"


def test_a_bare_cuda_means_the_current_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert resolve_device("cuda") == torch.device("cuda:3")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


# --- Sets of devices --------------------------------------------------------------------------

MATCHES = {
    "any device": (DeviceMatch(), set(KNOWN_DEVICES)),
    "amd": (
        DeviceMatch(vendor="amd"),
        {"gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"},
    ),
    "sm89/gfx942": (DeviceMatch(archs=("sm89", "gfx942")), {"sm89", "gfx942"}),
    "nvidia from sm90": (
        DeviceMatch(vendor="nvidia", min_capability=(9, 0)),
        {"sm90", "sm100", "sm120"},
    ),
    "from sm100": (DeviceMatch(min_capability=(10, 0)), {"sm100", "sm120"}),
    "to sm89": (DeviceMatch(max_capability=(8, 9)), {"sm80", "sm86", "sm89"}),
    "nvidia sm90": (
        DeviceMatch(vendor="nvidia", min_capability=(9, 0), max_capability=(9, 0)),
        {"sm90"},
    ),
    "from sm86 to sm90": (
        DeviceMatch(min_capability=(8, 6), max_capability=(9, 0)),
        {"sm86", "sm89", "sm90"},
    ),
}


@pytest.mark.parametrize(("match", "archs"), MATCHES.values(), ids=MATCHES)
def test_a_set_of_devices(match, archs):
    assert {arch for arch, profile in KNOWN_DEVICES.items() if match.matches(profile)} == archs


@pytest.mark.parametrize("words", MATCHES)
def test_a_set_of_devices_in_words(words):
    assert MATCHES[words][0].describe() == words


# --- The order of backends --------------------------------------------------------------------

UNLISTED = [
    DeviceProfile(vendor="nvidia", arch="sm75", name="NVIDIA T4", capability=(7, 5)),
    DeviceProfile(vendor="amd", arch="gfx1030", name="AMD Radeon RX 6800"),
    DeviceProfile(vendor="acme", arch="npu1", name="Acme NPU"),
]


@pytest.mark.parametrize("profile", [*KNOWN_DEVICES.values(), *UNLISTED], ids=lambda p: p.arch)
@pytest.mark.parametrize("phase", [None, *attn_dispatch.Phase], ids=str)
def test_every_backend_is_considered_everywhere_and_the_last_resort_last(profile, phase):
    registered_names = ("NOBODY_NAMED_IT", *BUILTIN)
    order = backend_order(profile, phase, registered_names)
    assert sorted(order) == sorted(registered_names)
    assert order[-len(LAST_RESORT) :] == LAST_RESORT


@pytest.mark.parametrize("profile", UNLISTED, ids=lambda p: p.arch)
def test_an_unlisted_device_is_not_left_with_the_last_resort(profile):
    assert select(layer(), profile).name == "TORCH_SDPA"


# --- Devices that are elsewhere ---------------------------------------------------------------


@pytest.mark.parametrize("name", [*KNOWN_DEVICES, "H200", "MI300X"])
def test_explaining_a_device_elsewhere_touches_no_gpu(name, monkeypatch):
    monkeypatch.setattr(torch, "cuda", Forbidden("torch.cuda"))
    profile = known_device(name)
    nvidia = ["FLASH_ATTN", "TRITON_ATTN"]
    wanted = {"nvidia": nvidia, "amd": ["TRITON_ATTN"] * 2}.get(profile.vendor, ["TORCH_SDPA"] * 2)
    exceptions = {"sm90": ["HOPPER_ATTN"] * 2, "sm100": ["FLASH_ATTN", "FLASHINFER"]}
    wanted = exceptions.get(profile.arch, wanted)
    assert [report.picked for report in explain(layer(), name)] == wanted


def test_explaining_an_unknown_device_is_an_error():
    with pytest.raises(InvalidInputError, match="'sm75' is not known"):
        explain(layer(), "sm75")


def test_a_profile_is_used_unchanged():
    bare = known_device("H200")
    assert select(layer(), bare).name == "TORCH_SDPA"
    assert explain(layer(), bare)[0].picked == "TORCH_SDPA"
    assert explain(layer(), "H200")[0].picked == "HOPPER_ATTN"


def test_a_device_elsewhere_is_assumed_to_have_the_libraries_of_plugins():
    spec = layer(dtype=torch.float64)  # which no backend of ours computes on a GPU but the last
    needy = make_backend("NEEDY", requires=("no_such_library>=2",), dtype=OneOf(torch.float64))
    with registered(needy):
        assert select(spec, known_device("H200")).name == "REFERENCE"
        assert explain(spec, "H200")[0].picked == "NEEDY"


def test_a_device_elsewhere_may_be_explained_without_a_library():
    profile = explained_device("H200", without=["triton"])
    (report, _) = explain(layer(), profile)
    assert report.picked == "TORCH_VARLEN"
    rejected = {verdict.name: verdict.reasons for verdict in report.verdicts}
    for name in ("HOPPER_ATTN", "TRITON_ATTN", "FLASH_ATTN", "FLASHINFER"):
        assert [r.code for r in rejected[name]] == [ReasonCode.LIBRARY]


# --- The warning ------------------------------------------------------------------------------


def test_the_last_resort_on_a_gpu_warns_with_the_reasons():
    with pytest.warns(ReferenceFallbackWarning) as caught:
        resolve(layer(sinks=True), known_device("H200"))
    no_triton, no_flashinfer, no_torch = (
        f"{name} is not installed ({name}: {LIBRARIES[name].install})"
        for name in ("triton", "flashinfer", "torch")
    )
    assert str(caught[0].message) == (
        "REFERENCE serves this layer on NVIDIA H200: right, but slow. "
        "Faster backends were rejected:\n"
        f"  HOPPER_ATTN: needs triton>=3.6,<3.10: {no_triton}\n"
        f"  FLASH_ATTN: needs triton>=3.6: {no_triton}\n"
        f"  TRITON_ATTN: needs triton>=3.6: {no_triton}\n"
        f"  FLASHINFER: needs flashinfer>=0.7.2: {no_flashinfer}\n"
        f"  FLASHINFER: needs triton>=3.6: {no_triton}\n"
        f"  TORCH_VARLEN: needs torch>=2.11: {no_torch}\n"
        "  TORCH_VARLEN: sinks=True is not supported; the backend does not declare it\n"
        "  TORCH_SDPA: sinks=True is not supported; the backend does not declare it"
    )


def test_the_last_resort_warns_once_for_each_cause():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for phase in attn_dispatch.Phase:
            for num_heads in (8, 16):
                spec = layer(sinks=True, num_heads=num_heads)
                resolve(spec, known_device("H200"), phase=phase)
        assert len(caught) == 1
        resolve(layer(returns_lse=True), known_device("H200"))
        assert len(caught) == 2


def test_the_last_resort_for_mla_warns():
    with pytest.warns(ReferenceFallbackWarning, match="REFERENCE_MLA serves this layer on"):
        resolve(mla_layer(), known_device("MI300X"))


@pytest.mark.parametrize(
    ("spec", "device", "backend"),
    [
        (layer(sinks=True), "cpu", None),
        (layer(sinks=True), "sm90", "REFERENCE"),
        (layer(), "sm90", None),
    ],
    ids=["on a CPU", "asked for", "not the last resort"],
)
def test_the_last_resort_gives_no_warning_if_expected(spec, device, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(spec, known_device(device), backend=backend)
