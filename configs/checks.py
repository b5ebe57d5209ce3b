"""How a configuration's sections refuse values."""


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """ValueError, one line, unless it holds."""
    if not holds:
        raise ValueError(f"{key} must be {allowed}, got {value!r}")


def require_at_least(config: object, section: str, minimum: int, *names: str) -> None:
    """Of fields of a section, by their names."""
    for name in names:
        value = getattr(config, name)
        require(value >= minimum, f"{section}.{name}", value, f"at least {minimum}")
