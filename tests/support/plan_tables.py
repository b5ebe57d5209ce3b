"""Tables of docs/large-models.md that `outrider plan` makes; `python tests/support/plan_tables.py` writes them."""

import re
import sys
from pathlib import Path

from typer.testing import CliRunner

from outrider.cluster.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "large-models.md"
_BLOCK = re.compile(r"(<!-- outrider plan (\S+) -->\n).*?(?=<!-- end -->)", re.S)


def with_tables(page: str) -> str:
    """The page with what each command prints now."""
    return _BLOCK.sub(lambda block: block[1] + CliRunner().invoke(app, ["plan", block[2]]).stdout, page)


if __name__ == "__main__":
    sys.exit(PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8") == 0)
