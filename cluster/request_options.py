"""What a request asks besides its prompt, on top of the config's defaults; mistakes are one-line ValueErrors."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from types import MappingProxyType

from outrider.cluster.structured import grammar_of
from outrider.configs.loader import convert_fields
from outrider.configs.schema import Config
from outrider.workers.sequences.grammar import Grammar
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import AcceptanceOptions, DraftOptions

# Of one request. The OpenAI API takes 4 stop strings, vLLM any number.
MAX_STOP_STRINGS = 128
MAX_STOP_CHARACTERS = 4096  # of all stop strings together
MAX_STOP_TOKEN_IDS = 1024

_ANY_VOCABULARY = 2**31 - 1
_RULE_OF_FIELD = {"epsilon": "typical", "delta": "typical", "judge": "judge", "threshold": "judge"}

NOTHING_ASKED: Mapping[str, object] = MappingProxyType({})


def request_sampling(config: Config, asked: Mapping[str, object], vocab_size: int) -> SamplingParams:
    """`asked`: fields of SamplingParams that differ from the config's `sampling` section, but instead of `grammar`
    `structured_outputs`, see `structured.grammar_of`. As elsewhere `stop` may be one text, and `logit_bias` a mapping
    of token ids to values."""
    defaults = SamplingParams(**asdict(config.sampling))
    fields: object = asked
    structured = None
    if isinstance(asked, Mapping):
        fields = given = dict(asked)
        structured = given.pop("structured_outputs", None)
        if "grammar" in given:
            raise ValueError("unknown key sampling.grammar (did you mean structured_outputs?)")
        if isinstance(stop := given.get("stop"), str):
            given["stop"] = [stop]
        if isinstance(biases := given.get("logit_bias"), Mapping):
            given["logit_bias"] = list(biases.items())
    sampling = replace(defaults, **convert_fields(SamplingParams, fields, "sampling"))
    if structured is not None:
        sampling = replace(sampling, grammar=Grammar(grammar_of(structured)))
        if sampling.ignore_eos:
            raise ValueError(
                "sampling.ignore_eos must be false where there are structured_outputs: what is complete must end, "
                "got True"
            )
    _require_at_most("sampling.stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids")
    _require_at_most("sampling.stop", len(sampling.stop), MAX_STOP_STRINGS, "strings")
    _require_at_most("sampling.stop", sum(map(len, sampling.stop)), MAX_STOP_CHARACTERS, "characters")
    sampling.validate(vocab_size)
    return sampling


def request_draft(config: Config, asked: Mapping[str, object]) -> DraftOptions:
    """`asked`: fields of DraftOptions that differ from the config."""
    draft, tree = config.draft, config.tree
    defaults = DraftOptions(draft.methods, tree.max_nodes, tree.max_depth)
    options = replace(defaults, **convert_fields(DraftOptions, asked, "draft"))
    for method in options.methods:
        if method not in draft.methods:
            allowed = ", ".join(draft.methods) or "none"
            raise ValueError(f"draft.methods must be among the deployment's ({allowed}), got {method!r}")
    _require_in_range("draft.max_nodes", options.max_nodes, 0, tree.max_nodes)
    _require_in_range("draft.max_depth", options.max_depth, 1, tree.max_depth)
    return options


def request_acceptance(
    config: Config, asked: Mapping[str, object], calibrated: Mapping[str, float]
) -> AcceptanceOptions:
    """`asked`: fields of AcceptanceOptions; `calibrated`: the thresholds of the judges, by their names.

    Raises ValueError, naming the field, for what the config's `acceptance` section does not allow.
    """
    bounds = config.acceptance
    given = convert_fields(AcceptanceOptions, asked, "acceptance")
    options = AcceptanceOptions(**given)
    if options.rule not in bounds.rules:
        allowed = ", ".join(bounds.rules)
        raise ValueError(
            f"acceptance.rule must be among the deployment's acceptance.rules ({allowed}), got {options.rule!r}"
        )
    for field, rule in _RULE_OF_FIELD.items():
        if field in given and options.rule != rule:
            raise ValueError(
                f"acceptance.{field} must be left out unless acceptance.rule is {rule}, got {given[field]!r}"
            )
    if options.rule == "typical":
        _require_as_strict("epsilon", options.epsilon, bounds.min_epsilon)
        _require_as_strict("delta", options.delta, bounds.min_delta)
    if options.rule != "judge":
        return options
    names = [judge.name for judge in bounds.judges]
    judge = options.judge or (names[0] if len(names) == 1 else "")
    if judge not in names:
        raise ValueError(f"acceptance.judge must be one of {', '.join(names)}, got {options.judge!r}")
    threshold = given.get("threshold", max(calibrated[judge], bounds.min_threshold))
    _require_as_strict("threshold", threshold, bounds.min_threshold)
    return replace(options, judge=judge, threshold=threshold)


def check_options(
    config: Config,
    sampling: Mapping[str, object],
    draft: Mapping[str, object],
    acceptance: Mapping[str, object] = NOTHING_ASKED,
) -> SamplingParams:
    """Finds mistakes before a deployment is started, as far as the config alone tells; the door knows the model.

    Returns what `sampling` comes to.
    """
    params = request_sampling(config, sampling, _ANY_VOCABULARY)
    request_draft(config, draft)
    request_acceptance(config, acceptance, {judge.name: 1.0 for judge in config.acceptance.judges})
    max_context = config.target.max_context
    if max_context <= params.max_tokens:
        raise ValueError(
            f"prompt and sampling.max_tokens must be at most {max_context} tokens together "
            f"(target.max_context), got sampling.max_tokens = {params.max_tokens}"
        )
    return params


def _require_in_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{field} must be in [{low}, {high}], got {value}")


def _require_as_strict(field: str, value: float, least: float) -> None:
    if not least <= value <= 1:  # NaN, too
        raise ValueError(
            f"acceptance.{field} must be in [{least}, 1], the least being the deployment's acceptance.min_{field}, "
            f"got {value}"
        )


def _require_at_most(field: str, number: int, most: int, of_what: str) -> None:
    if number > most:
        raise ValueError(f"{field} must have at most {most} {of_what}, got {number}")
