"""Section `server` of a configuration: what `outrider serve` listens to, and what it takes on at a time."""

from dataclasses import dataclass
from typing import Literal

from outrider.configs.checks import require, require_at_least


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP server in front of the deployment, in OpenAI's terms."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface of the machine."""

    port: int = 8000
    """TCP port; 0 takes a free one and prints it."""

    model_name: str = ""
    """The model's name for clients; empty: `target.model` as it stands."""

    thoughts: Literal["tags", "open", "none"] = "tags"
    """What of a chat's answer is told apart as `reasoning`: `tags`, what stands between <think> and </think> at its
    beginning; `open`, all up to </think>, for models whose chat template writes <think> itself; `none`, nothing."""

    calls: Literal["auto", "hermes", "llama3"] = "auto"
    """How the model writes calls of tools: `hermes`, <tool_call>{"name", "arguments"}</tool_call>, as Qwen's models
    and Mellum 2 do; `llama3`, {"name", "parameters"} as the whole answer; `auto`, as its chat template says."""

    api_keys_file: str = ""
    """A file with an API key per line, of which a client must send one as `Authorization: Bearer KEY`; blank lines
    and lines that begin with # mean nothing. Empty: anybody who reaches the address is served. Probes need no key."""

    max_body_bytes: int = 8 * 2**20
    """Largest body of a request, in bytes. YAML may say `8MiB`."""

    max_buffered_bytes: int = 256 * 2**20
    """Bodies of all requests under way together, in bytes; beyond it requests are answered 429."""

    max_choices: int = 64
    """Most answers that one request may ask for: its prompts times `n`."""

    max_concurrent: int = 256
    """Most answers under way at a time, those that wait for a place in `rounds.max_sequences` included; beyond it
    requests are answered 429."""

    max_request_s: float = 600.0
    """Seconds after which a request ends with an error, whatever it waits for, its own body included."""

    retry_after_s: int = 1
    """Seconds after which a client that was answered 429 is told to come again."""

    shutdown_s: float = 10.0
    """Seconds that answers under way get to end in when the server is told to stop."""

    def __post_init__(self) -> None:
        require(bool(self.host), "server.host", self.host, "an address, such as 127.0.0.1")
        require(0 <= self.port <= 65535, "server.port", self.port, "in [0, 65535]")
        require_at_least(
            self, "server", 1, "max_body_bytes", "max_choices", "max_concurrent", "retry_after_s"
        )
        require_at_least(self, "server", self.max_body_bytes, "max_buffered_bytes")
        require(
            self.max_choices <= self.max_concurrent,
            "server.max_choices",
            self.max_choices,
            f"at most server.max_concurrent ({self.max_concurrent})",
        )
        for name in ("max_request_s", "shutdown_s"):
            require(getattr(self, name) > 0, f"server.{name}", getattr(self, name), "more than 0")
