"""Keeping the target's hidden rows beside texts: how large they are is said, and asked, before any is computed."""

import shutil
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import TaskProgressColumn, TimeElapsedColumn, TimeRemainingColumn

from outrider.cluster.cli.terminal import progress_bars, signs_of_life
from outrider.configs.schema import Config


class HiddenRows:
    """The rows that a command is to keep."""

    def __init__(self, config: Config, layers: str, dtype: str, yes: bool) -> None:
        """layers, dtype, yes: as on the command line. Raises ValueError for layers that the target does not have."""
        from outrider.workers.setup import read_model_config, torch_dtype
        from outrider.workers.training.kept_rows import hidden_bytes, parse_layers
        from outrider.workers.weights.progress import silent

        model = read_model_config(config, "target", silent)
        self._config = config
        self._layers = parse_layers(layers, model.num_layers)
        self._dtype = torch_dtype(config.target.dtype if dtype == "target" else dtype)
        self._hidden_size = model.hidden_size
        self._bytes_per_token = hidden_bytes(1, self._layers, model.hidden_size, self._dtype)
        self._yes = yes

    def announce(self, most_tokens: int) -> None:
        """Before texts are written: says how large the rows of so many output tokens become, and asks."""
        self._ask(f"at most {self._size(most_tokens)}, and those of the prompts", "Write the texts?")

    def keep(self, directory: Path) -> None:
        """Says the size, looks at the disk, asks, and writes the rows that are not there yet.

        Raises ValueError where the disk has too little room.
        """
        from outrider.workers.setup import load_model, torch_dtype
        from outrider.workers.training.features import TargetFeatures
        from outrider.workers.training.kept_rows import keep_features, kept_tokens
        from outrider.workers.training.texts import read_texts
        from outrider.workers.weights.progress import silent

        num_tokens = sum(len(text.tokens) for text in read_texts(directory))
        num_missing = num_tokens - kept_tokens(directory)
        if num_missing:
            free_bytes = shutil.disk_usage(directory).free
            if free_bytes < num_missing * self._bytes_per_token:
                raise ValueError(
                    f"--out must be on a disk with room for {self._size(num_missing)}, got {decimal(free_bytes)}"
                )
            self._ask(self._size(num_missing), "Write them?")
        target, console = self._config.target, Console(stderr=True)
        with progress_bars(console, TaskProgressColumn(), TimeRemainingColumn(), TimeElapsedColumn()) as bars:
            bar = bars.add_task("hidden rows", total=num_missing)

            def state() -> str:
                return f"hidden rows: {bars.tasks[0].completed:.0f} of {num_missing} tokens"

            with signs_of_life(console, state):
                source = load_model(self._config, "target", silent)
                threads = target.num_threads * target.tp_size
                features = TargetFeatures(source, self._layers, torch_dtype(target.dtype), threads)
                texts = read_texts(directory)
                keep_features(features, texts, directory, self._dtype, lambda done: bars.advance(bar, done))
        typer.echo(
            f"{directory}: hidden rows of {num_tokens} tokens, {decimal(num_tokens * self._bytes_per_token)}"
        )

    def _ask(self, size: str, question: str) -> None:
        """Raises ValueError where nobody can answer."""
        typer.echo(size, err=True)
        if self._yes:
            return
        if not sys.stdin.isatty():
            raise ValueError("--keep-hidden must come with --yes where nobody can be asked about its size")
        typer.confirm(question, abort=True, err=True)

    def _size(self, num_tokens: int) -> str:
        return (
            f"hidden rows of {num_tokens} tokens x {len(self._layers)} layers x {self._hidden_size} x "
            f"{self._dtype.itemsize} bytes = {decimal(num_tokens * self._bytes_per_token)}"
        )
