"""Text of others on a terminal: what a terminal would obey is shown instead."""

_KEPT = "\n\t"
# C0 control characters and DEL as their pictures; C1, which terminals obey as well, have none.
_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in _KEPT},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def printable(text: str) -> str:
    """The text without power over a terminal: control characters, line feed and tab excepted, as symbols.

    A model or a file may say ESC ] or CSI: that sets titles, moves the cursor, or hides what stands there.
    """
    return text.translate(_PICTURES)
