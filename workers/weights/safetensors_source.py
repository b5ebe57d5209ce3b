"""Safetensors checkpoints: a directory with config.json and one file, or several with an index."""

import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.hf_directory import names_to_fetch, read_hf_config, weight_files
from outrider.workers.weights.quantization import format_of, stem
from outrider.workers.weights.safetensors_files import SafetensorsFiles, check_index
from outrider.workers.weights.source import CHUNK_ELEMENTS, Stored, bounds, read_scaled, unknown_tensor
from outrider.workers.weights.tensors import (
    EMBEDDING,
    HEAD,
    FoundTensor,
    check_tensors,
    is_harmless,
    loaded_bytes,
    stored_tensors,
    tensor_shapes,
)

# Types whose values mean themselves.
_READABLE = ("F64", "F32", "F16", "BF16")


class SafetensorsSource:
    """A directory with config.json and model.safetensors, or model.safetensors.index.json and its shards.

    Opening it reads the headers and compares the tensors with the configuration: see `check_tensors`.
    """

    def __init__(self, directory: Path, names: Collection[str] = ()) -> None:
        """`names`: the tensors that are wanted, so that files without them may be missing; none: the whole model."""
        self.directory = directory
        self._config = read_hf_config(directory)
        self._files = SafetensorsFiles(weight_files(directory, names_to_fetch(directory, names)))
        check_index(directory, self._files.entries)
        found = {name for name in self._files.entries if not is_harmless(name)}
        tied = self._config.tied_embeddings
        whole = tensor_shapes(replace(self._config, tied_embeddings=tied and HEAD not in found))
        shapes = {name: shape for name, shape in whole.items() if not names or name in names}
        # Names in the files by the names that they are asked for.
        self._stored_as: dict[str, str] = {}
        if tied and HEAD in names and HEAD not in found and EMBEDDING in found:
            shapes[HEAD] = whole[EMBEDDING]
            self._stored_as[HEAD] = EMBEDDING
        if tied and not names and EMBEDDING not in found and HEAD in found:
            del shapes[HEAD]
            self._stored_as[EMBEDDING] = HEAD
        expected = {
            stored_name: stored
            for name, shape in shapes.items()
            for stored_name, stored in stored_tensors(
                self._config, self._stored_as.get(name, name), shape
            ).items()
        }
        try:
            check_tensors(
                self._config.architecture,
                expected,
                {name: self._found(name) for name in found if not names or name in {*names, *expected}},
            )
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
        self._shapes = shapes
        if tied and not names and HEAD in shapes:
            self._settle_tied_head()

    @property
    def config(self) -> ModelConfig:
        return self._config

    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise unknown_tensor(name, self.directory)
        return self._shapes[name]

    def read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> torch.Tensor:
        shape = self.shape(name)
        start, stop = bounds(rows, shape[0])
        left, right = bounds(columns, shape[1]) if len(shape) > 1 else (0, 1)
        out = torch.empty(stop - start, right - left, dtype=dtype)
        self.read_into(name, slice(start, stop), slice(left, right), out)
        return out if len(shape) > 1 else out[:, 0]

    def read_into(self, name: str, rows: slice, columns: slice, out: torch.Tensor) -> None:
        shape, stored_name = self.shape(name), self._stored_name(name)
        start, stop = bounds(rows, shape[0])
        span = bounds(columns, shape[1]) if len(shape) > 1 else (0, 1)
        out = out.view(stop - start, span[1] - span[0])
        is_plain = format_of(self._config.quantization, stored_name) is None
        if is_plain and self._files.entries[stored_name].dtype == out.dtype:
            self._files.read_into(stored_name, (start, stop), span, out)
            return

        def read(first: int, last: int) -> None:
            part = (start + first, start + last)
            scaled = read_scaled(self, name, slice(*part), slice(*span))
            out[first:last] = (
                self._files.read(stored_name, part, span) if scaled is None else scaled.dequantised(out.dtype)
            )

        self._files.reader.each(stop - start, max(1, CHUNK_ELEMENTS // max(1, out.shape[1])), read)

    def read_stored(self, name: str, rows: slice, columns: slice) -> Stored:
        num_rows, num_columns = self.shape(name)
        part = bounds(rows, num_rows), bounds(columns, num_columns)
        stored_name = self._stored_name(name)
        form = format_of(self._config.quantization, stored_name)
        if form is None:
            return Stored(self._files.read(stored_name, *part), self._files.entries[stored_name].format, {})
        parts = {end: (stem(stored_name) + end, where) for end, where in form.parts(*part).items()}
        values, *scales = (self._files.read(tensor, *where) for tensor, where in parts.values())
        first, *rest = parts
        format_name = self._files.entries[parts[first][0]].format
        return Stored(values, format_name, dict(zip(rest, scales, strict=True)))

    def read_rows(self, name: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        num_rows, num_columns = self.shape(name)
        if format_of(self._config.quantization, self._stored_name(name)) is not None:
            return torch.cat([self.read(name, slice(i, i + 1), slice(None), dtype) for i in ids.tolist()])
        entry = self._files.entries[self._stored_name(name)]
        row_bytes = num_columns * entry.dtype.itemsize
        stored = torch.empty(len(ids), num_columns, dtype=entry.dtype)
        view = stored.view(torch.uint8).numpy().reshape(-1).data
        for i, row in enumerate(ids.tolist()):
            assert 0 <= row < num_rows, (name, row)
            entry.file.read_into(view[i * row_bytes : (i + 1) * row_bytes], entry.offset + row * row_bytes)
        return stored.to(dtype)

    def total_bytes(self, dtype: torch.dtype) -> int:
        return sum(loaded_bytes(self._config, name, shape, dtype) for name, shape in self._shapes.items())

    def _stored_name(self, name: str) -> str:
        return self._stored_as.get(name, name)

    def _found(self, stored: str) -> FoundTensor:
        entry = self._files.entries[stored]
        return FoundTensor(stored, entry.shape, entry.format, entry.format in _READABLE)

    def _settle_tied_head(self) -> None:
        """A second copy of the embedding is left out; a head of its own counts, as in transformers 5."""
        if self._are_equal(HEAD, EMBEDDING):
            del self._shapes[HEAD]
            return
        self._config = replace(self._config, tied_embeddings=False)
        warnings.warn(
            f"{self.directory}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; "
            f"{HEAD} is used",
            stacklevel=2,
        )

    def _are_equal(self, one: str, other: str) -> bool:
        rows, columns = self.shape(one)
        step = max(1, CHUNK_ELEMENTS // columns)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            if not torch.equal(*(self.read(x, part, slice(None), torch.float32) for x in (one, other))):
                return False
        return True
