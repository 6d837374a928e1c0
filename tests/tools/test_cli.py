"""The command line: its text and JSON output, and its errors."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import typer
from typer.testing import CliRunner

from attn_dispatch import __version__
from attn_dispatch.cli import app, doctor, doctor_report, main, spec_flags
from attn_dispatch.environment import VARIABLES
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms import detect, libraries
from attn_dispatch.platforms.device import DeviceMatch
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.timings.store import TuningWarning
from support.paths import CONFIGS
from support.selection import Forbidden, layer, make_backend, registered
from support.timing_tables import FAST_REFERENCE, MEASURED, in_force

LAYER = ["--num-heads", "8", "--num-kv-heads", "2", "--head-size", "64", "--dtype", "bfloat16"]
MLA = ["--num-heads", "16", "--dtype", "bfloat16", "--mla", "512,128,64,128"]


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def run(*args: str, code: int = 0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def answer(*args: str, code: int = 0) -> dict:
    return json.loads(run(*args, "--json", code=code).stdout)


# --- The program itself -------------------------------------------------------------------------


def test_help_lists_the_commands_without_importing_torch():
    text = run("--help").output
    assert all(command in text for command in ("doctor", "explain", "demo"))
    code = "import sys, attn_dispatch.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_version():
    assert run("--version").output == f"attn-dispatch {__version__}\n"


def test_stdout_is_only_json(tmp_path):
    """Even if a library prints during its import, from Python or from native code."""
    noise = "import os\nprint('noise')\nos.write(1, b'noise')\n"
    (tmp_path / "flashinfer.py").write_text(noise)
    (tmp_path / "flash_attn.py").write_text(noise + "raise SystemExit('no driver')")
    program = "from attn_dispatch.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    states = {lib["name"]: lib["state"] for lib in json.loads(done.stdout)["libraries"]}
    assert (states["flashinfer"], states["flash_attn"]) == ("ok", "broken")
    assert done.stderr.count("noise") == 4


# --- Flags --------------------------------------------------------------------------------------

#: Field -> (a flag, the value that it gives).
FLAGS = {
    "num_heads": ("--num-heads 16", 16),
    "head_size": ("--head-size 128", 128),
    "dtype": ("--dtype torch.float16", "float16"),
    "num_kv_heads": ("--num-kv-heads 4", 4),
    "head_size_v": ("--head-size-v 32", 32),
    "kv_cache_dtype": ("--kv-cache-dtype fp8", "fp8"),
    "kv_scales": ("--kv-scales per_head", "per_head"),
    "block_size": ("--block-size 16", 16),
    "kv_cache_layout": ("--kv-cache-layout HND", "HND"),
    "kv_strides": (
        "--kv-layout vllm --block-size 16",
        "one tensor with strides (8192, 512, 256) in bytes",
    ),
    "lengths": ("--lengths upper_bound", "upper_bound"),
    "attn_type": ("--attn-type encoder_only", "encoder_only"),
    "causal": ("--no-causal", False),
    "sliding_window": ("--sliding-window 4096", 4096),
    "window_size": ("--no-causal --window-size 4096,128", [4096, 128]),
    "attention_chunk": ("--attention-chunk 8192", 8192),
    "key_positions": ("--key-positions", True),
    "logits_soft_cap": ("--logits-soft-cap 50", 50.0),
    "alibi": ("--alibi", True),
    "sinks": ("--sinks", True),
    "kv_sharing": ("--kv-sharing", True),
    "custom_mask": ("--custom-mask", True),
    "bidirectional_ranges": ("--bidirectional-ranges", True),
    "mla": (
        "--mla 512,128,64,128",
        {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    ),
    "returns_lse": ("--returns-lse", True),
    "output_quant": ("--output-quant fp8_e4m3", "fp8_e4m3"),
    "batch_invariant": ("--batch-invariant", True),
    "cuda_graph": ("--cuda-graph", True),
}


def test_every_field_has_a_flag():
    command = typer.main.get_command(app).commands["explain"]
    flags = {option for parameter in command.params for option in parameter.opts}
    fields = [field.name for field in dataclasses.fields(AttentionSpec)]
    assert [name for name in fields if spec_flags.flag_name(name) not in flags] == []
    assert list(FLAGS) == fields


@pytest.mark.parametrize("field", FLAGS)
def test_flag_sets_the_field(field):
    flag, value = FLAGS[field]
    basis = MLA if field == "mla" else LAYER
    # Some of these layers have no backend; the test only looks at the spec.
    result = CliRunner().invoke(app, ["explain", *basis, *flag.split(), "--json"])
    assert json.loads(result.stdout)["sections"][0]["spec"][field] == value


def test_new_field_gets_a_flag(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Longer(AttentionSpec):
        temperature: float | None = dataclasses.field(default=None, metadata={"doc": "Of scores."})
        shape: complex = dataclasses.field(default=0j, metadata={"doc": "Of an unknown type."})

    monkeypatch.setattr(spec_flags, "AttentionSpec", Longer)

    def show(**flags: object) -> None:
        print(spec_flags.spec_from_fields(spec_flags.fields_from_flags(flags)))

    program = typer.Typer(add_completion=False)
    program.command()(spec_flags.with_spec_flags(show))
    result = CliRunner().invoke(program, [*LAYER, "--temperature", "0.5", "--shape", "1j"])
    assert "temperature=0.5, shape=1j" in result.output
    assert "Of scores." in CliRunner().invoke(program, ["--help"]).output


#: Arguments of explain -> part of the message.
WRONG = {
    "": "needs --num-heads, --head-size, --dtype. For example",
    "--num-heads 8 --dtype float16": "needs --head-size",
    "--num-heads eight --head-size 64 --dtype float16": "num_heads='eight' is not an integer",
    "--num-heads 8 --head-size 64 --dtype float17": "dtype='float17' is not a floating-point",
    "--num-heads 8 --head-size 64 --dtype int8": "dtype=torch.int8 is not a floating-point",
    "L --attn-type encode": "attn_type='encode' is not one of: decoder, encoder",
    "L --logits-soft-cap 0": "logits_soft_cap=0.0 is not a positive finite number",
    "L --num-kv-heads 3": "num_heads=8 is not a multiple of num_kv_heads=3",
    "L --num-kv-heads none --head-size none": "head_size=None is not an integer",
    "M --mla 512,128": "has 2 of 4 numbers. Give kv_lora_rank,qk_nope_head_dim",
    "M --mla 512,128,64,x": "v_head_dim='x' is not an integer",
    "M --head-size 64": "needs num_kv_heads=1, head_size=kv_lora_rank+qk_rope_head_dim=576",
    "L --device gfx9": "Device 'gfx9' is not known",
    "L --backend TORCH_SPDA": "Did you mean TORCH_SDPA?",
    "L --backend prefil=REFERENCE": "unknown scope 'prefil'. Did you mean prefill?",
    "L --without numpy": "--without numpy: no backend uses such a library",
    "L --without a>b>c": "--without a>b>c: no backend",
    "L --attn-type encoder --phase decode": "No requested layer has a decode phase",
    "L --kv-layout vllm": "the layer has no block_size: give one",
    "L --block-size 16 --kv-layout vlm": "There is no layout 'vlm' of a KV cache. The layouts are",
    "M --block-size 16 --kv-layout vllm": "the layer caches latents",
    "--config nowhere.json": "There is no file nowhere.json",
    "--config CONFIGS": "contains no config.json",
    "--config CONFIGS/llama.json --num-heads 8": "num_heads cannot be given with a config",
}


@pytest.mark.parametrize("args", WRONG)
def test_wrong_values_give_one_line_on_stderr(args, monkeypatch, capsys):
    short = {"L": LAYER, "M": MLA}
    words = [part for word in args.split() for part in short.get(word, [word])]
    words = [word.replace("CONFIGS", str(CONFIGS)) for word in words]
    monkeypatch.setattr(sys, "argv", ["attn-dispatch", "explain", *words])
    with pytest.raises(SystemExit) as exit_:
        main()
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert WRONG[args] in err
    assert err.count("\n") == 1


# --- explain ------------------------------------------------------------------------------------


def test_explain_has_every_pick_and_every_verdict():
    found = answer("explain", *LAYER, "--sinks", "--device", "cpu", "--backend", "decode=REFERENCE")
    prefill, decode = found["sections"][0]["reports"]
    assert (prefill["phase"], prefill["picked"], prefill["source"]) == (
        *("prefill", "REFERENCE", "platform order"),
    )
    assert (decode["picked"], decode["source"]) == ("REFERENCE", "argument")
    verdicts = {verdict["name"]: verdict["reasons"] for verdict in prefill["verdicts"]}
    assert set(verdicts) == registry.names()
    assert verdicts["TORCH_SDPA"][0]["field"] == "sinks"
    assert found["complete"] is True


def test_explain_has_the_dense_backend_of_expanded_prefills(monkeypatch):
    found = answer("explain", *MLA, "--device", "sm90")["sections"][0]
    expanded = found["expanded_prefills"]
    assert (expanded["picked"], expanded["why_absorbed"]) == ("HOPPER_ATTN", "")
    assert expanded["report"]["spec"]["head_size"] == 192
    key = (576 + 16 * (256 + 192)) * 2 + 48
    assert expanded["chunk"] == 2**28 // key
    text = " ".join(run("explain", *MLA, "--device", "sm90").stdout.split())
    assert "returns_lse=True: HOPPER_ATTN, first in the platform's order" in text
    monkeypatch.setenv("ATTN_DISPATCH_BACKEND", "full=TRITON_ATTN,mla=FLASHMLA")
    found = answer("explain", *MLA, "--block-size", "64", "--device", "sm90")["sections"][0]
    assert [report["picked"] for report in found["reports"]] == ["FLASHMLA"] * 2
    assert found["expanded_prefills"]["picked"] == "TRITON_ATTN"


def test_explain_says_why_prefills_are_absorbed():
    window = ["--sliding-window", "9", "--device", "cpu"]
    expanded = answer("explain", *MLA, *window)["sections"][0]["expanded_prefills"]
    assert (expanded["picked"], expanded["report"], expanded["workspace_bytes"]) == (None, None, 0)
    assert "does not compute sliding_window" in expanded["why_absorbed"]
    decode = answer("explain", *MLA, "--phase", "decode", "--device", "cpu")["sections"][0]
    assert decode["expanded_prefills"] is None
    dense = answer("explain", *LAYER, "--device", "cpu")["sections"][0]
    assert dense["expanded_prefills"] is None


def test_explain_exits_with_1_if_no_backend_is_picked():
    found = answer("explain", *MLA, "--alibi", "--device", "cpu", code=1)
    assert found["complete"] is False
    assert [report["picked"] for report in found["sections"][0]["reports"]] == [None, None]
    text = run("explain", *MLA, "--alibi", code=1).stdout
    assert "alibi=True is not supported" in " ".join(text.split())


def test_explaining_another_device_does_not_use_cuda(monkeypatch):
    monkeypatch.setattr(torch, "cuda", Forbidden("torch.cuda"))
    monkeypatch.setattr(torch, "accelerator", Forbidden("torch.accelerator"))
    found = answer("explain", *LAYER, "--device", "gfx942", "--without", "flash-attn")
    assert found["device"]["name"] == "AMD Instinct MI300X"
    assert (found["assumes_libraries"], found["without"]) == (True, ["flash_attn"])
    text = run("explain", *LAYER, "--device", "gfx942", "--without", "flash-attn").stdout
    assert "every optional library is assumed, except flash_attn" in text


def test_without_assumes_that_a_library_is_missing():
    needy = make_backend("NEEDY", requires=("triton>=3", "aiter"))
    with registered(needy):
        args = ("explain", *LAYER, "--device", "gfx942", "--backend", "NEEDY?")
        assert answer(*args)["sections"][0]["reports"][0]["picked"] == "NEEDY"
        report = answer(*args, "--without", "triton")["sections"][0]["reports"][0]
    reasons = {verdict["name"]: verdict["reasons"] for verdict in report["verdicts"]}["NEEDY"]
    assert [(reason["code"], reason["field"]) for reason in reasons] == [("library", "triton")]


def test_explain_one_phase():
    assert len(answer("explain", *LAYER, "--phase", "decode")["sections"][0]["reports"]) == 1


def test_explain_shows_what_keeps_the_fast_kernel_from_a_cache():
    layout = ("--device", "H200", "--backend", "HOPPER_ATTN", "--kv-layout", "SGLang")
    text = " ".join(run("explain", *LAYER, *layout, "--block-size", "1").stdout.split())
    assert "decode: HOPPER_ATTN: decodes run on TRITON_ATTN's kernel, not on the one for" in text
    found = answer("explain", *LAYER, *layout, "--block-size", "1")
    assert [len(report["notes"]) for report in found["sections"][0]["reports"]] == [0, 1]
    found = answer("explain", *LAYER, *layout, "--block-size", "16")
    assert [report["notes"] for report in found["sections"][0]["reports"]] == [[], []]


def test_a_layout_is_that_of_all_layers_with_keys_and_values():
    found = answer("explain", "--config", CONFIGS / "whisper.json", "--block-size", "16",
                   "--device", "cpu", "--kv-layout", "vllm")  # fmt: skip
    laid = {each["name"]: each["spec"]["kv_strides"] for each in found["sections"]}
    assert {name for name, strides in laid.items() if strides is None} == {"encoder"}
    assert set(laid) > {"encoder"}


def test_explain_config():
    path = CONFIGS / "gemma2.json"
    found = answer("explain", "--config", path, "--block-size", "16", "--device", "H200")
    local, full = found["sections"]
    assert (local["name"], local["layers"]) == ("sliding_window", list(range(0, 42, 2)))
    assert (full["spec"]["sliding_window"], full["spec"]["block_size"]) == (None, 16)
    verdicts = {v["name"]: v["reasons"] for v in full["reports"][0]["verdicts"]}
    assert [reason["field"] for reason in verdicts["TORCH_SDPA"]] == ["logits_soft_cap"]


def test_explain_prints_what_all_kinds_of_layer_share_once():
    text = run("explain", "--config", CONFIGS / "gemma3n.json", "--device", "H100").stdout
    assert text.count("Also supported") == 1
    assert text.count("scale 1") == 1
    assert "H100, which is treated as NVIDIA H200 (sm90)" in text
    assert "as the first, with kv_sharing=True\n" in text


@pytest.mark.parametrize("width", [60, 80])
def test_explain_fits_a_narrow_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    command = ["explain", "--config", CONFIGS / "whisper.json", "--phase", "decode"]
    assert max(map(len, run(*command).stdout.splitlines())) <= width
    text = run(*command, "--verbose").stdout
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "encoder_decoder, layers 0-3" in text
    assert "These layers have no decode phase." in text
    assert "attn_type=encoder_decoder is not supported" in " ".join(text.split())


# --- doctor -------------------------------------------------------------------------------------


def test_doctor_shows_everything():
    found = answer("doctor")
    assert {library["name"] for library in found["libraries"]} == set(libraries.LIBRARIES)
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][-1]["arch"] == "cpu"
    backends = {backend["name"]: backend["devices"]["cpu"] for backend in found["backends"]}
    assert set(backends) == registry.names()
    assert backends["REFERENCE"] == {"usable": True, "reasons": []}
    text = run("doctor").stdout
    for words in ("REFERENCE", "torch", *(variable.name for variable in VARIABLES)):
        assert words in text


def test_doctor_shows_a_broken_library_and_continues(site, monkeypatch):
    site.install("flash_attn", "raise OSError('libfa.so: [bold]no[/] such file')", version="2.8.3")
    monkeypatch.setenv("COLUMNS", "60")
    with registered(make_backend("FLASHY", requires=("flash-attn>=2.8",))):
        found = answer("doctor")
        text = " ".join(run("doctor").stdout.split())
    states = {library["name"]: library for library in found["libraries"]}
    assert states["torch"]["state"] == "ok"
    assert states["flash_attn"]["state"] == "broken"
    assert states["flash_attn"]["error"] == "OSError: libfa.so: [bold]no[/] such file"
    assert states["flash_attn"]["needed_by"] == ["ROCM_FLASH_ATTN", "FLASHY"]
    assert "- flash_attn: OSError: libfa.so: [bold]no[/] such file" in text
    verdicts = {backend["name"]: backend["devices"]["cpu"] for backend in found["backends"]}
    assert verdicts["REFERENCE"]["usable"]
    assert not verdicts["FLASHY"]["usable"]


def test_doctor_shows_what_would_help(site):
    site.remove("aiter")
    helped = make_backend("HELPED", requires=("aiter",))
    elsewhere = make_backend("ELSEWHERE", requires=("aiter",), devices=(DeviceMatch(vendor="amd"),))
    assert answer("doctor")["gains"] == []
    assert "Nothing: no backend that runs on these devices lacks a library" in run("doctor").stdout
    with registered(helped, elsewhere):
        gains = answer("doctor")["gains"]
        text = " ".join(run("doctor").stdout.split())
    hint = f"aiter: {libraries.LIBRARIES['aiter'].install}"
    devices = [device["device"] for device in answer("doctor")["devices"]]
    assert gains == [{"do": [hint], "gains": {"HELPED": devices}}]
    assert f"{hint} HELPED on {', '.join(devices)}" in text
    assert "does not run on CPU (cpu); runs on: amd" in text


def test_doctor_with_a_gpu(monkeypatch):
    accelerator = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **kw: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    profiles = {f"cuda:{index}": known_device("H200") for index in (0, 1, 3)}
    profiles |= {"cuda:2": known_device("A100"), "cpu": known_device("cpu")}
    monkeypatch.setattr(detect, "detect_device", profiles.__getitem__)
    hopper = make_backend("HOPPER", devices=(DeviceMatch(archs=("sm90",)),))
    with registered(hopper):
        text = run("doctor").stdout
    assert "NVIDIA H200, 132 SMs, 4.8 TB/s, 50 MiB L2" in " ".join(text.split())
    assert "Backend cuda:0, cuda:1, cuda:3 cuda:2 cpu" in " ".join(text.split())
    assert "- HOPPER on cuda:2: does not run on NVIDIA A100 (sm80)" in text
    assert "- HOPPER on cpu: does not run on CPU (cpu)" in text
    assert doctor_report._range(["cuda:0", "cuda:1"]) == "cuda:0-1"


def test_doctor_warns_where_a_reference_would_serve_a_gpu(monkeypatch):
    accelerator = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **kw: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    h200, triton = known_device("H200"), libraries.Library("triton", "3.6.0")
    bare = h200.with_libraries(*(libraries.Library(name) for name in libraries.LIBRARIES))
    profiles = {"cuda:0": h200.with_libraries(triton), "cuda:1": bare, "cpu": known_device("cpu")}
    monkeypatch.setattr(detect, "detect_device", profiles.__getitem__)
    slow = {(each["device"], each["layers"]): each["backend"] for each in answer("doctor")["slow"]}
    assert slow["cuda:1", "latent attention (MLA)"] == "REFERENCE_MLA"
    assert not {device for device, _ in slow} & {"cuda:0", "cpu"}
    text = " ".join(run("doctor").stdout.split())
    assert "Warning: on cuda:1, latent attention (MLA) goes to REFERENCE_MLA" in text
    assert text.endswith("attn-dispatch explain --config config.json, for a model's picks here.")


def test_doctor_handles_a_backend_that_needs_any_of_several_libraries(monkeypatch):
    accelerator = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **kw: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    triton, flash = libraries.Library("triton", "3.6.0"), libraries.Library("flash_attn", "2.8.3")
    a100 = known_device("A100")
    profiles = {
        "cuda:0": a100.with_libraries(triton),
        "cuda:1": a100.with_libraries(triton, flash),
        "cpu": known_device("cpu"),
    }
    monkeypatch.setattr(detect, "detect_device", profiles.__getitem__)
    found = answer("doctor")
    (flashes,) = (b["devices"] for b in found["backends"] if b["name"] == "FLASH_ATTN")
    assert [where for where, verdict in flashes.items() if verdict["usable"]] == ["cuda:1"]
    messages = " ".join(reason["message"] for reason in flashes["cuda:0"]["reasons"])
    assert "needs flash_attn>=2.6.3,<3 for FlashAttention 2" in messages
    assert "needs vllm>=0.11 for vLLM's FlashAttention 2" in messages
    (todo,) = (gain["do"] for gain in found["gains"] if "FLASH_ATTN" in gain["gains"])
    assert todo[0].startswith("what one of these needs: flash_attn: pip install flash-attn")


def test_doctor_shows_the_tables_in_use(tmp_path, monkeypatch):
    assert answer("doctor")["tables"] == []
    assert "None for these devices: the platform's order decides." in run("doctor").stdout
    path = tmp_path / "times.json"
    in_force(monkeypatch, path, {layer(dtype=torch.float32): FAST_REFERENCE})
    (table,) = answer("doctor")["tables"]
    assert (table["from"], table["measured"], table["layers"]) == (str(path), MEASURED, 1)
    assert "cpu" in table["devices"]
    monkeypatch.setenv("COLUMNS", "200")
    assert f"cpu 1 {MEASURED} {path}" in " ".join(run("doctor").stdout.split())


def test_doctor_survives_a_broken_driver(monkeypatch):
    def broken(**kw: object) -> None:
        raise RuntimeError("the driver is older than the runtime")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", broken)
    devices = answer("doctor")["devices"]
    assert devices[0]["error"] == "RuntimeError: the driver is older than the runtime"
    assert devices[1]["arch"] == "cpu"


def test_doctor_reads_every_environment_variable(monkeypatch):
    assert set(doctor.READERS) == {variable.name for variable in VARIABLES}
    monkeypatch.setenv("ATTN_DISPATCH_BACKEND", "REFERNCE")
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", "maybe")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "TORCH_SDPA")
    monkeypatch.setenv("ATTN_DISPATCH_TUNING", "no-such-table.json")
    monkeypatch.setenv("ATTN_DISPATCH_CACHE_DIR", __file__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)  # each is given once per process
        found = {variable["name"]: variable for variable in answer("doctor")["environment"]}
    assert "Did you mean REFERENCE?" in found["ATTN_DISPATCH_BACKEND"]["error"]
    assert "'maybe' is not understood" in found["ATTN_DISPATCH_CHECK"]["error"]
    assert found["VLLM_ATTENTION_BACKEND"]["value"] == "TORCH_SDPA"
    assert found["VLLM_ATTENTION_BACKEND"]["error"] is None
    assert "no-such-table.json cannot be read" in found["ATTN_DISPATCH_TUNING"]["error"]
    assert "a file. Give a folder" in found["ATTN_DISPATCH_CACHE_DIR"]["error"]
    assert "Did you mean REFERENCE?" in " ".join(run("doctor").stdout.split())
