"""A program that starts a deployment and streams until somebody ends it; its first line says that it does."""

from outrider.cluster.engine import Engine
from outrider.configs.loader import load_config

if __name__ == "__main__":
    overrides = ["target.tp_size=2", "cluster.num_cpus_per_target=0.5", "cluster.start_timeout_s=300"]
    with Engine.start(load_config("tiny-random", overrides)) as engine:
        while True:
            for _ in engine.stream("once upon a time", {"max_tokens": 450, "ignore_eos": True}):
                print("streams", flush=True)
