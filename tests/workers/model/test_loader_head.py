"""A model with another LM head: its own is not read, and the head's law is over the head's tokens."""

import torch

from outrider.workers.draft_heads.lm_head import DenseLmHead
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.draft_heads import served_head
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.tensors import HEAD

SPEC = "random:llama?hidden_size=16&num_layers=1&num_heads=2&num_kv_heads=1&head_dim=8&vocab_size=32"


class Watched(RandomSource):
    """Notes what is read."""

    def __init__(self) -> None:
        super().__init__(SPEC)
        self.names_read: list[str] = []

    def read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> torch.Tensor:
        self.names_read.append(name)
        return super().read(name, rows, columns, dtype)


def test_a_given_head_is_used_and_the_models_own_is_not_read() -> None:
    source = Watched()
    assert HEAD in source.names()
    head = DenseLmHead(16, torch.tensor([1, 5, 30])).requires_grad_(False)
    plan = ShardPlan(source.config, 0, 1)
    given = served_head(head, 32, packed=False)
    weights = load_weights(plan, source, torch.float32, torch.device("cpu"), packed=False, head=given)
    assert HEAD not in source.names_read
    model = Transformer(weights, SoloCommunicator())
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(model.logits(hidden), head(model.normed(hidden)))
    assert weights.head.vocabulary.ids(torch.arange(3)).tolist() == [1, 5, 30]
