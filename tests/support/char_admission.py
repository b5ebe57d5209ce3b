"""A door for texts of ASCII: a token is a character."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.cluster.admission import Admission
from outrider.cluster.api import ServedModel
from outrider.cluster.text import Decoder
from outrider.cluster.text_bound import TextBound
from outrider.configs.schema import Config
from outrider.workers.sampling.grammars import Grammars
from outrider.workers.weights.token_texts import TokenTexts

EOS_TOKEN_IDS = (0,)


class CharTokenizer:
    """A token is a character."""

    chat_template = "fake, reads tools"
    bos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(char) for char in text]

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(token)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool,
        tokenize: bool,
        **arguments: object,
    ) -> str:
        assert add_generation_prompt
        assert not tokenize
        told = [f"[{name}={value}]" for name, value in arguments.items()]
        return "".join([*told, *(f"<{message['role']}>{message['content']}" for message in messages)])


class CharDecoder:
    def add(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


class CharBound(TextBound):
    def __init__(self) -> None: ...

    def exceeds(self, text: str, max_tokens: int) -> bool:
        return len(text) > 10 * max_tokens


@dataclass(frozen=True)
class CharAdmission(Admission):
    def decoder(self) -> Decoder:
        return CharDecoder()

    def describe(self) -> ServedModel:
        return ServedModel(self.max_context, tuple(bytes([code]) for code in range(self.vocab_size)))


def char_admission(config: Config, report: Callable[[str, int, int], None]) -> CharAdmission:
    """What `prepare_admission` gives, for texts of ASCII."""
    report("download", 1, 1)
    tokenizer: Any = CharTokenizer()
    texts = TokenTexts(tuple(bytes([code]) for code in range(128)), EOS_TOKEN_IDS, EOS_TOKEN_IDS)
    limit, grammars = config.target.max_context, Grammars(128, lambda: texts)
    return CharAdmission(config, tokenizer, CharBound(), 128, limit, EOS_TOKEN_IDS, grammars)
