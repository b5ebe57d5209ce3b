"""YAML file or preset name, plus `a.b=c` overrides, to a `Config`; every mistake is a one-line ValueError."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from outrider.configs.schema import Config
from outrider.configs.training import TrainingConfig

T = TypeVar("T", Config, TrainingConfig)

PRESETS_DIR = Path(__file__).parent
HEADS_DIR = PRESETS_DIR / "heads"
JUDGES_DIR = PRESETS_DIR / "judges"
MODELS_DIR = PRESETS_DIR / "known_models"
RECIPES_DIR = PRESETS_DIR / "recipes"
VOCABULARIES_DIR = PRESETS_DIR / "vocabularies"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB)")
_SIZE_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SCALAR_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as the number that it is in YAML 1.2 and in everybody's mind; in YAML 1.1 it is a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def preset_names() -> list[str]:
    """Names of the configs that ship with the package."""
    return _names_in(PRESETS_DIR)


def recipe_names() -> list[str]:
    """Names of the training runs that ship with the package."""
    return _names_in(RECIPES_DIR)


def shipped_heads() -> list[str]:
    """Names of the draft heads that ship with the package, each in a folder of `HEADS_DIR`."""
    return sorted(path.parent.name for path in HEADS_DIR.glob("*/config.json"))


def shipped_judges() -> list[str]:
    """Names of the judges that ship with the package, each in a folder of `JUDGES_DIR`."""
    return sorted(path.parent.name for path in JUDGES_DIR.glob("*/judge.json"))


def shipped_vocabularies() -> list[str]:
    """Names of the trimmed vocabularies that ship with the package, each in a folder of `VOCABULARIES_DIR`."""
    return sorted(path.parent.name for path in VOCABULARIES_DIR.glob("*/ids.json"))


def load_config(config: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The run described by `config`, a path of a YAML file or a preset name, with `a.b=c` overrides applied.

    Raises ValueError naming the key and the allowed values.
    """
    if isinstance(overrides, str):  # would be read letter by letter
        raise ValueError(f"overrides must be a list of a.b=c texts, got {overrides!r}")
    return build_config(Config, _find(config, PRESETS_DIR), overrides)


def load_training(config: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """The training run described by a YAML file or a recipe's name, with `a.b=c` overrides applied.

    Raises ValueError naming the key and the allowed values.
    """
    return build_config(TrainingConfig, _find(config, RECIPES_DIR), overrides)


def build_config(kind: type[T], path: Path, overrides: Sequence[str]) -> T:
    """A YAML file with `a.b=c` overrides as a dataclass of this kind."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        one_line = " ".join(str(error).split())
        raise ValueError(f"config {str(path)!r} is not valid YAML: {one_line}") from error
    tree = _mapping({} if values is None else values, "")
    for override in overrides:
        _apply_override(tree, override, kind)
    built: T = _build(kind, tree, "")
    return built


def config_from_dict(values: Mapping[str, object]) -> Config:
    """Checks keys and types of nested plain values (as YAML gives them) and builds the Config."""
    built: Config = _build(Config, values, "")
    return built


def config_to_yaml(config: Config | TrainingConfig) -> str:
    """The complete config, defaults included, as YAML that `load_config` or `load_training` reads back."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _find(config: str | Path, shipped: Path) -> Path:
    names = _names_in(shipped)
    if not isinstance(config, str | Path):
        raise ValueError(f"config must be a YAML file or one of {', '.join(names)}; got {config!r}")
    path = Path(config).expanduser()
    if path.is_file():
        return path
    name = str(config)
    if name in names:
        return shipped / f"{name}.yaml"
    hint = _did_you_mean(name, names)
    raise ValueError(f"config must be a YAML file or one of {', '.join(names)}; got {name!r}{hint}")


def _names_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _apply_override(tree: dict[str, Any], override: str, kind: Any) -> None:
    key, separator, text = override.partition("=")
    names = key.strip().split(".")
    if not separator or not all(names):
        raise ValueError(f"an override must look like a.b=c, got {override!r}")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    section = tree
    for depth, name in enumerate(names[:-1]):
        section[name] = _mapping(section.get(name, {}), ".".join(names[: depth + 1]))
        section = section[name]
    # `target.model=2024` and `draft.model=` are texts: whoever wants a number there gets one from the text.
    section[names[-1]] = text if value is None or _is_text_field(names, kind) else value


def _is_text_field(names: Sequence[str], kind: Any) -> bool:
    for name in names:
        if not dataclasses.is_dataclass(kind):
            return False
        kind = typing.get_type_hints(kind).get(name)
    return kind is str


def convert_fields(cls: Any, values: object, key: str) -> dict[str, Any]:
    """Plain values (as YAML or JSON give them) as field values of dataclass `cls`; a subset of the fields.

    key: what messages call the object, such as "sampling". Raises ValueError naming key and allowed values.
    """
    hints = typing.get_type_hints(cls)
    prefix = f"{key}." if key else ""
    converted = {}
    for name, value in _mapping(values, key).items():
        if name not in hints:
            keys = ", ".join(hints)
            hint = _did_you_mean(str(name), hints)
            raise ValueError(f"unknown key {prefix}{name}{hint}; allowed in {key or 'a config'}: {keys}")
        converted[name] = _convert(hints[name], value, prefix + name)
    return converted


def _build(cls: Any, values: object, key: str) -> Any:
    converted = convert_fields(cls, values, key)
    for field in dataclasses.fields(cls):
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and field.name not in converted:
            prefix = f"{key}." if key else ""
            raise ValueError(f"missing key {prefix}{field.name}: every config must set it")
    return cls(**converted)


def _convert(kind: Any, value: object, key: str) -> Any:
    """`value` as the annotated type `kind`."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, key)
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        # True == 1 in Python, but not in a config.
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        allowed = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{key} must be one of {allowed}; got {value!r}{_did_you_mean(str(value), choices)}")
    if origin is tuple:
        return _convert_tuple(typing.get_args(kind), value, key)
    if kind is int and key.endswith("_bytes") and isinstance(value, str):
        return _size_bytes(value, key)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{key} must be a number of less than 309 digits") from error
    if type(value) is not kind:
        raise ValueError(f"{key} must be {_describe(kind)}, got {value!r}")
    return value


def _convert_tuple(elements: tuple[Any, ...], value: object, key: str) -> tuple[Any, ...]:
    """`elements` as in tuple[X, ...] (any number of X) or tuple[X, Y] (exactly these)."""
    repeated = elements[-1] is Ellipsis
    if not isinstance(value, list | tuple) or not (repeated or len(value) == len(elements)):
        allowed = _describe_several(elements[0]) if repeated else " and ".join(map(_describe, elements))
        raise ValueError(f"{key} must be a list of {allowed}, got {value!r}")
    kinds = elements[:1] * len(value) if repeated else elements
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_convert(kind, item, f"{key}[{index}]") for index, (kind, item) in pairs)


def _size_bytes(text: str, key: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{key} must be a number of bytes or a size such as 512MiB or 2GiB, got {text!r}")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def _mapping(value: object, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key or 'a config'} must be a mapping of keys to values, got {value!r}")
    return dict(value)


def _describe_several(kind: Any) -> str:
    """`_describe`, of any number of them."""
    return f"{_SCALAR_NAMES[kind].split()[-1]}s" if kind in (str, int, float) else _describe(kind)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(str(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"[{', '.join(map(_describe, typing.get_args(kind)))}]"
    return _SCALAR_NAMES[kind]


def _did_you_mean(word: str, choices: Iterable[object]) -> str:
    close = difflib.get_close_matches(word, [str(choice) for choice in choices], n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _plain(value: object) -> object:
    """YAML's own types: tuples become lists."""
    match value:
        case dict():
            return {name: _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value
