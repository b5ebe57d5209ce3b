"""Configuration: every kind of mistake is one line that names the key and what it may be."""

import re
from pathlib import Path

import pytest
import yaml

from outrider.configs.loader import (
    config_from_dict,
    config_to_yaml,
    load_config,
    load_training,
    preset_names,
    recipe_names,
)
from outrider.configs.schema import DraftConfig, RoundsConfig


@pytest.mark.parametrize("preset", preset_names())
def test_presets_load_and_survive_being_printed(preset: str) -> None:
    config = load_config(preset)
    assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipes_load_and_survive_being_printed(recipe: str, tmp_path: Path) -> None:
    config = load_training(recipe)
    (tmp_path / "printed.yaml").write_text(config_to_yaml(config))
    assert load_training(str(tmp_path / "printed.yaml")) == config


def test_presets_for_gpus_wait_for_compilers_and_captures() -> None:
    for preset in preset_names():
        config = load_config(preset)
        if config.target.device == "cuda":
            assert config.cluster.group_timeout_s >= 300.0, preset


SHARED = ["draft.placement=shared"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["target.device=cuda"],
            "cluster.num_gpus_per_target must be more than 0, because target.device is cuda",
        ),
        (
            ["draft.device=cuda"],
            "cluster.num_gpus_per_draft must be more than 0, because draft.device is cuda",
        ),
        (
            [
                "target.device=cuda",
                "cluster.num_gpus_per_target=1",
                "target.all_reduce=shm",
                "target.tp_size=2",
            ],
            "target.all_reduce must be auto, nccl or gloo, because ranks compute on GPUs, got 'shm'",
        ),
        (
            [
                "target.device=auto",
                "cluster.num_gpus_per_target=0.5",
                "target.all_reduce=auto",
                "target.tp_size=2",
            ],
            "cluster.num_gpus_per_target must be more than 0.5, because nccl wants a GPU for each rank",
        ),
        (
            ["draft.tp_size=2", "draft.device=cuda", "cluster.num_gpus_per_draft=0.5"],
            "cluster.num_gpus_per_draft must be more than 0.5, because nccl wants a GPU for each rank "
            "(draft.all_reduce gloo does not), got 0.5",
        ),
        (
            [
                "draft.tp_size=2",
                "draft.device=cuda",
                "cluster.num_gpus_per_draft=1",
                "draft.all_reduce=shm",
            ],
            "draft.all_reduce must be auto, nccl or gloo, because ranks compute on GPUs, got 'shm'",
        ),
        (
            [*SHARED, "cluster.num_gpus_per_target=1", "cluster.num_gpus_per_draft=1"],
            "cluster.num_gpus_per_draft must be below cluster.num_gpus_per_target (1), of which it is a part, "
            "got 1.0",
        ),
        (
            [*SHARED, "cluster.num_gpus_per_target=2", "cluster.num_gpus_per_draft=0.5"],
            "cluster.num_gpus_per_target must be above 0 and at most 1, because draft.placement is shared, got 2",
        ),
        (
            [*SHARED, "draft.tp_size=2"],
            "draft.tp_size must be at most target.tp_size (1), because draft.placement is shared, got 2",
        ),
        (
            [
                *SHARED,
                "target.tp_size=2",
                "draft.tp_size=2",
                "target.all_reduce=gloo",
                "draft.device=cuda",
                "cluster.num_gpus_per_target=0.5",
                "cluster.num_gpus_per_draft=0.2",
            ],
            "cluster.num_gpus_per_target must be more than 0.5, because nccl wants a GPU for each rank "
            "(draft.all_reduce gloo does not), got 0.5",
        ),
        (
            ["draft.tp_size=2", "draft.methods=[ngram]"],
            "draft.tp_size must be 1, because draft.methods has no `model`, got 2",
        ),
    ],
)
def test_gpus_that_are_not_there_and_sums_that_they_cannot_make_are_refused(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config("tiny-random", overrides)


def test_ranks_may_share_a_gpu_with_gloo() -> None:
    half = [
        "target.device=cuda",
        "cluster.num_gpus_per_target=0.5",
        "target.all_reduce=gloo",
        "target.tp_size=2",
    ]
    assert load_config("tiny-random", half).cluster.num_gpus_per_target == 0.5


def test_replicas_may_have_drafters_that_share_their_gpus() -> None:
    replicas = ["replicas.max_replicas=2", "cluster.num_gpus_per_target=1", "cluster.num_gpus_per_draft=0.3"]
    load_config("tiny-random", [*SHARED, *replicas])
    with pytest.raises(ValueError, match=r"cluster\.num_gpus_per_draft must be a whole number"):
        load_config("tiny-random", replicas)


def test_the_documented_presets_ship() -> None:
    documented = {
        "quickstart",
        "qwen-coder-cpu",
        "llama3-70b-h100x8",
        "llama3-405b-h100x8",
        "llama3-405b-h100x8-shared",
        "mellum2-12b",
        "mellum2-12b-tp2",
        "tiny-random",
    }
    assert documented <= set(preset_names())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "target.tp_sise=2",
            r"unknown key target.tp_sise \(did you mean tp_size\?\); allowed in target: model,",
        ),
        (
            "targets.tp_size=2",
            r"unknown key targets \(did you mean target\?\); allowed in a config: target, draft",
        ),
        ("draft.ngram.min_mach=2", r"unknown key draft.ngram.min_mach \(did you mean min_match\?\)"),
        ("target.tp_size=two", "target.tp_size must be an integer, got 'two'"),
        ("target.tp_size=1.5", "target.tp_size must be an integer, got 1.5"),
        ("target.tp_size=true", "target.tp_size must be an integer, got True"),
        ("target.tp_size=0", "target.tp_size must be at least 1, got 0"),
        ("cluster.max_open_requests=0", "cluster.max_open_requests must be at least 1, got 0"),
        ("rounds.draft_ahead=maybe", "rounds.draft_ahead must be true or false, got 'maybe'"),
        ("sampling.temperature=hot", "sampling.temperature must be a number, got 'hot'"),
        (
            "target.dtype=bfloat61",
            r"target.dtype must be one of float32, bfloat16, .* \(did you mean bfloat16\?\)",
        ),
        ("rounds.lanes=3", "rounds.lanes must be one of 1, 2; got 3"),
        ("rounds.lanes=true", "rounds.lanes must be one of 1, 2; got True"),
        (
            "draft.methods=[ngrm]",
            r"draft.methods\[0\] must be one of ngram, model, medusa, eagle3, mtp, parallel; got 'ngrm'",
        ),
        (
            "draft.methods=ngram",
            "draft.methods must be a list of ngram or model or medusa or eagle3 or mtp or parallel, got 'ngram'",
        ),
        ("draft.methods=[ngram,ngram]", "draft.methods must be without repetition"),
        (
            "draft.methods=[model]",
            "draft.model must be a checkpoint, because draft.methods has `model`, got ''",
        ),
        (
            "draft.methods=[medusa]",
            "draft.medusa.model must be a checkpoint, because draft.methods has `medusa`, got ''",
        ),
        ("tree=3", "tree must be a mapping of keys to values, got 3"),
        (
            "target.kv_cache_bytes=3GB",
            "must be a number of bytes or a size such as 512MiB or 2GiB, got '3GB'",
        ),
        (
            "draft.ngram.max_match=0",
            r"draft.ngram.max_match must be at least draft.ngram.min_match \(1\), got 0",
        ),
        ("rounds.max_round_tokens=8", "rounds.max_round_tokens must be at least rounds.max_sequences and"),
        ("rounds.profile_node_counts=[2,1]", "rounds.profile_node_counts must be increasing from 1"),
        ("cluster.num_cpus_per_target=0", "cluster.num_cpus_per_target must be more than 0, got 0"),
        ("target.model=", "target.model must be a checkpoint"),
        ("tp_size", "an override must look like a.b=c, got 'tp_size'"),
        (".=1", "an override must look like a.b=c, got '.=1'"),
    ],
)
def test_a_mistake_is_one_line_naming_the_key_and_what_it_may_be(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config("quickstart", [override])
    assert "\n" not in str(caught.value)


def test_overrides_reach_their_fields() -> None:
    overrides = [
        "target.tp_size=1",
        "draft.methods=[ngram, model]",
        "draft.model=2024",
        "draft.ngram.max_match=6",
        "target.kv_cache_bytes=1.5GiB",
        "sampling.temperature=1",
    ]
    config = load_config("quickstart", overrides)
    assert config.target.tp_size == 1
    assert config.draft.methods == ("ngram", "model")
    assert config.draft.model == "2024"
    assert config.draft.ngram.max_match == 6
    assert config.target.kv_cache_bytes == 3 * 2**29
    assert type(config.sampling.temperature) is float


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("2E3", 2e3), ("+1.e+1", 10.0), ("3.5e-1", 0.35)]
)
def test_a_number_may_have_an_exponent(text: str, value: float, tmp_path: Path) -> None:
    assert load_config("quickstart", [f"sampling.temperature={text}"]).sampling.temperature == value
    file = tmp_path / "run.yaml"
    file.write_text(f"target: {{model: some}}\nsampling: {{temperature: {text}}}\n")
    assert load_config(str(file)).sampling.temperature == value
    assert load_config("quickstart", ["draft.model=1e5"]).draft.model == "1e5"


def test_an_override_can_empty_a_text_and_a_list() -> None:
    config = load_config("tiny-random", ["draft.methods=[]", "draft.model="])
    assert config.draft.methods == ()
    assert config.draft.model == ""


def test_an_unknown_preset_is_told_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"one of .*quickstart.*; got 'quikstart' \(did you mean quickstart\?\)"
    ):
        load_config("quikstart")


def test_a_file_needs_its_target(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("draft:\n  methods: []\n")
    with pytest.raises(ValueError, match="missing key target"):
        load_config(str(path))
    path.write_text("target:\n  tp_size: 2\n")
    with pytest.raises(ValueError, match=r"missing key target\.model"):
        load_config(str(path))


@pytest.mark.parametrize("text", ["target: [", "- a\n- b\n", "just a text", "\x00"])
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="config") as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


def test_an_empty_file_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing yet\n")
    with pytest.raises(ValueError, match="missing key target"):
        load_config(str(path))


def test_ranges_hold_for_configs_made_in_python() -> None:
    with pytest.raises(ValueError, match=r"draft\.num_threads must be at least 1"):
        DraftConfig(num_threads=0)
    with pytest.raises(ValueError, match=r"rounds\.max_sequences must be at least 1"):
        RoundsConfig(max_sequences=0)
