"""Draft heads of every method for the small model, untrained but often right: each is put together from what its
target says after a token alone, with a little noise."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.workers.draft_heads.checkpoint import write_eagle3, write_medusa, write_mtp, write_parallel
from outrider.workers.draft_heads.convolutions import NO_CONVOLUTION
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter, Eagle3Shape
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.medusa import MedusaHeads, MedusaShape
from outrider.workers.draft_heads.mtp import MtpDrafter, MtpShape, default_layer
from outrider.workers.draft_heads.pairs import MarkovTerm, PairShape
from outrider.workers.draft_heads.parallel import BlockLayer, ParallelDrafter, ParallelShape
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tensors import EMBEDDING, FINAL_NORM, HEAD

NUM_MEDUSA_HEADS = 3
BLOCK_SIZE = 5
_ALL = slice(None)


def write_heads(target: WeightSource, folder: Path) -> dict[str, Path]:
    """Writes a checkpoint in float32 for each method that reads hidden rows; where, by the method's name."""
    torch.manual_seed(0)
    folders = {name: folder / f"{name}-heads" for name in ("medusa", "eagle3", "mtp", "parallel")}
    unsaid, dtype = HeadDescription(), torch.float32
    with torch.no_grad():
        write_medusa(folders["medusa"], medusa_heads(target), unsaid, "fasterdecoding", dtype)
        write_eagle3(folders["eagle3"], eagle3_drafter(target), unsaid, "speculators", dtype)
        write_mtp(folders["mtp"], mtp_drafter(target), unsaid, "deepseek", dtype)
        write_parallel(folders["parallel"], parallel_drafter(target), unsaid, dtype)
    return folders


def medusa_heads(target: WeightSource) -> MedusaHeads:
    """Head k says of a row what the target would say k + 1 tokens later, did it always take its first choice."""
    config = target.config
    lm_head = LmHeadShape(config.hidden_size, config.vocab_size, config.hidden_size)
    shape = MedusaShape(config.hidden_size, config.vocab_size, NUM_MEDUSA_HEADS, 1, lm_head, False)
    heads = MedusaHeads(shape, torch.arange(config.vocab_size))
    rows = _read(target, HEAD)
    successors = (_read(target, EMBEDDING) @ rows.T).argmax(dim=1)
    for block, own in zip(heads.blocks, heads.lm_heads, strict=True):
        _disturb(block, 0.1)
        # What row u says of the next token, its successor's row says of the one after that.
        rows = torch.zeros_like(rows).index_add_(0, successors, rows)
        own.load_state_dict({"weight": rows})
    return heads


def eagle3_drafter(target: WeightSource) -> Eagle3Drafter:
    """A drafter that attends to its own token and adds it to the feature, with an LM head of three tokens in four."""
    config = target.config
    hidden, heads, kv_heads, dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    num_ids = config.vocab_size * 3 // 4
    shape = Eagle3Shape(
        hidden_size=hidden,
        target_hidden_size=hidden,
        vocab_size=config.vocab_size,
        taps=(1, config.num_layers // 2, config.num_layers),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        intermediate_size=_inner_size(config),
        rms_norm_eps=config.rms_norm_eps,
        rope=config.layers[0].rope,
        max_context=config.max_context,
        norm_before_residual=False,
        lm_head=LmHeadShape(hidden, num_ids, hidden),
    )
    drafter = Eagle3Drafter(shape, torch.randperm(config.vocab_size)[:num_ids].sort().values)
    attention = drafter.midlayer.self_attn
    drafter.fc.weight *= 0.3
    read = _orthogonal(kv_heads * dim, hidden)  # of the token, not of the feature
    for own in (attention.k_proj, attention.v_proj):
        own.weight.copy_(torch.cat([read, torch.zeros_like(read)], dim=1))
    # A query is like the key of its own row, and the heads of a group put together what their values have kept.
    per_group = attention.k_proj.weight.unflatten(0, (kv_heads, dim)).repeat_interleave(heads // kv_heads, 0)
    attention.q_proj.weight.copy_(2.0 * per_group.flatten(0, 1))
    back = attention.v_proj.weight[:, :hidden].unflatten(0, (kv_heads, dim))
    attention.o_proj.weight.copy_(back.repeat_interleave(heads // kv_heads, 0).flatten(0, 1).T)
    drafter.midlayer.mlp.down_proj.weight *= 0.1
    drafter.lm_head.load_state_dict({"weight": _read(target, HEAD)[drafter.lm_head.ids]})
    return drafter


def mtp_drafter(target: WeightSource) -> MtpDrafter:
    """A head whose input is the token, with a little of the feature, and whose block adds little."""
    config = target.config
    hidden = config.hidden_size
    shape = MtpShape(config, default_layer(config), LmHeadShape(hidden, config.vocab_size, hidden))
    drafter = MtpDrafter(shape, torch.arange(config.vocab_size))
    drafter.eh_proj.weight *= 0.3
    drafter.eh_proj.weight[:, :hidden] += torch.eye(hidden)
    drafter.block.self_attn.o_proj.weight *= 0.3
    drafter.lm_head.load_state_dict({"weight": _read(target, HEAD)})
    drafter.take_target(_read(target, FINAL_NORM), None)
    return drafter


def parallel_drafter(target: WeightSource) -> ParallelDrafter:
    """Slots that know little and see their whole block, with a pair term that knows what follows a token."""
    config = target.config
    hidden, vocab = config.hidden_size, config.vocab_size
    shape = ParallelShape(
        hidden_size=hidden,
        target_hidden_size=hidden,
        vocab_size=vocab,
        taps=(1, config.num_layers),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=_inner_size(config),
        rms_norm_eps=config.rms_norm_eps,
        rope=config.layers[0].rope,
        max_context=config.max_context,
        layers=(BlockLayer(is_causal=False),) * 2,
        block_size=BLOCK_SIZE,
        first_slot=0,
        num_levels=BLOCK_SIZE,
        mask_token_id=vocab - 1,
        lm_head=LmHeadShape(hidden, vocab, hidden),
        pair=PairShape("markov", hidden),
        confidence="hidden_and_pair",
        convolution=NO_CONVOLUTION,
    )
    drafter = ParallelDrafter(shape, torch.arange(vocab))
    drafter.lm_head.load_state_dict({"weight": 0.1 * _read(target, HEAD)})
    assert isinstance(drafter.pair, MarkovTerm)
    drafter.pair.markov_w1.weight.copy_(2.0 * F.rms_norm(_read(target, EMBEDDING), (hidden,)))
    drafter.pair.markov_w2.weight.copy_(_read(target, HEAD))
    return drafter


def _read(target: WeightSource, name: str) -> Tensor:
    """A whole tensor in float32."""
    return target.read(name, _ALL, _ALL, torch.float32)


def _inner_size(config: ModelConfig) -> int:
    return 2 * config.hidden_size


def _orthogonal(rows: int, columns: int) -> Tensor:
    """[rows, columns], rows of length 1 at right angles."""
    return torch.linalg.qr(torch.randn(columns, rows))[0].T


def _disturb(module: nn.Module, scale: float) -> None:
    """Noise in matrices that begin at zero, `scale` of what keeps a row's length."""
    for weight in module.parameters():
        if weight.dim() == 2:
            weight.add_(torch.randn(weight.shape), alpha=scale * weight.shape[1] ** -0.5)
