"""A real checkpoint, quantised in GGUF: the same numbers as transformers with the same weights."""

import pytest
import torch

from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.weights.reference import load_transformers
from outrider.workers.weights.resolver import open_source
from outrider.workers.weights.tokenizer import load_tokenizer
from support.models import smollm2
from support.rows import SequenceRows, batch_of, chain

CPU = torch.device("cpu")
TEXT = "The farmer's three daughters each planted a different tree. The eldest chose an oak, because"

# Logits reach 30, and transformers' own lie up to 1.2e-4 from those in float64. Over 7 prompts of up to 160
# tokens packed products, which add up blocks of columns, came within 9.2e-5 of transformers.
TOLERANCE = 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_logits_equal_those_of_transformers(packed: bool) -> None:
    torch.set_num_threads(1)
    resolved = smollm2()
    tokens = load_tokenizer(resolved).encode(TEXT)
    with torch.no_grad():
        want = load_transformers(resolved, torch.float32)(torch.tensor([tokens])).logits[0]
    source = open_source(resolved)
    plan = ShardPlan(source.config, 0, 1)
    model = Transformer(load_weights(plan, source, torch.float32, CPU, packed), SoloCommunicator())
    cache = PagedCache(source.config, plan, 4, 16, torch.float32, CPU)
    rows = SequenceRows([2, 0, 3, 1], 0, chain(len(tokens)), 0, tokens)
    got = model.logits(model.forward(batch_of([rows], 16, CPU), cache).last)
    assert (got - want).abs().max() <= TOLERANCE
