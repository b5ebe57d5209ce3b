"""The Python entries: what they check, and that torch.compile can trace the operators behind them."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from outrider.kernels.add_rms_norm import add_rms_norm, add_rms_norm_op
from outrider.kernels.attention_cases import (
    ATTENTION_CASES,
    AttentionCase,
    attention_in_float64,
    build_attention_inputs,
)
from outrider.kernels.gather_rows import gather_rows, gather_rows_op
from outrider.kernels.int4_cases import INT4_CASES, prepare_int4_matmul
from outrider.kernels.int4_matmul import (
    int4_matmul,
    int4_matmul_op,
    packed_in_tiles,
    unpacked_tiles,
)
from outrider.kernels.kv_commit import kv_commit, kv_commit_op
from outrider.kernels.narrow_cases import NARROW_CASES, TOLERANCE, prepare_narrow_matmul
from outrider.kernels.narrow_matmul import narrow_matmul, narrow_matmul_op
from outrider.kernels.noise import noise_key
from outrider.kernels.rope_append import rope_append, rope_append_op
from outrider.kernels.round_rows import round_rows, round_rows_op
from outrider.kernels.sample_shard import AskedRows, sample_shard_op
from outrider.kernels.silu_mul import silu_mul, silu_mul_op
from outrider.kernels.tree_attention import tree_attention, tree_attention_op

CASE = AttentionCase("entry", (21, 3), (5, 2), page_size=4)


@pytest.fixture
def attention():
    """Arguments of tree_attention; unused pages are NaN."""
    inputs = build_attention_inputs(CASE)
    return {
        "q": inputs.q,
        "k_pages": inputs.k_pages,
        "v_pages": inputs.v_pages,
        "batch": inputs.batch,
        "scale": CASE.scale,
    }


@pytest.fixture
def rope():
    """Arguments of rope_append for three nodes."""
    shape = {"q": (3, 4, 64), "k": (3, 2, 64), "v": (3, 2, 64), "cos": (3, 32), "sin": (3, 32)}
    tensors = {name: torch.randn(size).bfloat16() for name, size in shape.items()}
    pages = {name: torch.zeros(2, 4, 2, 64).bfloat16() for name in ("k_pages", "v_pages")}
    return {**tensors, "kv_rows": torch.tensor([0, 3, 7]), **pages}


@pytest.mark.parametrize("use_kernel", [False, True])
def test_attention_agrees_with_float64_by_the_reference_and_by_the_operator(attention, use_kernel):
    expected = attention_in_float64(CASE, build_attention_inputs(CASE))
    error = (tree_attention(**attention, use_kernel=use_kernel).double() - expected).norm() / expected.norm()
    assert error < 4e-3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda q: q[..., :32], r"k_pages must be \[P, 4, HK, D\], got .*; D is 32 in q"),
        ("q", lambda q: q[:3], r"ancestors must be \[NQ, W\], got \[7, 1\]; NQ is 3 in q"),
        ("q", lambda q: q[:, :7], "q has 7 heads, which 2 KV heads of k_pages do not divide"),
        ("k_pages", lambda k: k[:, :3], "3 where 4 must be"),
        ("v_pages", lambda v: v[:, :, :1], "HK is 2 in k_pages"),
    ],
)
def test_attention_names_the_argument_that_disagrees(attention, name, change, message):
    with pytest.raises(ValueError, match=message):
        tree_attention(**{**attention, name: change(attention[name])})


def test_the_attention_kernel_says_what_it_cannot_take(attention):
    floats = {name: attention[name].float() for name in ("q", "k_pages", "v_pages")}
    with pytest.raises(ValueError, match=r"q is torch\.float32 of head size 64, the kernel takes"):
        tree_attention(**{**attention, **floats}, use_kernel=True)
    mixed = {**attention, "v_pages": attention["v_pages"].half()}
    with pytest.raises(ValueError, match=r"v_pages must be torch\.bfloat16, got torch\.float16"):
        tree_attention(**mixed, use_kernel=True)
    mixed["k_pages"] = attention["k_pages"].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"v_pages must be torch\.float8_e4m3fn, got torch\.float16"):
        tree_attention(**mixed, use_kernel=True)


def test_rope_append_names_the_argument_that_disagrees(rope):
    with pytest.raises(ValueError, match=r"cos must be \[N, 32\], got \[3, 16\]; 16 where 32 must be"):
        rope_append(**{**rope, "cos": rope["cos"][:, :16]})
    with pytest.raises(ValueError, match="N is 3 in q"):
        rope_append(**{**rope, "kv_rows": rope["kv_rows"][:2]})
    with pytest.raises(ValueError, match=r"kv_rows must be torch\.int64, got torch\.int32"):
        rope_append(**{**rope, "kv_rows": rope["kv_rows"].int()}, use_kernel=True)
    with pytest.raises(ValueError, match="q must have its heads side by side"):
        rope_append(**{**rope, "q": torch.randn(3, 4, 128).bfloat16()[..., :64]}, use_kernel=True)


def test_kv_commit_names_the_argument_that_disagrees():
    kv, rows = torch.zeros(1, 2, 3, 4, 2, 8), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"target_rows must be \[M\], got \[1\]; M is 2 in source_rows"):
        kv_commit(kv, rows, rows[:1])
    with pytest.raises(ValueError, match="source_rows has 9000 rows, the kernel takes 6144"):
        kv_commit(
            kv, torch.zeros(9000, dtype=torch.int64), torch.zeros(9000, dtype=torch.int64), use_kernel=True
        )


def test_gather_rows_names_the_argument_that_disagrees():
    with pytest.raises(ValueError, match=r"index must be \[M\]"):
        gather_rows(torch.zeros(3, 4), torch.zeros(1, 1, dtype=torch.int64))


def test_the_kernels_of_rows_name_the_argument_that_disagrees():
    rows, weight = torch.zeros(3, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"added must be \[N, width\], got \[2, 4\]; N is 3 in hidden"):
        add_rms_norm(rows, rows[:2], weight, 1e-6)
    with pytest.raises(ValueError, match=r"hidden is torch.float64, the kernel takes torch.bfloat16"):
        add_rms_norm(*(x.double() for x in (rows, rows, weight)), 1e-6, use_kernel=True)
    with pytest.raises(ValueError, match=r"weight must be torch.float32, got torch.bfloat16"):
        add_rms_norm(rows, rows, weight.bfloat16(), 1e-6, use_kernel=True)
    with pytest.raises(ValueError, match="as many gates as ups, got 3 columns"):
        silu_mul(rows[:, :3])
    numbers = (math.inf, 1e-6)
    with pytest.raises(ValueError, match=r"x is torch\.float64, the kernel takes torch\.bfloat16"):
        round_rows(rows.double(), 4, *numbers, None, False, use_kernel=True)
    with pytest.raises(ValueError, match="width must be from 1 to all of x's 4 columns, got 5"):
        round_rows(rows, 5, *numbers, None, False)
    with pytest.raises(ValueError, match="width must be all of x's 4 columns, got 2"):
        round_rows(rows, 2, *numbers, 0.5, False)


@pytest.mark.parametrize("case", NARROW_CASES, ids=lambda case: case.name)
def test_the_reference_multiplies_as_the_kernel_does(case):
    prepared = prepare_narrow_matmul(case, torch.device("cpu"))
    x, weight, x_scales, weight_scales, bias = prepared.plans[0].arguments[:5]
    (check,) = prepared.checks
    out = narrow_matmul(x, x_scales, weight, weight_scales, case.group or case.in_features, bias)
    assert replace(check, actual=out).error() <= TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 48)}, r"weight must be \[O, K\], got \[5, 64\]; K is 48 in x"),
        ({"x_scales": torch.ones(2, 1)}, r"x_scales must be \[N, GX\], got \[2, 1\]; N is 3 in x"),
        ({"weight_scales": torch.ones(5, 3)}, "weight_scales has 3 columns, there are 1 groups of 64"),
        ({"bias": torch.ones(4)}, r"bias must be \[O\], got \[4\]; O is 5 in weight"),
        ({"x": torch.zeros(65, 64).bfloat16()}, "x has 65 rows, the kernel takes 64"),
        ({"x": torch.zeros(3, 64)}, r"x must be torch.bfloat16, got torch.float32"),
        ({"x": torch.zeros(3, 64).to(torch.float8_e4m3fn)}, "x is torch.float8_e4m3fn with 0 scales"),
        ({"bias": torch.ones(5)}, r"bias must be torch.bfloat16, got torch.float32"),
        (
            {"weight": torch.zeros(5, 64, dtype=torch.uint8)},
            r"weight is torch.uint8 with 64 columns .* takes FP8",
        ),
        ({"group": 32, "weight_scales": torch.ones(5, 2)}, "scales for 32: the kernel takes"),
    ],
)
def test_the_product_names_the_argument_that_does_not_fit(changes, message):
    fits = {
        "x": torch.zeros(3, 64).bfloat16(),
        "x_scales": torch.empty(0),
        "weight": torch.zeros(5, 64, dtype=torch.int8),
        "weight_scales": torch.ones(5, 1),
        "group": 64,
        "bias": torch.empty(0),
    }
    assert not narrow_matmul(**fits, use_kernel=True).any()
    with pytest.raises(ValueError, match=message):
        narrow_matmul(**{**fits, **changes}, use_kernel=True)


@pytest.mark.parametrize("case", INT4_CASES, ids=lambda case: case.name)
def test_the_reference_multiplies_4_bits_as_the_kernel_does(case):
    prepared = prepare_int4_matmul(case, torch.device("cpu"))
    x, packed, of_groups, bias = prepared.plans[0].arguments[:4]
    (check,) = prepared.checks
    out = int4_matmul(x, packed, of_groups, case.group, case.out_features, bias)
    assert replace(check, actual=out).error() <= TOLERANCE


def test_values_lie_in_tiles_as_tensor_cores_read_them():
    """PTX ISA, "Matrix Fragments for mma.m16n8k16": of the second operand lane l holds, of column l / 4, rows
    2 (l % 4), the next one, and those 8 further."""
    values = torch.randint(0, 16, (21, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = packed_in_tiles(values)
    assert packed.shape == (3, 2, 32, 4)
    assert torch.equal(unpacked_tiles(packed), torch.cat((values, torch.zeros(3, 256, dtype=torch.uint8))))
    for tile, column_tile, lane, word in ((0, 0, 0, 0), (1, 1, 13, 3), (2, 0, 18, 1), (0, 1, 31, 2)):
        expected = 0
        for place, (half, offset) in enumerate(product(range(2), (0, 8))):
            column = 128 * column_tile + 32 * word + 16 * half + 2 * (lane % 4) + offset
            low, high = values[8 * tile + lane // 4, column : column + 2].tolist()
            expected |= low << 4 * place | high << 16 + 4 * place
        assert packed[tile, column_tile, lane, word].item() & 0xFFFFFFFF == expected


FOUR_BITS = {
    "x": torch.zeros(3, 256).bfloat16(),
    "packed": torch.zeros(2, 2, 32, 4, dtype=torch.int32),
    "of_groups": torch.zeros(2, 16, 2).bfloat16(),
    "group": 128,
    "out_features": 13,
    "bias": torch.empty(0),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": torch.zeros(3, 128).bfloat16()},
            r"packed must be \[T, 128 / 128, 32, 4\], got \[2, 2, 32, 4\]",
        ),
        ({"x": torch.zeros(256).bfloat16()}, r"x must be \[N, K\], got \[256\]"),
        ({"group": 96}, r"group must be one of \(32, 64, 128, 256\) and divide 256 columns, got 96"),
        ({"group": 64}, r"of_groups must be \[4, 16, 2\], got \[2, 16, 2\]"),
        ({"out_features": 8}, "out_features must fill 2 tiles of 8, got 8"),
        ({"bias": torch.ones(16).bfloat16()}, r"bias must be \[13\], got \[16\]"),
        ({"bias": torch.ones(13)}, r"bias must be torch.bfloat16, got torch.float32"),
        ({"x": torch.zeros(65, 256).bfloat16()}, "x has 65 rows, the kernel takes 64"),
        ({"x": torch.zeros(3, 256)}, r"x must be torch.bfloat16, got torch.float32"),
        ({"of_groups": torch.zeros(2, 16, 2)}, r"of_groups must be torch.bfloat16, got torch.float32"),
    ],
)
def test_the_product_with_4_bits_names_the_argument_that_does_not_fit(changes, message):
    assert not int4_matmul(**FOUR_BITS, use_kernel=True).any()
    with pytest.raises(ValueError, match=message):
        int4_matmul(**{**FOUR_BITS, **changes}, use_kernel=True)


def test_operators_have_fake_implementations_that_agree(attention, rope):
    batch = attention["batch"]
    tensors = (
        batch.page_table,
        batch.context_lens,
        batch.tree_lens,
        batch.query_indptr,
        batch.ancestors,
        batch.depths,
    )
    lens = (list(batch.host_context_lens), list(batch.host_tree_lens), list(batch.host_query_lens))
    pages = [attention[name].nan_to_num() for name in ("k_pages", "v_pages")]
    tests = ("test_schema", "test_faketensor")
    keys = np.array([noise_key(1, 2), noise_key(3, 4)], dtype=np.uint32)
    asked = AskedRows.best(np.array([1.0, 0.0], dtype=np.float32), keys, 2)
    checks = (
        (tree_attention_op, (attention["q"], *pages, *tensors, *lens, CASE.scale, 0, 0.0, 1.0)),
        (rope_append_op, (*rope.values(), 1.0, 1.0)),
        (kv_commit_op, (torch.zeros(1, 2, 3, 4, 2, 8), torch.tensor([1, 2]), torch.tensor([0, 1]))),
        (add_rms_norm_op, (torch.randn(3, 5), torch.randn(3, 5), torch.randn(5), 1e-6)),
        (silu_mul_op, (torch.randn(3, 8),)),
        (round_rows_op, (torch.randn(3, 8), 8, math.inf, 1e-6, None, False)),
        (round_rows_op, (torch.randn(3, 8), 8, math.inf, 0.0, 0.5, False)),
        (round_rows_op, (torch.randn(3, 10), 4, 2.0, 1e-6, None, True)),
        (
            narrow_matmul_op,
            (
                torch.randn(3, 64).bfloat16(),
                torch.empty(0),
                torch.ones(5, 64, dtype=torch.int8),
                torch.rand(5, 1),
                64,
                torch.empty(0),
            ),
        ),
        (int4_matmul_op, tuple(FOUR_BITS.values())),
        (gather_rows_op, (torch.randn(5, 3), torch.tensor([4, 0]))),
        (
            sample_shard_op,
            (
                torch.randn(2, 50),
                torch.from_numpy(asked.rows.view(np.uint8)),
                torch.from_numpy(asked.edits.view(np.uint8)),
                torch.empty(0, dtype=torch.int64),
                7,
                list(asked.counts),
            ),
        ),
    )
    for operator, arguments in checks:
        torch.library.opcheck(operator, arguments, test_utils=tests)


def test_operators_have_no_defaults():
    """torch leaves out what equals a default before it calls what is registered for a device."""
    operators = (
        tree_attention_op, rope_append_op, kv_commit_op, add_rms_norm_op, silu_mul_op, gather_rows_op,
        sample_shard_op, round_rows_op, narrow_matmul_op, int4_matmul_op,
    )  # fmt: skip
    for operator in operators:
        schema = operator._opoverload._schema
        assert not [argument.name for argument in schema.arguments if argument.has_default_value()], schema


def test_a_layer_of_kernels_is_traced_in_one_graph(attention, rope):
    """backend="eager": what is compiled does not matter here, that there is no graph break does."""

    def layer(k_pages, v_pages):
        q = rope_append(**{**rope, "k_pages": k_pages, "v_pages": v_pages}, use_kernel=True)
        return gather_rows(q * 2, torch.tensor([2, 0]), use_kernel=True)

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    first, second = (tuple(rope[name].clone() for name in ("k_pages", "v_pages")) for _ in range(2))
    assert torch.equal(compiled(*first), layer(*second))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_the_reference_computes_every_case_of_the_kernels(case):
    """Inputs without a window keep pages that fell out of it, which the reference gathers and then masks."""
    inputs = build_attention_inputs(replace(case, window=0))
    arguments = (
        inputs.q,
        inputs.k_pages,
        inputs.v_pages,
        inputs.batch,
        case.scale,
        case.window,
        case.soft_cap,
        case.value_scale,
    )
    expected = attention_in_float64(case, inputs)
    error = (tree_attention(*arguments).double() - expected).norm() / expected.norm()
    assert error < (1e-2 if case.query_scale > 1 else 4e-3)
