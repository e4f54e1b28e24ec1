"""README.md and docs: their pages, and the Python in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
README = (ROOT / "README.md").read_text()
BEFORE_AND_AFTER = "docs/migrate.md"  # whose blocks are pairs: tests/test_migrate.py


def blocks(pages: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", pages, flags=re.S)


_OF_PAGES = blocks("\n".join(page for name, page in PAGES.items() if name != BEFORE_AND_AFTER))
EXAMPLES = [*blocks(README), *(one for one in _OF_PAGES if "print(" in one)]  # whole programs: tests/test_readme.py
FRAGMENTS = [one for one in _OF_PAGES if "print(" not in one]  # of a reader's own models: tests/test_fragments.py
