"""Reading a scheduled program: on a small one written by hand, with what goes wrong in real ones."""

import pytest

from ringjax.planning import hlo

# A loop of three hops: `kv` is sent while `attend` runs, `sums` when it is over. Then one more transfer, behind a move.
TEXT = """\
HloModule jit_ring, is_scheduled=true

%fused_computation (param_0: bf16[2,64,8]) -> bf16[64,8] {
  %param_0 = bf16[2,64,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %slice.1 = bf16[1,64,8]{2,1,0} slice(%param_0), slice={[0:1], [0:64], [0:8]}
}

%product (a: f32[64,64]) -> f32[64,64] {
  %a = f32[64,64]{1,0} parameter(0)
  ROOT %dot.1 = f32[64,64]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%unknown (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %more = pred[] compare(%i, %n), direction=LT
}

%condition (state: (s32[], bf16[2,64,8])) -> pred[] {
  %state = (s32[], bf16[2,64,8]) parameter(0)
  %three = s32[] constant(3)
  %counter = s32[] get-tuple-element(%state), index=0
  ROOT %lt = pred[] compare(%counter, %three), direction=LT
}

%body (state.1: (s32[], bf16[2,64,8])) -> (s32[], bf16[2,64,8]) {
  %state.1 = (s32[], bf16[2,64,8]) parameter(0)
  %kv = bf16[2,64,8]{2,1,0} get-tuple-element(%state.1), index=1
  %start = (bf16[2,64,8]{2,1,0:T(8,128)(2,1)}, bf16[2,64,8]{2,1,0}, u32[]{:S(2)}) collective-permute-start(%kv)
  %k = bf16[64,8]{1,0} fusion(%kv), kind=kLoop, calls=%fused_computation
  %prefetch = (bf16[2,64,8]{2,1,0:S(1)}, bf16[2,64,8]{2,1,0}, u32[]) copy-start(%kv)
  %attend = (f32[64,8]{1,0}) custom-call(%k), custom_call_target="tpu_custom_call", metadata={op_name="ring/attend"}
  %done = bf16[2,64,8]{2,1,0} collective-permute-done(%start)
  %start.1 = (f32[64,8]{1,0}, f32[64,8]{1,0}) collective-permute-start(%attend)
  %done.1 = f32[64,8]{1,0} collective-permute-done(%start.1)
  %blocks = (s32[], s32[]) while(%kv), condition=%unknown, body=%product
  ROOT %next = (s32[], bf16[2,64,8]) tuple(%kv, %done)
}

ENTRY %main (x: bf16[2,64,8]) -> bf16[2,64,8] {
  %x = bf16[2,64,8]{2,1,0} parameter(0)
  %loop = (s32[], bf16[2,64,8]) while(%x), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  %start.2 = (bf16[2,64,8]{2,1,0}, bf16[2,64,8]{2,1,0}) collective-permute-start(%x)
  %copy.1 = bf16[2,64,8]{0,1,2} copy(%x)
  %done.2 = bf16[2,64,8]{2,1,0} collective-permute-done(%start.2)
  %start.3 = (f32[64,64]{1,0}, f32[64,64]{1,0}) collective-permute-start(%x)
  %cond = f32[64,64]{1,0} conditional(%x, %x, %x), branch_computations={%product, %fused_computation}
  %done.3 = f32[64,64]{1,0} collective-permute-done(%start.3)
  ROOT %last = bf16[2,64,8]{2,1,0} collective-permute(%done.2), source_target_pairs={{0,1}}
}
"""


# A rotation of which one pair crosses to the other slice, and a sum over slices, which is no rotation.
TWO_SLICES = """\
HloModule jit_ring, is_scheduled=true

ENTRY %main (x: bf16[2,64]) -> bf16[2,64] {
  %x = bf16[2,64]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[2,64]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="ppermute.5_0",_xla_megascale_transfer_type="ONE_TO_ONE"}
  %recv = (bf16[2,64]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="ppermute.5_0",_xla_megascale_transfer_type="ONE_TO_ONE"}
  %start = (bf16[2,64]{1,0}, bf16[2,64]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1}}
  %done = bf16[2,64]{1,0} collective-permute-done(%start)
  %attend = (bf16[2,64]{1,0}) custom-call(%x), custom_call_target="tpu_custom_call"
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %came = (bf16[2,64]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  %recv.1 = (f32[8]{0}, u32[], token[]) recv(%token), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %last = bf16[2,64]{1,0} select(%done, %came)
}
"""


def test_a_rotation_between_slices_goes_by_the_network():
    inside, across = sorted(hlo.Program(TWO_SLICES).transfers(), key=lambda transfer: transfer.across)
    assert (inside.across, inside.hidden) == (False, False)
    assert (across.across, across.hidden, across.scope, across.shape) == (True, True, "ppermute.5_0", (2, 64))


@pytest.fixture(scope="module")
def program() -> hlo.Program:
    return hlo.Program(TEXT)


def test_what_each_transfer_is_hidden_behind(program):
    found = [(x.dtype, x.shape, x.times, [line.name for line in x.behind]) for x in program.transfers()]
    assert sorted(found) == [
        ("bf16", (2, 64, 8), 1, []),  # the last one, of one instruction
        ("bf16", (2, 64, 8), 1, []),  # a copy is no work that would be done anyway
        ("bf16", (2, 64, 8), 3, ["attend"]),  # in the loop, behind the kernel
        ("f32", (64, 8), 3, []),  # started when the kernel was over
        ("f32", (64, 64), 1, ["cond"]),  # behind a conditional one of whose branches computes
    ]
    assert {x.hidden for x in program.transfers() if x.behind} == {True}
    assert [x.bytes for x in program.transfers() if x.shape == (64, 64)] == [16384]


def test_scope_and_called(program):
    lines = {line.name: line for part in program.computations.values() for line in part}
    assert lines["attend"].scope == "ring/attend" and lines["attend"].is_kernel
    assert lines["cond"].called == ["product", "fused_computation"]
    assert sorted(lines["loop"].called) == ["body", "condition"]


@pytest.mark.parametrize("target, kernel", [
    ("tpu_custom_call", True), ("mosaic_gpu_v2", True), ("__cudnn$fmhaSoftmaxBackward", True), ("__cublas$gemm", True),
    ("Sharding", False), ("AllocateBuffer", False),
])  # fmt: skip
def test_kernels(program, target, kernel):
    line = hlo.Instruction("call", "f32[8]", "custom-call", f'%x), custom_call_target="{target}"')
    assert line.is_kernel == kernel == program.computes(line)


def test_how_often_a_loop_runs(program):
    lines = {line.name: line for part in program.computations.values() for line in part}
    assert program.trips(lines["loop"]) == 3
    assert program.trips(lines["blocks"]) is None  # its count is data
    known = lines["blocks"].rest + ', backend_config={"known_trip_count":{"n":"5"}}'
    assert program.trips(hlo.Instruction("w", "s32[]", "while", known)) == 5


def test_copied_counts_slices_and_copies_but_not_moves_to_fast_memory(program):
    assert program.copied("bf16", {64 * 8}) == 3 * 1024  # the slice, in each of three hops
    assert program.copied("bf16", {2 * 64 * 8}) == 2048  # copy.1; not the prefetch
    assert program.copied("f32", {64 * 8}) == 0


def test_arrays_and_their_size():
    assert hlo.arrays("(f32[2,3]{1,0:T(8,128)}, pred[], u8[4])") == [("f32", (2, 3)), ("pred", ()), ("u8", (4,))]
    assert hlo.size("bf16", (3, 5)) == 30 and hlo.size("pred", (7,)) == 7


def test_a_transfer_that_is_not_awaited_is_an_error():
    with pytest.raises(ValueError, match="start.2 is not awaited"):
        hlo.Program(TEXT.replace("collective-permute-done(%start.2)", "copy(%x)")).transfers()
