"""The playground at `/`: one page that loads nothing from anywhere, and may not."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "playground"
_SCRIPTS = ("tokens.js", "tree.js", "busy.js", "page.js")


@dataclass(frozen=True)
class Page:
    """What a browser gets."""

    content: str
    headers: Mapping[str, str]


def playground() -> Page:
    """The page, with its style and its scripts inside. A browser runs these and no others: the policy names them by
    their hashes, and with trusted types no text becomes markup, whatever a model writes."""
    style = _read("page.css")
    script = "\n".join(_read(name) for name in _SCRIPTS)
    content = _read("page.html").replace("/*style*/", style).replace("/*script*/", script)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Page(content, headers)


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """As a Content-Security-Policy names the content of an element (https://www.w3.org/TR/CSP3/)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
