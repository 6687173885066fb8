"""Profiles: a trace as XLA writes it for GPUs, made by hand, and what is said of it."""

import gzip
import json

import pytest

from ringjax.benchmarks import profile, trace

SDPA = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0"
PROGRAM = """
HloModule jit_step
  %fusion.1 = bf16[8]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(step)/jvp(feed_forward)/mul" source_line=3}
  ROOT %custom-call.5 = (bf16[8]{0}) custom-call(%p), metadata={op_name="jit(step)/transpose(jvp())/ring/attend/x"}
  %collective-permute-start.2 = bf16[8]{0} collective-permute-start(%p), metadata={op_name="jit(step)/ring/rotate/pp"}
"""


def name(pid: int, text: str, tid: int | None = None) -> dict:
    kind = "process_name" if tid is None else "thread_name"
    return {"ph": "M", "pid": pid, "name": kind, "args": {"name": text}} | ({} if tid is None else {"tid": tid})


def event(pid: int, tid: int, text: str, start: float, duration: float, **arguments) -> dict:
    return {"ph": "X", "pid": pid, "tid": tid, "name": text, "ts": start, "dur": duration, "args": arguments}


def gpu_trace() -> list[dict]:
    """Microseconds: two GPUs alike, compute on one stream, NCCL on another, derived lines, a host.

    compute  |0 sdpa 100|100 gemm 150|       |200 fusion 220|      copy on a third: 150..160
    nccl           |50 ------------ 180|
    """
    events = [name(9, "/host:CPU"), event(9, 1, "Execute", 0, 1000)]
    for pid in (1, 2):
        events += [
            name(pid, f"/device:GPU:{pid - 1} (NVIDIA H100 80GB HBM3)"),
            name(pid, "Stream #13(Compute)", 13),
            name(pid, "Stream #15(Compute)", 15),
            name(pid, "Stream #16(MemcpyD2D)", 16),
            name(pid, "XLA Modules", 20),
            event(pid, 13, SDPA, 0, 100, hlo_op="custom-call.5", hlo_module="jit_step"),
            event(pid, 13, "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", 100, 50, hlo_op="gemm.7"),
            event(pid, 13, "loop_multiply_fusion", 200, 20, hlo_op="fusion.1"),
            event(pid, 15, "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 50, 130,
                  hlo_op="collective-permute-start.2"),
            event(pid, 16, "MemcpyD2D", 150, 10, hlo_op="copy.1"),
            event(pid, 20, "jit_step", 0, 220),
        ]  # fmt: skip
    return events


def test_gpu_kernels_are_read_from_the_streams_alone():
    spans = trace.spans_of(gpu_trace())
    assert len(spans) == 10 and {span.device for span in spans} == {"device:GPU:0", "device:GPU:1"}
    assert {span.thread for span in spans} == {"Stream #13(Compute)", "Stream #15(Compute)", "Stream #16(MemcpyD2D)"}


def test_summary_by_kind_scope_and_kernel():
    found = profile.summarise(trace.spans_of(gpu_trace()), trace.op_names(PROGRAM), top=3)
    assert found.devices == 2
    assert found.span == pytest.approx(0.220) and found.idle == pytest.approx(0.020)  # 180 to 200
    assert {part.name: round(part.ms, 6) for part in found.classes} == {
        "attention": 0.1, "matmul": 0.05, "collectives": 0.13, "copies": 0.01, "fusions": 0.02,
    }  # fmt: skip
    assert [part.name for part in found.classes][0] == "collectives" and found.classes[0].count == 1
    scopes = {part.name: round(part.ms, 6) for part in found.scopes}
    assert scopes["ring/rotate, forward"] == 0.13 and scopes["ring/attend, backward"] == 0.1
    assert scopes["feed_forward, forward"] == 0.02 and scopes["not named"] == 0.06
    assert [part.name[:4] for part in found.kernels] == ["nccl", "cudn", "nvje"]
    assert found.kernels[1].detail == "attention: ring/attend, backward"
    assert found.overlapped == pytest.approx(100 / 130)  # compute runs from 50 to 150 beside it
    text = "\n".join(found.lines())
    assert "0.220 ms on a device, 0.020 ms of it idle. 77 % of the collectives' time" in text
    assert "| attention | 0.100 | 45.5 % | 1 |" in text
    json.dumps(found.plain())


def test_several_calls_are_averaged():
    found = profile.summarise(trace.spans_of(gpu_trace()), {}, calls=2)
    assert found.span == pytest.approx(0.110) and found.classes[0].count == 0.5 and found.scopes == ()


def test_nested_operations_count_once():
    """A TPU's loop encloses its body's operations on the same line."""
    events = [
        name(1, "/device:TPU:0"),
        name(1, "XLA Ops", 3),
        name(1, "Steps", 1),
        event(1, 1, "0", 0, 100),
        event(1, 3, "while.1", 0, 100),
        event(1, 3, "fusion.2", 10, 30),
        event(1, 3, "dot.3", 40, 50),
    ]
    spans = trace.spans_of(events)
    assert {span.name: span.own for span in spans} == {"while.1": 20, "fusion.2": 30, "dot.3": 50}
    found = profile.summarise(spans, {})
    assert found.overlapped is None and {part.name for part in found.classes} == {"fusions", "matmul"}


def test_cpu_devices_share_a_process():
    events = [name(7, "/host:CPU"), name(7, "tf_XLA", 2)]
    events += [event(7, 2, f"dot.{i}", 10 * i, 5, hlo_op=f"dot.{i}", device_ordinal=str(i)) for i in range(2)]
    assert [span.device for span in trace.spans_of([*events, event(7, 2, "python", 0, 100)])] == [
        "host:CPU 0",
        "host:CPU 1",
    ]


@pytest.mark.parametrize(
    "kernel, kind",
    [
        (SDPA, "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1_kernel0_0", "attention"),
        ("void cudnn::fusion::compute_dot_do_o<false, 256, float, __nv_bfloat16, 128>(...)", "attention"),
        ("mosaic_gpu_kernel", "attention"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>(Params)", "matmul"),
        ("gemm_fusion_dot_12", "matmul"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("MemcpyP2P", "collectives"),
        ("collective-permute-done.3", "collectives"),
        ("MemcpyD2D", "copies"),
        ("Memset", "copies"),
        ("loop_convert_fusion_2", "fusions"),
        ("input_reduce_fusion", "fusions"),
        ("wrapped_transpose", "fusions"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert profile.kind_of(kernel) == kind


def test_scopes():
    assert profile.scope_of("") == "not named"
    assert profile.scope_of("jit(step)/optimizer/mul") == "optimizer"
    inner = "transpose(jvp(while))/body/checkpoint/rematted_computation/attention/ring/merge/exp"
    assert profile.scope_of(f"jit(step)/{inner}") == "ring/merge, again"
    assert profile.scope_of("jit(step)/jvp(while)/body/add") == "other, forward"


def test_intervals():
    assert trace.union([(3, 4), (0, 1), (1, 2), (3.5, 5), (7, 7)]) == [(0, 2), (3, 5)]
    assert trace.intersection([(0, 2), (3, 5)], [(1, 4), (4.5, 9)]) == [(1, 2), (3, 4), (4.5, 5)]


def test_the_newest_profile_is_read(tmp_path):
    for index, date in enumerate(("2026_01_01_00_00_00", "2026_01_02_00_00_00")):
        folder = tmp_path / "plugins" / "profile" / date
        folder.mkdir(parents=True)
        path = folder / "host.trace.json.gz"
        with gzip.open(path, "wt") as file:
            json.dump({"traceEvents": gpu_trace() if index else []}, file)
        import os

        os.utime(path, (index, index))
    assert len(trace.read(tmp_path)) == 10


def test_what_cannot_be_read_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .*trace.json.gz under"):
        trace.read(tmp_path)
    (tmp_path / "a.trace.json.gz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a trace"):
        trace.read(tmp_path)
    with pytest.raises(ValueError, match="no kernel of a device"):
        profile.summarise([], {})
    said = []
    assert profile.profiled(tmp_path / "new", lambda: 0, "", said.append, top=3) is None
    assert "no summary of the profile" in said[0]
