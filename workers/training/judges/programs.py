"""Records from programs with tests: faults that fail them, and other ways to write the same, which pass."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from outrider.workers.training.judges.edits import Edit, mistake_record, of_all_kinds, right_record
from outrider.workers.training.judges.mutations import Program
from outrider.workers.training.judges.records import SpanRecord
from outrider.workers.training.judges.tasks import Coding

# A fault may happen not to matter, and a variation to be none: more are tried than wanted.
_TRIES = 3


def program_records(
    task: Coding, most_wrong: int, most_right: int, seed: int, threads: int
) -> list[SpanRecord]:
    """Records of one task: its solution, faults in it and variations of it; none where the solution itself fails, or
    is no plain function."""
    code = task.solution
    try:
        program = Program(code)
    except ValueError:
        return []
    if not task.passes(code):
        return []
    generator = random.Random(f"{seed}/{task.id}")
    right = answer_with(code)
    lead = right.index(code)
    faults = of_all_kinds(
        [edit for edit in program.faults() if edit.apply(code) != code], _TRIES * most_wrong, generator
    )
    varied = {variation.code: variation.kind for variation in program.variations() if variation.code != code}
    whole = [Edit(kind, 0, len(code), other) for other, kind in varied.items()]
    others = of_all_kinds(whole, _TRIES * most_right, generator)
    records = [right_record(task.id, task.domain, task.prompt, right, "as written", 0)]
    with ThreadPoolExecutor(threads) as pool:
        passes = list(pool.map(lambda edit: task.passes(edit.apply(code)), [*faults, *others]))
    failing = [edit for edit, passed in zip(faults, passes, strict=False) if not passed]
    passing = [edit for edit, passed in zip(others, passes[len(faults) :], strict=True) if passed]
    for edit in failing[:most_wrong]:
        moved = Edit(edit.kind, edit.start + lead, edit.end + lead, edit.text, edit.num_marked)
        records.append(mistake_record(task.id, task.domain, task.prompt, right, moved, len(records)))
    for edit in passing[:most_right]:
        answer = answer_with(edit.text)
        records.append(right_record(task.id, task.domain, task.prompt, answer, edit.kind, len(records)))
    return records


def answer_with(code: str) -> str:
    """An answer as a chat model gives it."""
    return f"```python\n{code.rstrip()}\n```"
