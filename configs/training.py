"""What a training run is: frozen dataclasses in the manner of `schema.py`, read by the same loader.

outrider train RUN.yaml [a.b=c ...]
"""

from dataclasses import dataclass, field
from typing import Literal

from outrider.configs.schema import _require, _require_at_least

TrainingMethod = Literal["eagle3", "medusa1", "medusa2", "mtp", "parallel"]
LossName = Literal["kl", "tv", "kl_tv", "lk_alpha", "lk_lambda"]


@dataclass(frozen=True)
class TrainedTargetConfig:
    """The target that the drafter is for."""

    model: str
    """Checkpoint, written like `target.model` of a run that serves."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format in which its hidden rows are computed. `auto`: bfloat16, but float32 on a CPU that has no
    instructions for it, where training in bfloat16 takes some 15 times as long."""

    model_cache_dir: str = "~/.cache/outrider/models"
    """As `cluster.model_cache_dir` of a run that serves."""


@dataclass(frozen=True)
class TextsConfig:
    """The texts: what the target wrote (`outrider distill`)."""

    directories: tuple[str, ...]
    """Folders with texts-*.jsonl, in this order."""

    eval_directories: tuple[str, ...] = ()
    """Folders with texts that are measured and not trained on; empty: every `eval_every`-th text of the above."""

    eval_every: int = 50
    """Which texts are held out where `eval_directories` is empty."""

    max_eval_texts: int = 64
    """Most texts that are measured."""

    max_tokens: int = 1024
    """A longer text is cut at its end. Tokens, the prompt included."""

    loss_on_prompts: bool = False
    """Learn the prompts' tokens, too: for prompts that the target wrote itself."""

    features: Literal["cached", "computed", "held", "kept"] = "cached"
    """The target's hidden rows: computed once and kept in files, computed whenever a text is read, or computed when
    it is read first and held in the memory of the device from then on; `kept`: read from what `outrider distill
    --keep-hidden` wrote beside the texts, so that of the target only its final norm and its LM head are run."""

    features_directory: str = ""
    """Where they are kept; empty: `out`/features. Runs of other methods and heads over the same texts share them."""

    top_k: int = 32
    """Tokens of the target's law that are kept for each position; the others count as one."""

    def __post_init__(self) -> None:
        _require(bool(self.directories), "texts.directories", self.directories, "at least one folder")
        _require_at_least(self, "texts", 1, "max_eval_texts", "top_k")
        _require_at_least(self, "texts", 2, "eval_every")
        _require_at_least(self, "texts", 4, "max_tokens")


@dataclass(frozen=True)
class TrainedHeadConfig:
    """The drafter's LM head."""

    kind: Literal["full", "trimmed", "low_rank"] = "low_rank"
    """All of the target's tokens, those of `ids`, or two small matrices (SlimSpec) over all of them or `ids`."""

    ids: str = ""
    """Token ids: a JSON file with a list of them, a folder that `outrider trim` wrote, or `shipped:NAME`. `trimmed`
    needs them, `low_rank` may have them."""

    rank_divisor: int = 8
    """Rank of a `low_rank` head: hidden size // this."""

    frozen: bool = False
    """Leave the head as it starts: the target's rows, or the two matrices that come near them."""

    def __post_init__(self) -> None:
        _require_at_least(self, "head", 2, "rank_divisor")
        _require(bool(self.ids) or self.kind != "trimmed", "head.ids", self.ids, "a file for a trimmed head")
        _require(not self.ids or self.kind != "full", "head.ids", self.ids, "empty for a full head")


@dataclass(frozen=True)
class Eagle3Config:
    """Method `eagle3` (arXiv 2503.01840)."""

    unrolled_steps: int = 5
    """Steps of the training-time test; 7 in the paper."""

    step_decay: float = 0.8
    """Step k's loss counts step_decay**k."""

    start: Literal["target_last_layer", "random"] = "target_last_layer"
    """What the drafter's layer starts as."""

    loss: LossName = "kl"
    """Between the target's law and the drafter's."""

    norm_before_residual: bool = False
    """The residual is the normed feature instead of the feature."""

    def __post_init__(self) -> None:
        _require_at_least(self, "eagle3", 1, "unrolled_steps")
        _require(0 < self.step_decay <= 1, "eagle3.step_decay", self.step_decay, "more than 0, at most 1")


@dataclass(frozen=True)
class MtpConfig:
    """Method `mtp` (DeepSeek-V3, arXiv 2412.19437)."""

    unrolled_steps: int = 3
    """Depth: tokens that the head learns to guess, fed back on itself."""

    step_decay: float = 0.8
    """Step k's loss counts step_decay**k."""

    loss_weight: float = 1.0
    """What the whole loss is multiplied with; 0.1 in Mellum 2's training, where it stood beside the model's own."""

    start: Literal["target_last_layer", "random"] = "target_last_layer"
    """What the head's block starts as: the target's last layer of the same kind."""

    loss: LossName = "kl"
    """Between the target's law and the head's."""

    def __post_init__(self) -> None:
        _require_at_least(self, "mtp", 1, "unrolled_steps")
        _require(0 < self.step_decay <= 1, "mtp.step_decay", self.step_decay, "more than 0, at most 1")
        _require(self.loss_weight > 0, "mtp.loss_weight", self.loss_weight, "more than 0")


@dataclass(frozen=True)
class ParallelConfig:
    """Method `parallel` (DFlash, DSpark, JetSpec): layers over a block, which guess all levels in one forward."""

    num_layers: int = 2
    """Layers; 5 in the papers."""

    block_size: int = 7
    """Slots of a block: the last known token, and masks."""

    anchor_guesses: bool = True
    """The slot of the last known token guesses the next one (DSpark); false: those behind it alone (DFlash)."""

    causal: bool = True
    """A slot sees those before it in its block (JetSpec); false: all of them (DFlash, DSpark)."""

    mask_token_id: int = 0
    """Token that stands for those to be guessed: one that no text has and that ends none."""

    taps: tuple[int, ...] = ()
    """The target's layers whose inputs are read; empty: those of `eagle3`."""

    pair_rank: int = 32
    """Rank of the pair term, by which a guess depends on the token before it; 0: none."""

    anchors: int = 32
    """Most blocks of each text in a step, at random places."""

    position_decay: float = 0.78
    """Level k's loss counts position_decay**k: exp(-1/4) in DSpark; 1 in JetSpec."""

    learns: Literal["law", "text"] = "law"
    """The target's law, or the text's own tokens (with loss `kl` cross-entropy, as DFlash)."""

    loss: LossName = "kl_tv"
    """Between what is learned and the drafter's law."""

    confidence_weight: float = 1.0
    """Of the loss of a guess of how often each level is right; 0: no such guess."""

    start: Literal["target_last_layers", "random"] = "target_last_layers"
    """What the layers start as."""

    def __post_init__(self) -> None:
        _require_at_least(self, "parallel", 1, "num_layers", "anchors")
        _require_at_least(self, "parallel", 0, "mask_token_id", "pair_rank", "confidence_weight")
        _require(2 <= self.block_size <= 64, "parallel.block_size", self.block_size, "from 2 to 64")
        decay = self.position_decay
        _require(0 < decay <= 1, "parallel.position_decay", decay, "more than 0, at most 1")


@dataclass(frozen=True)
class MedusaConfig:
    """Methods `medusa1` and `medusa2` (arXiv 2401.10774)."""

    num_heads: int = 4
    """Heads; head k guesses the token k + 1 places ahead."""

    num_layers: int = 1
    """Residual blocks of each head."""

    head_decay: float = 0.8
    """Head k's loss counts head_decay**k."""

    shared_lm_head: bool = True
    """All heads end in one LM head."""

    lambda0: float = 0.01
    """medusa2: weight of the heads' loss beside the target's own, once it is ramped up; 0.01 with the target's own
    texts, 0.2 otherwise."""

    ramp_fraction: float = 0.5
    """medusa2: part of the steps in which `lambda0` rises from 0, along a sine."""

    head_lr_factor: float = 4.0
    """medusa2: the heads' learning rate over that of the target's adapters."""

    lora_rank: int = 32
    """medusa2: rank of the adapters."""

    lora_alpha: int = 16
    """medusa2: their scale is lora_alpha / lora_rank."""

    lora_dropout: float = 0.05
    """medusa2: dropout in front of the adapters."""

    def __post_init__(self) -> None:
        _require_at_least(self, "medusa", 1, "num_heads", "num_layers", "lora_rank")
        _require_at_least(self, "medusa", 0, "lambda0", "ramp_fraction", "head_lr_factor", "lora_alpha")
        _require(0 < self.head_decay <= 1, "medusa.head_decay", self.head_decay, "more than 0, at most 1")
        _require(0 <= self.lora_dropout < 1, "medusa.lora_dropout", self.lora_dropout, "at least 0, below 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and how long it runs."""

    steps: int = 1000
    """Optimizer steps of the whole run."""

    batch_tokens: int = 4096
    """Tokens of one optimizer step, over all ranks, about."""

    micro_tokens: int = 4096
    """Most tokens of one forward of one rank, about; gradients of several are added up."""

    lr: float = 4e-4
    """Highest learning rate."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to `final_lr_fraction` after the warm-up."""

    warmup_steps: int = 50
    """Steps in which the learning rate rises from 0."""

    final_lr_fraction: float = 0.02
    """Learning rate of the last step, as a fraction of `lr`."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""

    weight_decay: float = 0.0
    """AdamW's."""

    clip: float = 0.5
    """Longest gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        _require_at_least(self, "optimizer", 1, "steps", "batch_tokens", "micro_tokens")
        _require_at_least(self, "optimizer", 0, "warmup_steps", "weight_decay", "clip")
        _require(self.lr > 0, "optimizer.lr", self.lr, "more than 0")
        _require(
            0 <= self.final_lr_fraction <= 1,
            "optimizer.final_lr_fraction",
            self.final_lr_fraction,
            "from 0 to 1",
        )


@dataclass(frozen=True)
class EngineConfig:
    """Where and how DeepSpeed runs."""

    ranks: int = 1
    """Processes that share each batch."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What they share of the training state: nothing, the optimizer's, gradients too, weights too."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of products; weights and optimizer are float32. `auto`: as of `target.dtype`."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the ranks compute; with `cuda` rank r has GPU r."""

    num_threads: int = 2
    """CPU threads of each rank."""

    def __post_init__(self) -> None:
        _require_at_least(self, "engine", 1, "ranks", "num_threads")


@dataclass(frozen=True)
class TrainingConfig:
    """One YAML file: everything about a training run."""

    target: TrainedTargetConfig
    """The target that the drafter is for."""

    texts: TextsConfig
    """What it is trained on."""

    out: str
    """Folder for checkpoints, the drafter, its curves and where it comes from. A run that finds its own goes on."""

    method: TrainingMethod = "eagle3"
    """What is trained."""

    head: TrainedHeadConfig = field(default_factory=TrainedHeadConfig)
    """The drafter's LM head."""

    eagle3: Eagle3Config = field(default_factory=Eagle3Config)
    """Options of `eagle3`."""

    mtp: MtpConfig = field(default_factory=MtpConfig)
    """Options of `mtp`."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Options of `parallel`."""

    medusa: MedusaConfig = field(default_factory=MedusaConfig)
    """Options of `medusa1` and `medusa2`."""

    start_from: str = ""
    """A drafter of this kind and shape to go on from, instead of a fresh one, written like `draft.eagle3.model` of a
    run that serves: a folder, `shipped:NAME` or a Hugging Face id. One with another LM head gives everything else (a
    pair term the rows of ids that both have), and the head starts as a fresh one does."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How it is trained."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    """Processes, number formats, threads."""

    seed: int = 0
    """Of random starts and of the order of texts."""

    log_every: int = 10
    """Steps between lines of the log."""

    eval_every: int = 200
    """Steps between measurements on the held-out texts."""

    checkpoint_every: int = 200
    """Steps between checkpoints; the last two are kept."""

    def __post_init__(self) -> None:
        _require(bool(self.out), "out", self.out, "a folder")
        _require(
            self.texts.features != "kept" or self.method != "medusa2",
            "texts.features",
            self.texts.features,
            "another one where method is medusa2, which trains the target itself",
        )
        for name in ("log_every", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            _require(value >= 1, name, value, "at least 1")
