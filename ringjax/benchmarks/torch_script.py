"""Times PyTorch's `context_parallel` on all GPUs: `python torch_script.py REQUEST ANSWER`. Needs PyTorch, not ringjax.

REQUEST is JSON with `cases`; ANSWER gets one line of JSON a case, rotation method (allgather, alltoall) and kernel
(cuDNN, flash), each with the seconds of every run on the slowest GPU and the error of the output against the same
attention on one GPU.
"""

import datetime
import json
import math
import os
import socket
import sys
import time

# Longer sequences aren't held against one GPU's result.
LONGEST_CHECK = 262144
# A relative error beyond this is another function, not another rounding.
NONSENSE = 0.05


def main() -> None:
    import torch

    with open(sys.argv[1]) as file:
        request = json.load(file)
    count = torch.cuda.device_count()
    world = request["devices"] or count
    if not count or world > count:
        raise RuntimeError(f"Error: {world} GPUs asked for, PyTorch {torch.__version__} sees {count}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    torch.multiprocessing.spawn(worker, args=(world, request, sys.argv[2]), nprocs=world)


def worker(rank: int, world: int, request: dict, answer: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.cuda.set_device(rank)
    patience = datetime.timedelta(seconds=180)  # a GPU that failed alone leaves the others waiting
    dist.init_process_group("nccl", rank=rank, world_size=world, timeout=patience)
    mesh = init_device_mesh("cuda", (world,), mesh_dim_names=("cp",))
    try:
        for case in request["cases"]:
            for method in ("allgather", "alltoall") if world > 1 else ("one GPU",):
                for kernel in ("cudnn", "flash"):
                    result = {"case": case, "rotation": method, "kernel": kernel, "devices": world}
                    result["torch"] = torch.__version__
                    try:
                        result.update(measure(rank, world, mesh, case, method, kernel, request))
                    except Exception as error:
                        result["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
                    failed = torch.tensor(float("error" in result), device="cuda")
                    dist.all_reduce(failed)  # a case that failed anywhere failed
                    if failed.item() and "error" not in result:
                        result["error"] = "failed on another GPU"
                    if rank == 0:
                        with open(answer, "a") as file:
                            file.write(json.dumps(result) + "\n")
                    torch.cuda.empty_cache()
    finally:
        dist.destroy_process_group()


def measure(rank: int, world: int, mesh, case: dict, method: str, kernel: str, request: dict) -> dict:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if case["mask"] not in ("causal", "full"):
        raise NotImplementedError(f"context_parallel of scaled_dot_product_attention has no mask {case['mask']!r}")
    causal = case["mask"] == "causal"
    backend = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[kernel]
    torch.manual_seed(0)  # the same whole arrays everywhere
    dtype = getattr(torch, case["dtype"])
    draw = lambda heads, length: torch.randn(  # noqa: E731
        case["batch"], heads, length, case["head_dim"], device="cuda", dtype=dtype
    )
    whole = [draw(n, case["length"]) for n in (case["heads"], case["kv_heads"], case["kv_heads"])]
    # Grouped heads where this version takes them under context_parallel, copies of K and V where it doesn't.
    for grouped in (True, False) if case["heads"] != case["kv_heads"] else (False,):
        copies = 1 if grouped else case["heads"] // case["kv_heads"]
        q, k, v = whole[0].clone(), *(x.repeat_interleave(copies, dim=1) for x in whole[1:])
        options = {"enable_gqa": True} if grouped else {}
        attend = lambda q, k, v, options=options: F.scaled_dot_product_attention(  # noqa: E731
            q, k, v, is_causal=causal, **options
        )
        failure = None
        with sdpa_kernel(backend):
            expected = attend(q, k, v) if case["length"] <= LONGEST_CHECK else None
            with parallel(world, mesh, [q, k, v], causal, method):
                try:  # an exception that leaves the context would leave PyTorch's functions replaced
                    found = timed(attend, q, k, v, case, request)
                except Exception as error:
                    failure = error
        if failure is None and expected is not None:
            mine = own(expected, rank, world, causal)
            found["out_error"] = ((found["out"] - mine).float().norm() / mine.float().norm()).item()
            if not found["out_error"] < NONSENSE:
                failure = ValueError(f"the output is wrong by {found['out_error']:.2g}")
        failed = torch.tensor(float(failure is not None), device="cuda")
        dist.all_reduce(failed)
        if not failed.item():
            break
    else:
        raise failure or RuntimeError("failed on another GPU")
    seconds = torch.tensor(found.pop("seconds"), device="cuda", dtype=torch.float64)
    if world > 1:
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    found.pop("out")
    return {**found, "seconds": seconds.tolist(), "grouped": grouped}


def parallel(world: int, mesh, buffers: list, causal: bool, method: str):
    """PyTorch's context with this rotation; nothing on one GPU."""
    import contextlib

    if world == 1:
        return contextlib.nullcontext()
    from torch.distributed.tensor.experimental import _attention as attention

    attention.set_rotate_method(method)
    for module in (attention, sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")):
        options = getattr(module, "_cp_options", None)
        if options is not None:  # it balances causal work only, and has no public switch
            options.enable_load_balance = causal
    return attention.context_parallel(
        mesh, buffers=buffers, buffer_seq_dims=[2] * len(buffers), no_restore_buffers=set(buffers)
    )


def own(x, rank: int, world: int, causal: bool):
    """This GPU's part of a whole array: under a causal mask a chunk from the front and one from the back."""
    import torch

    if world == 1 or not causal:
        return x.chunk(world, dim=2)[rank]
    chunks = x.chunk(2 * world, dim=2)
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]], dim=2)


def timed(attend, q, k, v, case: dict, request: dict) -> dict:
    """Warm-up, then the seconds a call of each run, as ringjax times itself."""
    import torch
    import torch.distributed as dist

    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    dout = torch.randn_like(out)

    def call():
        out = attend(*inputs)
        if case["kind"] == "both":
            torch.autograd.grad(out, inputs, dout)

    def run(calls: int) -> float:
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(request["warmup"]):
        once = torch.tensor(run(1), device="cuda")
    dist.all_reduce(once, op=dist.ReduceOp.MAX)  # all make as many calls
    calls = max(1, min(64, math.ceil(request["run_seconds"] / once.item())))
    return {"seconds": [run(calls) / calls for _ in range(request["repeats"])], "calls": calls, "out": out.detach()}


if __name__ == "__main__":
    main()
