"""Functions run by several processes over gloo or NCCL, always under a time limit."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback

__all__ = ["run_on_ranks"]

#: Imported once, by the process that the others are forked from.
_PRELOADED = ["torch.distributed", "attn_dispatch.conformance.oracle", "support.preloaded_ranks"]


def _run(rank, world, store, results, timeout_s, backend, function, arguments):
    import torch
    import torch.distributed as dist

    os.environ["ATTN_DISPATCH_TUNING"] = "off"
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    try:
        results.put((rank, function(rank, world, *arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # the other ranks may be gone, and the group would wait for them


def run_on_ranks(
    world, function, *arguments, limit_s=120, timeout_s=30, may_end=(), backend="gloo"
):
    """What function(rank, world, *arguments) returns on each rank, in the order of ranks.

    A rank of `may_end` may end without a result, which is None then. Any other exception, and
    going past limit_s, is an AssertionError.
    """
    # CUDA does not work in a fork of a process that has asked for its devices.
    context = multiprocessing.get_context("spawn" if backend == "nccl" else "forkserver")
    if backend != "nccl":
        context.set_forkserver_preload(_PRELOADED)
    results = context.Queue()
    found, deadline = {}, time.monotonic() + limit_s
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        own = (world, store, results, timeout_s, backend, function, arguments)
        processes = [context.Process(target=_run, args=(rank, *own)) for rank in range(world)]
        try:
            for each in processes:
                each.start()
            while len(found) + len(set(may_end) - found.keys()) < world:
                left = deadline - time.monotonic()
                assert left > 0, f"Only ranks {sorted(found)} of {world} ended in {limit_s} s."
                try:
                    rank, result, error = results.get(timeout=min(left, 0.5))
                except Exception:  # queue.Empty: look whether a process has died
                    dead = [
                        rank
                        for rank, each in enumerate(processes)
                        if each.exitcode and rank not in found and rank not in may_end
                    ]
                    assert not dead, f"Ranks {dead} died without a result."
                    continue
                assert error is None, f"Rank {rank} of {world}:\n{error}"
                found[rank] = result
        finally:
            for each in processes:
                if each.is_alive():
                    each.join(2)
                if each.is_alive():
                    each.kill()
                    each.join()
    return [found.get(rank) for rank in range(world)]
