"""Faults to plant in the kernels, and the hunt for them: a check that never fails proves nothing.

Each fault is a small edit of the source. Those in device.cuh are invisible to the source executor, which replaces
that file's instructions, and so are reads that a CPU makes at any address: only running the PTX shows them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from outrider.kernels.attention_cases import AttentionCase, narrowed
from outrider.kernels.compiler import Sources, compile_sources, load_sources
from outrider.kernels.grow_cases import prepare_grow_trees
from outrider.kernels.int4_cases import INT4_CASES, prepare_int4_matmul
from outrider.kernels.kernel_cases import (
    prepare_attention,
    prepare_kv_commit,
    prepare_rope_append_fp8,
    prepare_sample_shard,
)
from outrider.kernels.narrow_cases import NARROW_CASES, prepare_narrow_matmul
from outrider.kernels.prepared import PreparedCase
from outrider.kernels.row_cases import prepare_add_rms_norm, prepare_round_rows, prepare_silu_mul
from support.cuda_on_cpu.executor import SCHEDULES, Schedule, build_unit, translation_unit
from support.cuda_on_cpu.kernels import only, source_kernels
from support.cuda_on_cpu.ptx.executor import translated_unit
from support.cuda_on_cpu.replay import replay

CPU = torch.device("cpu")


@dataclass(frozen=True)
class PlantedBug:
    """In `file` of unit `stem`, the only occurrence of `old` becomes `new`.

    `narrow`: it is in what only a cache in FP8 needs; `target`: whose PTX has it.
    """

    name: str
    stem: str
    file: str
    old: str
    new: str
    narrow: bool = False
    target: str = "sm_90a"

    def plant(self, sources: Sources) -> Sources:
        assert sources[self.file].count(self.old) == 1, (
            f"{self.name}: {sources[self.file].count(self.old)} places"
        )
        return {**sources, self.file: sources[self.file].replace(self.old, self.new)}


def _growing(name: str, old: str, new: str) -> PlantedBug:
    return PlantedBug(f"growing: {name}", "grow_trees", "grow_trees.cu", old, new)


def _attention(name: str, old: str, new: str) -> PlantedBug:
    return PlantedBug(name, "tree_attention", "tree_attention.cu", old, new)


def _device(name: str, old: str, new: str) -> PlantedBug:
    return PlantedBug(name, "tree_attention", "device.cuh", old, new)


def _narrow(name: str, stem: str, file: str, old: str, new: str, target: str = "sm_90a") -> PlantedBug:
    return PlantedBug(name, stem, file, old, new, True, target)


def _rounding(name: str, old: str, new: str) -> PlantedBug:
    return PlantedBug(name, "round_rows", "round_rows.cu", old, new)


def _product(name: str, old: str, new: str) -> PlantedBug:
    return PlantedBug(name, "narrow_matmul", "narrow_matmul.cu", old, new)


def _four_bits(name: str, old: str, new: str, file: str = "int4_matmul.cu") -> PlantedBug:
    return PlantedBug(name, "int4_matmul", file, old, new)


SOURCE_BUGS = (
    _attention("no barrier after the copies", "copy_async_wait<0>();\n    __syncthreads();", "copy_async_wait<0>();"),
    _attention("no barrier behind the page table", "second_page);\n  __syncthreads();", "second_page);"),
    _attention("waits for too few copies", "copy_async_wait<0>()", "copy_async_wait<1>()"),
    _attention("sums take the place of tiles that are read", "  __syncthreads();  // the tiles", "  // the tiles"),
    _attention("query fragment rows and columns swapped", "int r = i & 1, column = k * 16 + quad * 2 + (i >> 1) * 8;",
               "int r = i >> 1, column = k * 16 + quad * 2 + (i & 1) * 8;"),
    _attention("mask bit off by one", "seen = visible >> (j * 8", "seen = visible >> (1 + j * 8"),
    _attention("causal instead of ancestors", "tree |= bits;",
               "tree |= (w ? 0ull : ~0ull) << (shift > 0 ? shift & 63 : 0);"),
    _attention("mask words joined with a 32-bit shift", "word >> -shift", "word >> (-shift & 31)"),
    _attention("half of the quad's maximum lost",
               "largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));", ""),
    _attention("accumulator not rescaled", "acc[i][e] *= rescale[e >> 1];", ";"),
    _attention("one key too many", "key >= first_key && key < num_keys", "key >= first_key && key <= num_keys"),
    _attention("keys before the window are read", "my_end && key >= first_key", "my_end"),
    _attention("window by row instead of depth", "context_len + depth - window + 1 - first_key",
               "context_len + max(row, 0) - window + 1 - first_key"),
    _attention("tree part of the window off by one", "__popcll(tree) - window;", "__popcll(tree) - window - 1;"),
    _attention("more shared memory than planned", "LINE = D + 8;", "LINE = D + 16;"),
    _attention("splits write the same place", "place.first_slot + place.block)", "place.first_slot)"),
    _attention("warps added without a barrier",
               "acc[i][e];\n          }\n      __syncthreads();", "acc[i][e];\n          }"),
    _attention("queries taken for the first rows of the tree", "tree_lens[request] - num_nodes;", "0;"),
    PlantedBug("split of smaller maximum not scaled", "merge_splits", "merge_splits.cu",
               "- largest) * inverse", "- partial_lse[first]) * inverse"),
    PlantedBug("commit writes before all is read", "kv_commit", "kv_commit.cu", "  __syncthreads();\n", ""),
    PlantedBug("sums of the warps read too early", "sample_shard", "sample_shard.cu",
               "partial[warp * n + i] = sums[i];\n  __syncthreads();", "partial[warp * n + i] = sums[i];"),
    PlantedBug("sums overwritten before they are read", "sample_shard", "sample_shard.cu",
               "  __syncthreads();  // those before have been read\n", ""),
    PlantedBug("noise of another token", "sample_shard", "sample_shard.cu",
               "table ? (u32)table[i]", "table ? (u32)i"),
    PlantedBug("the law of the row before the edits", "sample_shard", "sample_shard.cu",
               "  __syncthreads();\n  sums.maximum", "  sums.maximum"),
    PlantedBug("ties beyond the last place stay", "sample_shard", "sample_shard.cu",
               " | ALL_COLUMNS;  // all that", " ;  // all that"),
    PlantedBug("top-p of all tokens instead of the top k", "sample_shard", "sample_shard.cu",
               "    mass = mass_up_to(law, cut);\n", ""),
    PlantedBug("the nucleus without the token that completes it", "sample_shard", "sample_shard.cu",
               "mass_before + found[MIDS + mid] < limit", "mass_before + found[MIDS + mid] + UNIT / 1024 < limit"),
    PlantedBug("the search forgets what lies before", "sample_shard", "sample_shard.cu",
               "    num_before += tokens;\n", ""),
    PlantedBug("a second best that is the best again", "sample_shard", "sample_shard.cu",
               "(score == last_score && i > last_column)", "score == last_score"),
    PlantedBug("edits are left in the logits", "sample_shard", "sample_shard.cu",
               "    row_logits[edits[e].column] = originals[e];\n  if", "    ;\n  if"),
    PlantedBug("log-probabilities of the edited law", "sample_shard", "sample_shard.cu",
               "winners[place].raw_logit = originals[e]", "winners[place].raw_logit = row_logits[last_column]"),
    PlantedBug("min-p in units of the temperature", "sample_shard", "sample_shard.cu",
               "(double)(value_of(middle) - largest) / temperature", "(double)(value_of(middle) - largest)"),
    PlantedBug("NaN is not the largest", "sample_shard", "sample_shard.cu",
               "return num_nan[0] ? __int_as_float(0x7fc00000) :", "return"),
    PlantedBug("squares of the warps read too early", "add_rms_norm", "add_rms_norm.cu", "  __syncthreads();\n", ""),
    PlantedBug("squares of what was added", "add_rms_norm", "add_rms_norm.cu",
               "squares += to_float(pack.at[e]) * to_float(pack.at[e]);",
               "squares += to_float(pack.at[e]) * to_float(other.at[e]);"),
    PlantedBug("columns behind the last pack are left out of the norm", "add_rms_norm", "add_rms_norm.cu",
               "squares += add_at(hidden", "add_at(hidden"),
    PlantedBug("up read as gate", "silu_mul", "silu_mul.cu", "load_pack(up + i, aligned)",
               "load_pack(gate + i, aligned)"),
    PlantedBug("rows one pack too long", "silu_mul", "silu_mul.cu", "i < num_packed", "i <= num_packed"),
    _rounding("largest of the warps read too early", "  __syncthreads();\n", ""),
    _rounding("the lowest number for the largest magnitude", "to_float(x)) & 0x7fffffffu", "to_float(x))"),
    _rounding("NaN lost in a row", "  if (magnitude != magnitude) return __int_as_float(0x7fc00000);", ";"),
    _rounding("the bound of a row left out", "fminf(magnitude, bound)", "magnitude"),
    _rounding("scales smaller than the smallest", "/ 448.f, least_scale)", "/ 448.f, 0.f)"),
    _rounding("a product with the inverse in place of a division", "to_float(x) / scale",
              "to_float(x) * (1.f / scale)"),
    _rounding("a scale by the inverse of 448", "bound) / 448.f", "bound) * (1.f / 448.f)"),
    _rounding("columns behind the last pack are left out of the scale", "  for (int i = num_packed + first; i < num; "
              "i += step) largest = max", "  for (int i = num; i < num; i += step) largest = max"),
    _rounding("codes in another order", "<< (8 * e);", "<< (24 - 8 * e);"),
    _rounding("every block rounds the first part", "blockIdx.y * blockDim.x + threadIdx.x, step",
              "threadIdx.x, step"),
    _rounding("rows of zeros read what lies behind the others", ", is_there = row < num_rows;",
              ", is_there = true;"),
    _rounding("the last group taken for a whole one", "min(width, columns - begin)", "width"),
    _rounding("lanes of two groups share a maximum", "int step = lanes / 2", "int step = 16"),
    _rounding("scales by row where they lie by column", "row * scale_row_stride + group * scale_group_stride",
              "row * num_groups + group"),
    _product("no barrier behind a chunk", "wait_for_chunk(num_stages);\n    __syncthreads();",
             "wait_for_chunk(num_stages);"),
    _product("waits for too few chunks", "<= 4) copy_async_wait<2>()", "<= 4) copy_async_wait<3>()"),
    _product("a chunk copied over the one that is read", "stage == 0 ? num_stages - 1 : stage - 1", "stage"),
    _product("sums take the place of chunks that are read", "  __syncthreads();  // the chunks", "  // the chunks"),
    _product("sums of the warps read too early", "total[m][j][e];\n      }\n  __syncthreads();",
             "total[m][j][e];\n      }"),
    _product("a group with the scale of the next", "      if (chunk > begin) add_scaled();\n", ""),
    _product("the scale of the whole chunk's first columns", "chunk * CHUNK + column_warp * (CHUNK / COLUMN_WARPS)",
             "chunk * CHUNK"),
    _product("scales of x of another row", "quad * 2 + r, num_rows - 1)", "quad * 2, num_rows - 1)"),
    _product("columns beyond the matrix are read", "valid = in_weight && first_feature", "valid = first_feature"),
    _product("features beyond the matrix are written", "if (feature >= out_features) return;", ""),
    _product("halves of a step's columns swapped", "codes.y, a[1][m][r], a[1][m][2 + r]",
             "codes.y, a[1][m][2 + r], a[1][m][r]"),
    _product("columns of x of another step", "b[j][2 * half + 1][0] = values.z", "b[j][2 * half + 1][0] = values.x"),
    _product("int8 without a sign", "(8388608.f + 128.f)", "8388608.f"),
    _product("column splits write the same place", "((i64)split * num_rows + row)", "((i64)row)"),
    _product("the bias of another feature", "bias[at % out_features]", "bias[at / out_features]"),
    _product("bias added where columns are split, too", "if (num_splits > 1) {", "if (num_splits > 2) {"),
    _four_bits("4 bits: no barrier behind a chunk", "wait_for_chunk(num_stages);\n    __syncthreads();",
               "wait_for_chunk(num_stages);"),
    _four_bits("4 bits: waits for too few chunks", "<= 4) copy_async_wait<2>()", "<= 4) copy_async_wait<3>()"),
    _four_bits("4 bits: a chunk copied over the one that is read", "stage == 0 ? num_stages - 1 : stage - 1",
               "stage"),
    _four_bits("4 bits: sums take the place of chunks that are read", "  __syncthreads();  // the chunks",
               "  // the chunks"),
    _four_bits("4 bits: sums of the warps read too early", "sum[m][j][e];\n      }\n  __syncthreads();",
               "sum[m][j][e];\n      }"),
    _four_bits("4 bits: a group with the scale of the one before", "pairs + first_column / group",
               "pairs + column_warp * 64 / group"),
    _four_bits("4 bits: the groups of the first chunk for all", "number = chunk * groups_per_chunk + thread",
               "number = thread"),
    _four_bits("4 bits: groups beyond the matrix are read", "valid = number * group < in_features && feature",
               "valid = feature"),
    _four_bits("4 bits: columns beyond x are read", "valid = in_x && row < num_rows", "valid = row < num_rows"),
    _four_bits("4 bits: a scale for the centre", "0x3232", "0x1010"),
    _four_bits("4 bits: features beyond the matrix are written", "if (feature >= out_features) return;", ""),
    _four_bits("4 bits: rows and columns of a fragment swapped", "[place % 2 * 2 + r]", "[r * 2 + place % 2]"),
    _four_bits("4 bits: columns of x of another step", "b[2 * half], b[2 * half + 1]", "b[half], b[half + 2]"),
    _four_bits("4 bits: words of the other half of a tile", "four.z : four.x", "four.x : four.z"),
    _four_bits("4 bits: the same tile for all columns of a chunk", "chunk * 2 + tile % 2", "chunk * 2"),
    _four_bits("4 bits: pieces of x taken from another place", "(piece ^ (row & 7))", "(piece ^ (row & 3))"),
    _four_bits("4 bits: column splits write the same place", "((i64)split * num_rows + row)", "((i64)row)"),
    _four_bits("4 bits: bias added where columns are split, too", "if (num_splits > 1) {", "if (num_splits > 2) {"),
    _four_bits("4 bits: another middle", "0xc308c308u", "0xc300c300u", "int4.cuh"),
    _four_bits("4 bits: values in other places", "(4 * place)", "(4 * (place ^ 1))", "int4.cuh"),
    _growing("what was chosen is chosen again", "if (is_there) values[place] = 0.f;", ";"),
    _growing("more rows than the tree has room for", "min(num_each, grown.most_rows - num_before)", "num_each"),
    _growing("a mask of the first step's rows", "masks[(i64)parent * mask_words + w]",
             "masks[(i64)(parent % max_rows) * mask_words + w]"),
    _growing("rows of two steps in one place", "grown.tree_len + step * num_each + j;", "grown.tree_len + j;"),
    _growing("the noise of the token before", "grown.root_position + depth + 1", "grown.root_position + depth"),
    _growing("pages of the first sequence", "(i64)b * max_pages + index", "index"),
    _growing("tokens that the target does not have", " && token < num_target_tokens", ""),
    _growing("nodes too deep", "depth + 1 < grown.max_depth", "depth < grown.max_depth"),
    _growing("kinds one off", "NUM_EDGES - num_edges_up_to", "NUM_EDGES - 1 - num_edges_up_to"),
    _growing("chosen before all proposals are in", "  __syncthreads();\n  if (step + 1 == num_steps) return;",
             "  if (step + 1 == num_steps) return;"),
    _growing("best of the warps read too early", "shared[threadIdx.x >> 5] = x;\n  __syncthreads();",
             "shared[threadIdx.x >> 5] = x;"),
    _growing("rows of nobody are written", "kv_rows[r] = -1;", "kv_rows[r] = 0;"),
    _growing("log p over all tokens", "log(sums.kept_sum)", "log(sums.sum + 1.0)"),
    _growing("a removed token has a law", " || winner.score == NEGATIVE_INFINITY", ""),
    _growing("the token of another step", "(i64)at_step * max_rows * (2 * num_best + 1) + place - at_step * max_rows",
             "place - at_step * max_rows"),
    _narrow("read before all is widened", "tree_attention", "tree_attention.cu",
            "widen_tile(stage);\n      __syncthreads();", "widen_tile(stage);"),
    _narrow("a tile widened too early", "tree_attention", "tree_attention.cu",
            "widen_tile(stage);", "widen_tile(stage ^ 1);"),
    _narrow("values not scaled", "tree_attention", "tree_attention.cu",
            "value_scale / row_sum[r]", "1.f / row_sum[r]"),
    _narrow("rows rounded without their scale", "rope_append", "rope_append.cu",
            "to_float(x) / scale", "to_float(x)"),
    _narrow("values with the keys' scale", "rope_append", "rope_append.cu",
            "value[pair + half], value_scale", "value[pair + half], key_scale"),
)  # fmt: skip

_BF16_MMA = "f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
DEVICE_BUGS = (
    _device("mma: b registers swapped", _BF16_MMA + "{%4,%5,%6,%7}, {%8,%9}", _BF16_MMA + "{%4,%5,%6,%7}, {%9,%8}"),
    _device("mma: a registers swapped", _BF16_MMA + "{%4,%5,%6,%7}", _BF16_MMA + "{%4,%6,%5,%7}"),
    _device("mma: result registers swapped", "f32.bf16.bf16.f32 {%0,%1,%2,%3}", "f32.bf16.bf16.f32 {%0,%2,%1,%3}"),
    _device("mma: types of the other format", "row.col.f32.bf16.bf16.f32", "row.col.f32.f16.f16.f32"),
    _device("ldmatrix not transposed", "m8n8.x4.trans.shared", "m8n8.x4.shared"),
    _device("cp.async does not fill with zeros", "valid ? 16 : 0", "16"),
    _device("cp.async waits for one group too few", '"n"(pending)', '"n"(pending + 1)'),
    _device("bf16 halves swapped", '"f"(high), "f"(low)); return y;\n}\nDEVICE u32 pack2(f16*',
            '"f"(low), "f"(high)); return y;\n}\nDEVICE u32 pack2(f16*'),
    PlantedBug("unaligned rows read as packs", "silu_mul", "packs.cuh", "  if (aligned) return", "  return"),
    _device("ex2 of the wrong operand", "ex2.approx.ftz.f32 %0, %1", "ex2.approx.ftz.f32 %0, %0"),
    _narrow("FP8 written to the other half", "rope_append", "fp8.cuh", '"f"(0.f), "f"(x)', '"f"(x), "f"(0.f)'),
    _narrow("FP8 halves swapped", "tree_attention", "fp8.cuh", "{(u16)pair}), to_float(f16{(u16)(pair >> 16)})",
            "{(u16)(pair >> 16)}), to_float(f16{(u16)pair})"),
    _narrow("FP8 ties go up", "rope_append", "fp8.cuh", "0x7ffffu + (bits >> 20 & 1u)", "0x80000u", "sm_80"),
    _narrow("FP8 subnormals in another unit", "rope_append", "fp8.cuh", "16384.f", "8192.f", "sm_80"),
    _narrow("FP8 not cut off", "rope_append", "fp8.cuh", "fminf(fabsf(x), 448.f)", "fabsf(x)", "sm_80"),
    _narrow("FP8 with another exponent", "tree_attention", "fp8.cuh", "0x7b807b80u", "0x7b007b00u", "sm_80"),
    PlantedBug("FP8 in the other half of a step", "narrow_matmul", "fp8.cuh", '"=r"(y) : "h"((u16)codes)',
               '"=r"(y) : "h"((u16)(codes >> 16))'),
    _four_bits("4 bits: fma of other operands", '"r"(x), "r"(y), "r"(z)', '"r"(x), "r"(z), "r"(y)', "int4.cuh"),
    _narrow("FP8 without signs", "tree_attention", "fp8.cuh", "(spread & 0x80008000u) |", "", "sm_80"),
)  # fmt: skip


def attention_cases() -> Iterator[AttentionCase]:
    """Small, and between them sensitive to every planted bug. All use the same three kernels."""
    yield AttentionCase("two trees", (75, 40), (24, 7), num_heads=4, num_kv_heads=2, num_splits=2)
    yield AttentionCase("decode", (250, 5), (1, 2), num_heads=4, num_kv_heads=1, query_scale=8.0)
    yield AttentionCase("words", (20,), (70,), num_heads=1, num_kv_heads=1)
    yield AttentionCase("window", (150, 0), (24, 40), num_heads=1, num_kv_heads=1, window=5)
    yield AttentionCase("growing", (40, 5), (2, 2), cached_lens=(30, 3), num_heads=2, num_kv_heads=1)
    yield AttentionCase("sharp", (200,), (20,), num_heads=2, num_kv_heads=1, query_scale=60.0, num_splits=2)


def cases_for(bug: PlantedBug) -> Iterator[PreparedCase]:
    if bug.stem in ("tree_attention", "merge_splits"):
        cases = narrowed(list(attention_cases())) if bug.narrow else attention_cases()
        yield from (prepare_attention(case, CPU) for case in cases)
    elif bug.stem == "rope_append":
        yield prepare_rope_append_fp8(torch.bfloat16, CPU)
    elif bug.stem == "kv_commit":
        yield prepare_kv_commit(200, CPU)
    elif bug.stem == "round_rows":
        yield prepare_round_rows(6, 77, torch.bfloat16, CPU)
        yield prepare_round_rows(6, 4104, torch.bfloat16, CPU, bound=2.0, least_scale=1e-3)
        yield prepare_round_rows(5, 520, torch.float32, CPU, static_scale=0.03)
        yield prepare_round_rows(6, 336, torch.bfloat16, CPU, width=64, by_column=True)
    elif bug.stem in ("add_rms_norm", "silu_mul"):
        prepare = prepare_add_rms_norm if bug.stem == "add_rms_norm" else prepare_silu_mul
        yield prepare(2, 77, torch.bfloat16, CPU)
        yield prepare(2, 520, torch.bfloat16, CPU)
    elif bug.stem == "narrow_matmul":
        yield from (prepare_narrow_matmul(case, CPU) for case in NARROW_CASES if case.num_rows <= 9)
        yield prepare_narrow_matmul(NARROW_CASES[6], CPU)
    elif bug.stem == "grow_trees":
        yield prepare_grow_trees(1, 6, 4, CPU)
        yield prepare_grow_trees(5, 3, 2, CPU, has_table=True)
    elif bug.stem == "int4_matmul":
        yield from (prepare_int4_matmul(case, CPU) for case in INT4_CASES if case.num_rows <= 16)
    else:
        yield prepare_sample_shard(600, 17, CPU, step=5, coarse=True)
        yield prepare_sample_shard(1501, 152_000, CPU)


def kernels_for(cases: list[PreparedCase], stem: str) -> list[str]:
    return sorted({plan.kernel for case in cases for plan in case.plans if plan.source == stem})


def hunt(bug: PlantedBug, executor: str, checks: Sequence[str] = ("none", "thread", "address")) -> str:
    """What finds the bug first: "numbers", a finding of the runtime, or a sanitizer's; "" when nothing does.

    Args:
        executor: "source" or "ptx".
        checks: sanitizers of executor.py to use in turn; "none" compares numbers under every schedule.
    """
    cases = list(cases_for(bug))
    names = kernels_for(cases, bug.stem)
    sources = only(bug.plant(load_sources(bug.stem)), bug.stem, names)
    if executor == "ptx":
        unit = translated_unit(compile_sources(bug.stem, sources, bug.target).ptx, names)
    else:
        unit = translation_unit(bug.stem, sources)
    for sanitizer in checks:
        program = build_unit(f"planted_{bug.stem}", unit, sanitizer, "-Og", alone=True)
        for case in cases_for(bug) if sanitizer == "none" else cases:
            for schedule in SCHEDULES if sanitizer == "none" else (SCHEDULES[0], SCHEDULES[1]):
                found = _try(program, bug.stem, case, schedule, numbers=sanitizer == "none")
                if found:
                    return found
    return ""


def _try(program: Path, stem: str, case: PreparedCase, schedule: Schedule, numbers: bool) -> str:
    for plan in case.plans:  # the other kernels of the case, e.g. the merge of splits, are the sound ones
        if plan.source != stem:
            source_kernels().launch([plan])
            continue
        finding = replay(program, [plan], schedule)
        if finding:
            return finding.split(":")[0]
    return "numbers" if numbers and case.verify() else ""
