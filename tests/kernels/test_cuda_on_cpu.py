"""The CPU executors themselves: each rule of the machine they model, on kernels of a few lines."""

import numpy as np
import pytest
import torch

from outrider.kernels.compiler import compile_sources, load_sources
from outrider.kernels.launch_plans import LaunchPlan
from support.cuda_on_cpu.executor import (
    SCHEDULES,
    Executor,
    KernelError,
    Schedule,
    build_unit,
    source_executor,
    translation_unit,
)
from support.cuda_on_cpu.ptx.emitter import translate
from support.cuda_on_cpu.ptx.executor import ptx_executor
from support.cuda_on_cpu.ptx.parser import PtxError, parse_ptx
from support.cuda_on_cpu.replay import replay

LATE, EAGER = Schedule("ascending", eager_copies=False), Schedule("ascending", eager_copies=True)


def small_sources(body, parameters="float* out"):
    text = f'#include "device.cuh"\nKERNEL(64, 1)\nprobe({parameters}) {{ DYNAMIC_SHARED(shared); {body} }}\n'
    return {"device.cuh": load_sources("gather_rows")["device.cuh"], "probe.cu": text}


def plan_of(*arguments, block=64, grid=1, shared_bytes=1024):
    return LaunchPlan("probe", "probe", (grid, 1, 1), block, shared_bytes, arguments)


@pytest.fixture(params=["source", "ptx"])
def build(request):
    """Builds a small kernel for either executor."""

    def make(body, parameters="float* out") -> Executor:
        sources = small_sources(body, parameters)
        if request.param == "source":
            return source_executor({"probe": sources})
        return ptx_executor({"probe": compile_sources("probe", sources, "sm_90a").ptx})

    return make


def test_threads_know_their_place(build):
    out = torch.zeros(3, 64)
    body = "out[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x * 1000.f + threadIdx.x;"
    for schedule in SCHEDULES:
        build(body).launch([plan_of(out.zero_(), grid=3)], schedule)
        assert torch.equal(out, torch.arange(3)[:, None] * 1000.0 + torch.arange(64))


def test_shared_memory_starts_as_nan(build):
    out = torch.zeros(64)
    build("out[threadIdx.x] = ((float*)shared)[threadIdx.x];").launch([plan_of(out)])
    assert out.isnan().all()


def test_a_missing_barrier_shows_in_one_of_the_orders(build):
    body = (
        "float* s = (float*)shared; s[threadIdx.x] = threadIdx.x; {} out[threadIdx.x] = s[63 - threadIdx.x];"
    )
    out, expected = torch.zeros(64), torch.arange(63, -1, -1.0)
    for schedule in SCHEDULES:
        build(body.format("__syncthreads();")).launch([plan_of(out.zero_())], schedule)
        assert torch.equal(out, expected)
    racing = build(body.format(""))
    for schedule in SCHEDULES:
        racing.launch([plan_of(out.zero_())], schedule)
        if not torch.equal(out, expected):
            return
    pytest.fail("no schedule showed the race")


def test_a_warp_operation_that_not_all_lanes_reach_is_a_deadlock(build):
    body = "if (threadIdx.x == 3) out[1] = __shfl_xor_sync(ALL_LANES, out[0], 1); out[0] = 1.f;"
    with pytest.raises(KernelError, match="deadlock: divergent barrier or warp operation; from thread 0"):
        build(body).launch([plan_of(torch.zeros(4))])


def test_warp_sums_stay_in_their_warp(build):
    out = torch.zeros(64)
    build("out[threadIdx.x] = warp_sum(threadIdx.x < 32 ? 1.f : (float)threadIdx.x);").launch([plan_of(out)])
    assert torch.equal(out, torch.tensor([32.0] * 32 + [float(sum(range(32, 64)))] * 32))


def test_copies_land_as_late_as_allowed_or_at_once(build):
    body = """float* s = (float*)shared + 4 * threadIdx.x; s[0] = -1.f;
              copy_async_16(s, in + 4 * threadIdx.x, true); copy_async_commit();
              out[2 * threadIdx.x] = *(volatile float*)s; copy_async_wait<0>();
              out[2 * threadIdx.x + 1] = *(volatile float*)s;"""
    values, out = torch.arange(256.0), torch.zeros(64, 2)
    executor = build(body, "float* out, const float* in")
    executor.launch([plan_of(out, values)], LATE)
    assert torch.equal(out, torch.stack((torch.full((64,), -1.0), values[::4]), dim=1))
    executor.launch([plan_of(out, values)], EAGER)
    assert torch.equal(out, torch.stack((values[::4], values[::4]), dim=1))


def test_a_copy_without_a_source_writes_zeros_and_reads_nothing(build):
    body = """float* s = (float*)shared + 4 * threadIdx.x;
              copy_async_16(s, (const float*)nullptr, false); copy_async_commit(); copy_async_wait<0>();
              out[threadIdx.x] = s[3];"""
    out = torch.ones(64)
    build(body).launch([plan_of(out)])
    assert (out == 0).all()


def test_misaligned_accesses_are_errors(build):
    body = "u32 r[4]; load_matrices(r, shared + 16 * (threadIdx.x & 31) + 4); out[0] = (float)r[0];"
    with pytest.raises(KernelError, match=r"misaligned access \(line \d+, block 0,0,0, thread 0\)"):
        build(body).launch([plan_of(torch.zeros(1))])


def test_tensor_cores_multiply_what_matrix_loads_bring(build):
    """A and B go through shared memory: loads, transposed loads and products must agree about who holds what."""
    body = """if (threadIdx.x >= 32) return;
              bf16* a = (bf16*)shared; bf16* b = a + 256; const int lane = threadIdx.x, m = lane >> 3, r = lane & 7;
              for (int i = lane; i < 256; i += 32) { a[i] = A[i]; b[i] = B[i]; }
              __syncwarp();
              u32 fa[4], fb[4]; float d[4] = {1.f, 1.f, 1.f, 1.f};
              load_matrices(fa, a + ((m & 1) * 8 + r) * 16 + (m >> 1) * 8);
              load_matrices_transposed(fb, b + ((m & 1) * 8 + r) * 16 + (m >> 1) * 8);
              multiply_accumulate((bf16*)0, d, fa, fb[0], fb[1]);
              for (int i = 0; i < 4; i++) out[((lane >> 2) + 8 * (i >> 1)) * 8 + 2 * (lane & 3) + (i & 1)] = d[i];"""
    A, B = (torch.randn(16, 16).bfloat16() for _ in range(2))
    out = torch.zeros(16, 8)
    build(body, "float* out, const bf16* A, const bf16* B").launch([plan_of(out, A, B)])
    torch.testing.assert_close(out, 1 + (A.float() @ B.float())[:, :8], rtol=1e-5, atol=1e-5)


def test_argument_widths_are_those_of_the_signature(build):
    out = torch.zeros(3)
    body = "out[0] = (float)a; out[1] = b; out[2] = (float)(c >> 40);"
    executor = build(body, "float* out, int a, float b, long long c")
    executor.launch([plan_of(out, np.int32(-5), np.float32(0.5), np.int64(3 << 40))])
    assert out.tolist() == [-5, 0.5, 3]


def test_replay_brings_results_back_and_names_what_went_wrong():
    def program(body, sanitizer):
        return build_unit(
            "probe", translation_unit("probe", small_sources(body)), sanitizer, "-Og", alone=True
        )

    out = torch.zeros(64)
    assert replay(program("out[threadIdx.x] = 2.f;", "none"), [plan_of(out)], LATE) == ""
    assert (out == 2).all()
    assert replay(program("out[64 + threadIdx.x] = 2.f;", "address"), [plan_of(out)], LATE).startswith(
        "address"
    )
    assert replay(program("out[threadIdx.x / 2] = threadIdx.x;", "thread"), [plan_of(out)], LATE).startswith(
        "race"
    )


PTX = """.version 8.0
.target sm_90
.address_size 64
.visible .entry probe(.param .u64 probe_param_0)
{{
  .reg .b64 %rd<3>; .reg .b32 %r<4>; .reg .pred %p<2>;
  ld.param.u64 %rd1, [probe_param_0];
  mov.u32 %r1, 0x{x:x};
  {instruction};
  st.global.u32 [%rd1], %r2;
  ret;
}}
"""


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("bfe.u32 %r2, %r1, 8, 12", 0x456),
        ("bfe.s32 %r2, %r1, 28, 4", 0xFFFFFFFF),
        ("bfi.b32 %r2, 5, %r1, 4, 8", 0xF2345058),
        ("prmt.b32 %r2, %r1, 0, 0x0123", 0x785634F2),
        ("shf.l.wrap.b32 %r2, %r1, %r1, 4", 0x2345678F),
        ("shr.s32 %r2, %r1, 40", 0xFFFFFFFF),
        ("shl.b32 %r2, %r1, 32", 0),
        ("popc.b32 %r2, %r1", 16),
        ("clz.b32 %r2, 1", 31),
        ("mul.hi.u32 %r2, %r1, 16", 0xF),
        ("lop3.b32 %r2, %r1, 0xff, 0xf0, 0x96", 0xF2345678 ^ 0xFF ^ 0xF0),
        ("cvt.rzi.s32.f32 %r2, 0fC0200000", 0xFFFFFFFE),  # -2.5
        ("add.rz.f32 %r2, 0f3F800000, 0f33FFFFFF", 0x3F800000),  # 1 + just under 2^-23
        ("cvt.rn.bf16x2.f32 %r2, 0f3F800000, 0f40000000", 0x3F804000),
    ],
)
def test_instructions_follow_the_isa(instruction, expected):
    ptx = PTX.format(x=0xF2345678, instruction=instruction)
    out = torch.zeros(1, dtype=torch.int32)
    ptx_executor({"probe": ptx}).launch([plan_of(out, block=32)])
    assert out.item() & 0xFFFFFFFF == expected


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("fancy.u32 %r2, %r1", "unknown instruction, probe line 9: fancy.u32 %r2, %r1"),
        ("add.sat.s32 %r2, %r1, %r1", "unknown modifier sat"),
        ("add.s32 %r9, %r1, %r1", "register %r9 is not declared"),
        (
            "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {%r2}, {%r1}, {%r1}, {%r1}",
            "mma of these types",
        ),
        ("bar.sync 1", "barrier of another kind"),
        ("ld.const.u32 %r2, [%rd1]", "unknown modifier const"),
    ],
)
def test_what_the_translator_does_not_know_is_an_error(instruction, message):
    with pytest.raises(PtxError, match=message):
        translate(PTX.format(x=1, instruction=instruction), [])


def test_the_parser_keeps_labels_guards_and_operands():
    (kernel,) = parse_ptx(
        PTX.format(x=7, instruction="$L1: @!%p1 bra $L1; mma.x {%r1, %r2}, [%rd1+8]")
    ).kernels
    assert kernel.parameters == ("probe_param_0",)
    assert (kernel.registers["%rd2"], kernel.registers["%p1"]) == (64, 1)
    branch, product = kernel.statements[2:4]
    assert (branch.labels, branch.guard, branch.opcode, branch.operands) == (
        ("$L1",),
        "!%p1",
        "bra",
        ("$L1",),
    )
    assert product.operands == ("{%r1, %r2}", "[%rd1+8]")
