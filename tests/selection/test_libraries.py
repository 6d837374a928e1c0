"""Optional libraries: missing, old, oddly versioned or broken; selection works in each case."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attn_dispatch
from attn_dispatch.backends.reference.torch_ref import ReferenceImpl
from attn_dispatch.errors import BackendFailure, UnsupportedError
from attn_dispatch.interface.capability import ReasonCode
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.platforms.libraries import (
    LIBRARIES,
    BrokenLibraryWarning,
    Library,
    import_library,
    installed_libraries,
    library_name,
    requirement_problem,
)
from attn_dispatch.runtime.functional import attention
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.selection.resolve import resolve
from attn_dispatch.selection.selector import select
from support.selection import layer, make_backend, registered

OPTIONAL = ["triton", "flash_attn", "flashinfer", "aiter", "transformers"]


def needing(library: str):
    """A backend that would win, if only the library worked."""
    return make_backend("TORCH_SDPA", requires=(library,))


# --- Installed libraries ----------------------------------------------------------------------


def test_presence_and_version_are_found_without_an_import(site):
    site.install("flashinfer", "raise AssertionError('imported')", version="0.4")
    site.install(
        "flash_attn",
        "raise AssertionError('imported')",
        distribution="flash_attn",
        version="2.8.3.post2",
    )
    site.remove("aiter")
    found = {library.name: library for library in installed_libraries()}
    assert found["flash_attn"] == Library("flash_attn", "2.8.3.post2")
    assert found["flashinfer"] == Library("flashinfer", "unknown")  # of an unknown package
    assert found["aiter"] == Library("aiter")


def test_a_record_without_a_version_counts_as_installed(site):
    site.install("triton", version="3.9")
    (record,) = site.path.glob("*.dist-info/METADATA")
    record.write_text("Name: triton\n")
    site.forget("triton")
    assert installed_libraries(["triton"]) == (Library("triton", "unknown"),)


def test_every_library_is_reported_once():
    assert [library.name for library in installed_libraries()] == list(LIBRARIES)


# --- Broken libraries -------------------------------------------------------------------------

ERRORS = {
    "ImportError": "raise ImportError('undefined symbol: _ZN3c10')",
    "OSError": "raise OSError('undefined symbol: _ZN3c10')",
    "RuntimeError": "raise RuntimeError('undefined symbol: _ZN3c10')",
    "SystemExit": "raise SystemExit('undefined symbol: _ZN3c10')",
}


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("error", ERRORS)
def test_a_broken_library_does_not_affect_other_backends(site, name, error):
    site.install(name, ERRORS[error])
    spec = layer()
    (prefill, decode) = attn_dispatch.explain(spec, "cpu")
    assert prefill.picked == decode.picked == resolve(spec, "cpu").name == "TORCH_SDPA"


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("error", ERRORS)
def test_selection_excludes_backends_of_a_broken_library(site, name, error):
    site.install(name, ERRORS[error])
    with registered(needing(name)):
        assert resolve(layer(), "cpu").name == "TORCH_SDPA"
        with pytest.raises(BackendFailure, match=f"{name} cannot be imported here: {error}"):
            import_library(name)
        selection = resolve(layer(), "cpu")
    assert selection.name == "REFERENCE"
    (reason,) = next(v.reasons for v in selection.verdicts if v.name == "TORCH_SDPA")
    assert (reason.code, reason.field) == (ReasonCode.LIBRARY, name)
    assert f"is installed but broken: {error}: undefined symbol: _ZN3c10 (repair it" in str(reason)


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_library_is_a_reason_with_a_remedy(site, name):
    site.remove(name)
    with registered(needing(f"{name}>=1")):
        (report, _) = attn_dispatch.explain(layer(), "cpu")
    assert report.picked == "REFERENCE"
    (reason,) = report.verdicts[0].reasons
    remedy = f"{name}: {LIBRARIES[name].install}"
    assert str(reason) == f"needs {name}>=1: {name} is not installed ({remedy})"


def test_a_missing_library_fails_on_import(site):
    site.remove("aiter")
    with pytest.raises(BackendFailure, match="aiter cannot be imported here: ModuleNotFoundError"):
        import_library("aiter")


def test_a_submodule_that_is_broken_marks_its_library(site):
    site.install("flash_attn", ERRORS["OSError"])
    with pytest.raises(BackendFailure, match=r"flash_attn\.cute cannot be imported"):
        import_library("flash_attn.cute")
    assert detect_device("cpu").library("flash_attn").error == "OSError: undefined symbol: _ZN3c10"


def test_a_library_that_works_is_returned(site):
    site.install("flash_attn", "answer = 42")
    assert import_library("flash_attn").answer == 42
    assert detect_device("cpu").library("flash_attn").usable


def importing(library: str):
    """A backend that would win, and whose impl imports the library when it is built."""

    class Impl(ReferenceImpl):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            import_library(library)

    backend = needing(library)
    backend.get_impl_cls = staticmethod(lambda: Impl)
    return backend


def test_a_layer_falls_back_from_a_broken_library(site):
    site.install("flash_attn", ERRORS["OSError"])
    with (
        registered(importing("flash_attn")),
        pytest.warns(BrokenLibraryWarning, match="flash_attn cannot be imported here"),
    ):
        made = Attention(2, 8, dtype=torch.float32, device="cpu")
    assert {selection.name for selection in made.selections.values()} == {"REFERENCE"}
    assert "installed but broken" in str(made.selections[Phase.DECODE])


def test_the_function_falls_back_from_a_broken_library(site):
    site.install("flash_attn", ERRORS["OSError"])
    query = torch.randn(3, 2, 8)
    with registered(importing("flash_attn")), pytest.warns(BrokenLibraryWarning):
        output = attention(query, query, query)
    torch.testing.assert_close(output, attention(query, query, query, backend="REFERENCE"))


def test_a_required_backend_with_a_broken_library_is_an_error(site):
    site.install("flash_attn", ERRORS["OSError"])
    with (
        registered(importing("flash_attn")),
        pytest.warns(BrokenLibraryWarning),
        pytest.raises(UnsupportedError, match="flash_attn is installed but broken: OSError"),
    ):
        Attention(2, 8, dtype=torch.float32, device="cpu", backend="TORCH_SDPA")


def test_an_interrupt_is_not_swallowed(site):
    site.install("flash_attn", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        import_library("flash_attn")
    assert detect_device("cpu").library("flash_attn").error is None


# --- Requirements -----------------------------------------------------------------------------

MEETS = [
    ("flash-attn>=2.8", "2.8.3.post2"),
    ("flash_attn==2.8.3", "2.8.3+cu12torch2.9"),
    ("triton>=3.6", "3.6.0+git123abc"),
    ("triton>=3.6", "3.7.0rc1"),
    ("triton>=3.6", "3.8.0.dev20260101"),
    ("triton", "0.0.1"),
    ("triton>=3.6", "unknown"),
    ("triton>=3.6", "dev-build"),
    ("triton>=3.6", ""),
]
FALLS_SHORT = [
    ("triton>=3.6", "3.5.1"),
    ("triton>=3.6", "3.6.0rc1"),
    ("flash-attn>=2.8,<3", "3.0.0"),
    ("triton!=3.7.0", "3.7.0"),
]


@pytest.mark.parametrize(("requirement", "version"), MEETS)
def test_a_version_that_meets_the_requirement(requirement, version):
    assert requirement_problem(requirement, Library(library_name(requirement), version)) is None


@pytest.mark.parametrize(("requirement", "version"), FALLS_SHORT)
def test_a_version_that_falls_short(requirement, version):
    problem = requirement_problem(requirement, Library(library_name(requirement), version))
    assert problem == (f"version {version}", f"install {requirement}")


@given(st.text())
def test_selection_accepts_any_version_text(version):
    backend = make_backend("NEEDS_TRITON", requires=("triton>=3.6",))
    device = known_device("cpu").with_libraries(Library("triton", version))
    with registered(backend):
        assert select(layer(), device).name == "TORCH_SDPA"


@pytest.mark.parametrize(
    ("requirement", "module"),
    [
        ("flash_attn>=2.8", "flash_attn"),
        ("flash-attn>=2.8", "flash_attn"),
        ("Flash-Attn", "flash_attn"),
        ("flashinfer-python>=0.4", "flashinfer"),
        ("pytorch-triton-rocm>=3.6", "triton"),
        ("own-kernels", "own_kernels"),
    ],
)
def test_a_requirement_may_name_the_module_or_the_package(requirement, module):
    assert library_name(requirement) == module


def test_a_device_elsewhere_is_assumed_to_have_every_library():
    with registered(make_backend("NEEDY", requires=("triton>=3.6", "own-kernels>=2"))):
        (report, _) = attn_dispatch.explain(layer(), "gfx942", backend="NEEDY")
    assert report.picked == "NEEDY"
