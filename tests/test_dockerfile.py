"""The Dockerfile, which nothing here builds: what it copies is there and sent, and all that the package needs."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTRUCTIONS = {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER"}


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def test_its_instructions_are_known_and_begin_with_a_base() -> None:
    words = [word for word, _ in instructions()]
    assert set(words) <= INSTRUCTIONS
    assert words[0] == "FROM"


def test_what_it_copies_is_in_the_repository_and_not_kept_out() -> None:
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in sent, name
    folders = {path.name for path in (ROOT / "src" / "outrider").iterdir() if path.is_symlink()}
    assert folders | {"pyproject.toml", "constraints.txt", "src"} <= set(copied)


def test_its_python_and_its_extra_are_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (base,) = (rest for word, rest in instructions() if word == "FROM")
    version = re.search(r"python:(\d+\.\d+)", base)
    assert version is not None
    assert project["requires-python"] == f">={version[1]}"
    extras = re.findall(r"'\.\[(\w+)\]'", " ".join(rest for _, rest in instructions()))
    assert extras == ["cluster"]
    assert set(extras) <= project["optional-dependencies"].keys()
