"""The alphabet in which byte-level BPE writes bytes: printable ones as themselves, others from U+0100 on.

Source: `bytes_to_unicode` of https://github.com/openai/gpt-2/blob/master/src/encoder.py
"""

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = sorted(set(range(256)) - _PRINTABLE)

# Character of each byte, by value.
BYTE_TO_CHARACTER = [
    chr(byte) if byte in _PRINTABLE else chr(0x100 + _OTHERS.index(byte)) for byte in range(256)
]
CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}


def token_bytes(token: str) -> bytes:
    """Bytes that a token stands for; a token with other characters (a special one) stands for itself."""
    try:
        return bytes(CHARACTER_TO_BYTE[character] for character in token)
    except KeyError:
        return token.encode()
