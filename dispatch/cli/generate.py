"""`attn-dispatch generate`: serve a model of transformers over paged caches."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_dispatch.cli.generate_report import (
    Recorder,
    answer_data,
    loading,
    plot_steps,
    print_answers,
    print_picks,
    print_summary,
    run_data,
)
from attn_dispatch.cli.options import Device, device_to_run_on
from attn_dispatch.cli.output import (
    check_folder,
    make_console,
    print_json,
    progress,
)
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.files import check_writable, read_file

if TYPE_CHECKING:
    import torch

    from attn_dispatch.distributed.context_parallel import ContextParallel
    from attn_dispatch.serving import Engine, Sampling

__all__ = ["generate", "serve"]

#: The largest file of prompts that is read.
_MAX_BYTES = 256 << 20

_DTYPES = ("float32", "float16", "bfloat16")


def generate(
    model: Annotated[
        Path, typer.Option(help="A folder with config.json, weights and tokenizer; or a GGUF file.")
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One prompt per line; or JSON lines with a 'prompt'."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt for all chats.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompts as they are, without chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only the k most likely tokens.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of an answer.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. Default: the model's.")
    ] = None,
    device: Device = None,
    backend: Annotated[
        str | None, typer.Option(help="Override, e.g. REFERENCE or decode=TORCH_SDPA.")
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, fp8, int8_per_token ...")] = "auto",
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 64,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="New tokens of a step. Default: 8192 on a GPU, else 2048."),
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a request. Default: the model's limit.")
    ] = None,
    cache_bytes: Annotated[int | None, typer.Option(min=1, help="Memory of the cache.")] = None,
    draft_tokens: Annotated[
        int,
        typer.Option(min=0, metavar="K", help="Guess up to K tokens from a request's own text."),
    ] = 0,
    compile_layers: Annotated[
        bool,
        typer.Option("--compile", help="Compile the layers: a slower start, faster on a GPU."),
    ] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Make the weights up, to measure the model.")
    ] = False,
    tensor_parallel: Annotated[
        bool, typer.Option("--tensor-parallel", help="Split the model; start it with torchrun.")
    ] = False,
    context_parallel: Annotated[
        int,
        typer.Option(min=1, metavar="W", help="Split the keys over W processes; with torchrun."),
    ] = 1,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the batch size and tokens of each step."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append each answer as a JSON line once it is finished."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON.")] = False,
) -> None:
    """Serve a language model of transformers by continuous batching over paged KV caches.

    One prompt's answer is printed as it is produced; several are printed as they are finished.
    Ctrl-C ends the run and keeps what is there. Exits with 130 then.
    """
    import torch

    from attn_dispatch.bench.plot import check_format
    from attn_dispatch.serving import Limits, Sampling, load_engine

    torch_device = device_to_run_on(device)
    texts = _read_prompts(prompt, prompts)
    if dtype is not None and dtype not in _DTYPES:
        raise InvalidInputError(f"--dtype {dtype} is not one of {', '.join(_DTYPES)}.")
    for path in filter(None, (plot, output)):
        check_folder(path)
        check_writable(path)
    if plot is not None:
        check_format(plot)
    if tensor_parallel and context_parallel > 1:
        raise InvalidInputError("Give --tensor-parallel or --context-parallel, and not both.")
    if tensor_parallel or context_parallel > 1:
        _check_launched()
    limits = Limits(
        max_requests=max_requests,
        max_tokens=None if max_tokens is None else max(max_tokens, max_requests),
        max_seq_len=max_seq_len,
        cache_bytes=cache_bytes,
    )
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        ignore_eos=ignore_eos,
    )
    with loading():
        engine = load_engine(
            model,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=torch_device,
            limits=limits,
            backend=backend,
            kv_cache_dtype=kv_cache_dtype,
            random_weights=random_weights,
            tp_plan="auto" if tensor_parallel else None,
            context_parallel=_ranks(context_parallel, torch_device),
            compile_layers=compile_layers,
            draft_tokens=draft_tokens,
        )
    chats = _as_prompts(engine, texts, system, raw)
    if (tensor_parallel or context_parallel > 1) and torch.distributed.get_rank() != 0:
        engine.generate(chats, sampling)  # all ranks compute the same steps, and one prints
        return
    if not serve(engine, texts, chats, sampling, plot=plot, output=output, as_json=as_json):
        raise typer.Exit(130)


def serve(
    engine: Engine,
    texts: Sequence[str],
    prompts: Sequence[Any],
    sampling: Sampling,
    *,
    plot: Path | None = None,
    output: Path | None = None,
    as_json: bool = False,
) -> bool:
    """Serve prompts, and print the answers, the picks and the speed.

    Args:
        engine: serves them.
        texts: the prompts as they are shown.
        prompts: the same as `Engine.add` takes them.
        sampling: for all of them.
        plot: a file for a plot of the steps.
        output: a file for the answers.
        as_json: print only JSON.

    Returns:
        False if the user interrupted it.
    """
    console = make_console()
    recorder = Recorder(engine)
    streams = len(prompts) == 1 and not as_json
    if not as_json:
        print_picks(console, engine)
    complete = True
    with (
        progress("answers", len(prompts), lines=False) as show,
        appending(output) as write,
        contextlib.closing(engine.stream(prompts, sampling, on_step=recorder.record)) as pieces,
    ):
        try:
            for piece in pieces:
                if streams:
                    print(piece.text, end="", flush=True)
                else:
                    waiting = f"{engine.num_running} running, {engine.num_waiting} waiting"
                    show(waiting, len(engine.finished))
                if piece.request.finish_reason is not None:
                    write(answer_data(engine, texts, piece.request))
        except KeyboardInterrupt:
            complete = False
    if streams:
        print("\n")
    if as_json:
        print_json(run_data(engine, texts, recorder, complete=complete))
    else:
        if not streams:
            print_answers(console, engine, texts)
        print_summary(console, engine, recorder)
    if plot is not None:
        plot_steps(recorder.steps, plot)
    return complete


@contextlib.contextmanager
def appending(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that appends a JSON line to the file. A full disk ends no run."""
    if path is None:
        yield lambda data: None
        return
    failed = False

    def write(data: dict[str, Any]) -> None:
        nonlocal failed
        if failed:
            return
        try:
            file.write(json.dumps(data, ensure_ascii=False) + "\n")
            file.flush()
        except OSError as error:
            failed = True
            why = error.strerror or str(error)
            print(f"warning: {path}: {why}. Answers are only printed now.", file=sys.stderr)

    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        yield write
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _check_launched() -> None:
    from torch import distributed

    if not distributed.is_torchelastic_launched():
        raise InvalidInputError(
            "A model is split over processes that torchrun starts: torchrun --nproc-per-node 2 "
            "--no-python attn-dispatch generate ..."
        )


def _ranks(world: int, device: torch.device) -> ContextParallel | None:
    """The processes that share the keys, which torchrun has started.

    Raises:
        InvalidInputError: there is another number of them.
    """
    if world == 1:
        return None
    from torch import distributed

    from attn_dispatch.distributed.context_parallel import ContextParallel

    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if distributed.get_world_size() != world:
        raise InvalidInputError(
            f"--context-parallel {world}, and torchrun has started {distributed.get_world_size()} "
            "processes. Give the same number."
        )
    return ContextParallel(heads="replicated")


def _read_prompts(prompt: Sequence[str] | None, prompts: Path | None) -> list[str]:
    """The prompts of the flags and the file.

    Raises:
        InvalidInputError: there are none, or the file cannot be read.
    """
    found = list(prompt or ())
    if prompts is not None:
        text = _decoded(read_file(prompts, _MAX_BYTES), prompts)
        lines = [line for line in text.splitlines() if line.strip()]
        found += [_prompt_of_line(line, prompts, i + 1) for i, line in enumerate(lines)]
    if not found:
        where = "" if prompts is None else f"{prompts} has no prompts. "
        raise InvalidInputError(f"{where}Give --prompt TEXT or --prompts FILE.")
    return found


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not a text file in UTF-8: {error.reason}.") from error


def _prompt_of_line(line: str, path: Path, number: int) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, RecursionError) as error:
        raise InvalidInputError(
            f"{path}, line {number}: begins with '{{' and is not a JSON object with a 'prompt'."
        ) from error
    if not isinstance(prompt, str):
        raise InvalidInputError(f"{path}, line {number}: 'prompt' is not a string.")
    return prompt


def _as_prompts(engine: Engine, texts: Sequence[str], system: str | None, raw: bool) -> list[Any]:
    """What the engine takes: chats if the tokenizer has a template, else the texts."""
    if engine.text.tokenizer is None:
        return [list(text.encode()) for text in texts]  # random weights: any ids will do
    if raw or not engine.text.has_chat_template:
        if system is not None:
            raise InvalidInputError("--system needs a chat template, which --raw leaves out.")
        return list(texts)
    before = [] if system is None else [{"role": "system", "content": system}]
    return [[*before, {"role": "user", "content": text}] for text in texts]
