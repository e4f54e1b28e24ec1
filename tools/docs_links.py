"""mkdocs' hook: `docs/guide.md` and the like in a page, which stand so that they read anywhere, become links."""

from __future__ import annotations

import os
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    def link(found: re.Match[str]) -> str:
        to = os.path.relpath(found[1], os.path.dirname(page.file.src_path) or ".")
        return f"[{found[0]}]({to})"

    parts = re.split(r"(```.*?```)", markdown, flags=re.S)  # code stays
    return "".join(x if x.startswith("```") else re.sub(r"(?<!\[)`docs/([\w/]+\.md)`(?!\])", link, x) for x in parts)
