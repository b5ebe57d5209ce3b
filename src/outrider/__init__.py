"""Outrider: distributed speculative decoding for language models too large for one GPU.

from outrider import Engine, load_config

with Engine.start(load_config("quickstart")) as engine:
    for piece in engine.stream("A lighthouse is"):
        print(piece.text, end="")

The names below are loaded on first use: importing the package loads neither torch nor ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outrider.cluster.api import EngineError as EngineError
    from outrider.cluster.api import GenerationRequest as GenerationRequest
    from outrider.cluster.api import Piece as Piece
    from outrider.cluster.client.async_client import AsyncClient as AsyncClient
    from outrider.cluster.client.client import Client as Client
    from outrider.cluster.engine import Engine as Engine
    from outrider.configs.loader import load_config as load_config
    from outrider.configs.schema import Config as Config
    from outrider.workers.answer import Completion as Completion
    from outrider.workers.sequences.params import SamplingParams as SamplingParams

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "Completion",
    "Config",
    "Engine",
    "EngineError",
    "GenerationRequest",
    "Piece",
    "SamplingParams",
    "__version__",
    "load_config",
]

_HOMES = {
    "AsyncClient": "outrider.cluster.client.async_client",
    "Client": "outrider.cluster.client.client",
    "Completion": "outrider.workers.answer",
    "Config": "outrider.configs.schema",
    "Engine": "outrider.cluster.engine",
    "EngineError": "outrider.cluster.api",
    "GenerationRequest": "outrider.cluster.api",
    "Piece": "outrider.cluster.api",
    "SamplingParams": "outrider.workers.sequences.params",
    "load_config": "outrider.configs.loader",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
