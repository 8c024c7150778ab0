"""What mkdocs needs beside docs/: pages from elsewhere in the repository, and links to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "benchmarks/README.md": "benchmarks.md",
    "studies/README.md": "studies.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Pages of the site by their file."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from elsewhere."""
    for name, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the pages of the site; what is none of them loses its link."""
    names = {page: name for name, page in ELSEWHERE.items()}
    folder = (ROOT / names.get(page.file.src_uri, "docs/x")).parent

    def place(found: re.Match[str]) -> str:
        text, target, anchor = found["text"], found["target"], found["anchor"] or ""
        path = (folder / target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return f"[{text}]({path.relative_to(ROOT / 'docs')}{anchor})"
        known = ELSEWHERE.get(str(path.relative_to(ROOT)))
        return f"[{text}]({known}{anchor})" if known else text

    link = r"\[(?P<text>[^\]]*)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)]*)?\)"
    return re.sub(link, place, markdown)
