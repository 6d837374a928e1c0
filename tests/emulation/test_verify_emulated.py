"""`verify` on an AMD GPU that is emulated: the command, pytest, and what the CPU is taken for."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch import AttentionSpec, resolve
from attn_dispatch.cli import app
from attn_dispatch.conformance import Check, backend_named, checks_for, run
from attn_dispatch.conformance.emulated import EmulatedDevice
from attn_dispatch.conformance.pytest_plugin import assert_conforms, conformance_checks
from attn_dispatch.emulation import MemoryFault
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.platforms.detect import detect_device, emulated_profile
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from support.compiling import (
    needs_compiler,
    only_where_interpreted,
    passed_where_compiled,
)


@only_where_interpreted
def test_in_a_process_that_compiles():
    assert passed_where_compiled(__file__) >= 8


def run_cli(*arguments):
    done = CliRunner().invoke(app, ["verify", *arguments])
    return done.exit_code, done.output


def test_emulate_excludes_device():
    code, text = run_cli("TRITON_ATTN", "--emulate", "gfx942", "--device", "cpu")
    assert code == 2
    assert "give it or --device, not both" in text


def test_addressing_needs_emulate():
    code, text = run_cli("REFERENCE", "--addressing", "mixed")
    assert code == 2
    assert "give --emulate, too" in " ".join(text.split())


@needs_compiler
def test_targets_that_are_not_emulated_are_rejected():
    code, text = run_cli("TRITON_ATTN", "--emulate", "sm80")
    assert code == 2
    assert "'sm80' is not emulated. The targets are: gfx90a, gfx942" in " ".join(text.split())


@needs_compiler
def test_verify_on_an_emulated_gpu():
    code, text = run_cli("TRITON_ATTN", "--emulate", "gfx942", "--quick", "--only", "layer/eager")
    text = " ".join(text.split())
    assert code == 0, text
    assert "TRITON_ATTN on gfx942 (emulated, buffer addressing): 1 checks, none failed" in text
    launches = re.search(r"gfx942: (\d+) launches, .* wave instructions, \d+ s", text)
    assert int(launches[1]) >= 2  # the cache is written, and attention computed
    assert text.endswith("It is an emulated instruction set, not hardware.")


@needs_compiler
def test_backends_without_triton_kernels_are_reported():
    code, text = run_cli("REFERENCE", "--emulate", "gfx1100", "--quick", "--only", "numbers/plain")
    assert code == 0
    assert "No Triton kernel ran to its end on the emulated gfx1100." in " ".join(text.split())


@needs_compiler
def test_checks_by_pytest_parameters():
    (parameters,) = (
        each
        for each in conformance_checks("TRITON_ATTN", emulate="gfx942", quick=True)
        if each.id == "numbers/plain"
    )
    (check,) = parameters.values
    before = detect_device("cpu")
    assert_conforms(check)
    assert detect_device("cpu") is before


@needs_compiler
def test_checks_that_need_a_gpu_are_skipped():
    device = EmulatedDevice.named("gfx942")
    checks = checks_for(backend_named("TRITON_ATTN"), quick=True, emulate=device)
    captured = [check for check in checks if "capture and replay" in check.name]
    assert captured
    assert {run(check).message for check in captured} == {
        "it needs a PyTorch device of type cuda, and tensors are on the CPU"
    }
    with pytest.raises(InvalidInputError, match="Give a device or one to emulate, not both"):
        checks_for(backend_named("TRITON_ATTN"), "cpu", emulate=device)


@needs_compiler
def test_a_fault_has_its_place_in_the_kernel(monkeypatch):
    def fault(*args, **more):
        error = MemoryFault("an access outside of x_ptr.")
        error.__notes__ = ["the_kernel on gfx942, line 12: global_load_dword"]
        raise error

    device = EmulatedDevice.named("gfx942")
    check = Check("fault", "", AttentionSpec(num_heads=1, head_size=8, dtype=torch.half), fault)
    outcome = run(device.check_on_it(check, backend_named("TRITON_ATTN")))
    assert outcome.status == "failed"
    assert outcome.message == (
        "it raises MemoryFault: an access outside of x_ptr. "
        "(the_kernel on gfx942, line 12: global_load_dword)."
    )


def test_the_cpu_is_taken_for_an_emulated_device_within_a_context():
    profile, before = KNOWN_DEVICES["gfx942"], detect_device("cpu")
    with emulated_profile(profile):
        assert detect_device("cpu") is detect_device(torch.device("cpu")) is profile
        with pytest.raises(KeyError), emulated_profile(KNOWN_DEVICES["gfx90a"]):
            raise KeyError(detect_device("cpu").arch)
        assert detect_device("cpu") is profile
    assert detect_device("cpu") is before


@needs_compiler
def test_selections_are_not_kept_beyond_the_context():
    spec = AttentionSpec(num_heads=4, head_size=64, dtype=torch.float16, block_size=16)
    device = EmulatedDevice.named("gfx942")
    picked = [resolve(spec, "cpu").name]
    with device.running():
        picked.append(resolve(spec, "cpu").name)
    picked.append(resolve(spec, "cpu").name)
    assert picked[1] == "TRITON_ATTN"
    assert picked[0] == picked[2] != "TRITON_ATTN"
