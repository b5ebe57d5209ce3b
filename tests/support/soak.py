"""Kills a random worker, or the Coordinator, again and again while many streams run, and says how long nothing came.

PYTHONPATH=src:tests python -m support.soak --seconds 60 --every 5 --streams 16 [a.b=c ...]
"""

import argparse
import itertools
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

import psutil

from outrider.cluster.api import GenerationRequest
from outrider.cluster.engine import Engine
from outrider.configs.loader import load_config
from support.harm import PLAIN, Listener, all_stand, asked, kill

ACTORS = ("ray::TargetActor", "ray::DraftActor", "ray::Coordinator")
NUM_TEXTS = 8  # different ones; each is asked for by several streams
_SOON_S = 2.0  # tokens of before a kill may come for a moment


@dataclass(frozen=True)
class Report:
    """What a soak saw."""

    num_answers: int
    wrong: list[str]  # ends and texts that are not plain decoding's
    kills: list[str]  # process titles
    silences_s: list[float]  # after each kill, the longest time in which no stream got a token
    calm_s: list[float]  # of these, after kills of a whole deployment: the others hit one that was restarting

    def __str__(self) -> str:
        return (
            f"{self.num_answers} answers, {len(self.wrong)} wrong {self.wrong[:3]}; {len(self.kills)} kills; nothing "
            f"came for {_summary(self.silences_s)} after all, {_summary(self.calm_s)} after the {len(self.calm_s)} "
            "that hit a whole deployment"
        )


def _summary(seconds: list[float]) -> str:
    return f"{median(seconds):.1f} s (median), {max(seconds):.1f} s (worst)" if seconds else "-"


def soak(
    engine: Engine, seconds: float, every_s: float, num_streams: int, num_tokens: int, seed: int
) -> Report:
    """Kills workers for so long, then lets all streams end."""
    texts = [asked(number, num_tokens) for number in range(NUM_TEXTS)]
    plain = engine.generate([GenerationRequest(text.prompt, text.sampling, PLAIN) for text in texts])
    over, wrong, times_s = threading.Event(), [], []
    num_answers = itertools.count()

    def ask_again(stream: int) -> None:
        for turn in itertools.count(stream):
            if over.is_set():
                return
            number = turn % NUM_TEXTS
            listener = Listener(engine, texts[number])
            listener.join(600.0)
            times_s.extend(listener.times_s)
            next(num_answers)
            if tuple(listener.tokens) != plain[number].tokens or listener.text != plain[number].text:
                wrong.append(f"{listener.end or 'no end'} after {len(listener.tokens)} tokens")

    threads = [threading.Thread(target=ask_again, args=(stream,)) for stream in range(num_streams)]
    for thread in threads:
        thread.start()
    chance, kills, killed_s, was_whole = random.Random(seed), [], [], []
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < seconds:
        time.sleep(every_s)
        titles = _workers()
        workers = list(titles)
        if workers:
            pid = chance.choice(workers)
            killed_s.append(time.monotonic())
            was_whole.append(not engine.restarting and all_stand(engine))
            with suppress(ProcessLookupError):
                kill(pid)
            kills.append(titles[pid])
    over.set()
    for thread in threads:
        thread.join()
    silences_s = [_silence(sorted(times_s), since_s) for since_s in killed_s]
    calm_s = list(itertools.compress(silences_s, was_whole))
    return Report(next(num_answers), wrong, kills, silences_s, calm_s)


def _workers() -> dict[int, str]:
    """Process ids and titles of the workers that live now, also of those that only start."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if title.startswith(ACTORS):
                found[process.pid] = title
    return found


def _silence(times_s: list[float], since_s: float) -> float:
    """The longest time without a token that begins soon after a kill."""
    gaps = [
        after - max(before, since_s)
        for before, after in itertools.pairwise(times_s)
        if after > since_s and before < since_s + _SOON_S
    ]
    return max(gaps, default=0.0)


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    two_ranks = ["target.tp_size=2", "cluster.num_cpus_per_target=0.5"]
    with Engine.start(load_config("tiny-random", [*two_ranks, *given.overrides])) as engine:
        print(soak(engine, given.seconds, given.every, given.streams, given.tokens, given.seed), flush=True)
        print(engine.stats()["coordinator"])


if __name__ == "__main__":
    main()
