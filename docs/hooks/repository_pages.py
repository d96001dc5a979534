"""Files of the repository outside `docs/` as pages of the site, and links to them.

The pages are written for a repository: their links lead to files beside them. On the site, a link to a file that is a
page leads to that page. A link to any other file becomes the file's path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "project/overview.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "examples/README.md": "getting-started/examples.md",
    "benchmarks/README.md": "research/benchmarks.md",
    "benchmarks/LOG.md": "research/log.md",
}
_PATHS = {uri: path for path, uri in PAGES.items()}
_CODE_BLOCK = re.compile(r"(^```.*?^```)", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_SOURCE = re.compile(r'(src|srcset)="([^"]+)"')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to the site."""
    from mkdocs.structure.files import File

    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page into links of the site."""
    return site_links(markdown, uri=page.file.src_uri)


def site_links(markdown: str, *, uri: str) -> str:
    """Return the text of the page `uri` with its links turned into links of the site, but for those in code blocks."""

    def replaced(link: re.Match[str]) -> str:
        mark, text, target = link.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return link[0]
        if (found := _site_path(path, uri=uri)) is not None:
            return f"{mark}[{text}]({found}{hash_}{anchor})"
        file = _repository_path(path, uri=uri)
        return text if file in text else f"{text} (`{file}`)"

    def replaced_source(source: re.Match[str]) -> str:
        found = _site_path(source[2], uri=uri)
        return source[0] if found is None else f'{source[1]}="{found}"'

    pieces = _CODE_BLOCK.split(markdown)
    pieces[::2] = [_SOURCE.sub(replaced_source, _LINK.sub(replaced, piece)) for piece in pieces[::2]]
    return "".join(pieces)


def _site_path(path: str, *, uri: str) -> str | None:
    """Return the path from a page to the page or asset that a link names; None if the site has none."""
    file = _repository_path(path, uri=uri)
    target = file.removeprefix("docs/") if file.startswith("docs/") else PAGES.get(file)
    if target is None:
        # A file that does not exist keeps its link, which a strict build refuses.
        return None if (ROOT / file).exists() else path
    return posixpath.relpath(target, posixpath.dirname(uri) or ".")


def _repository_path(path: str, *, uri: str) -> str:
    home = _PATHS.get(uri, f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(home), path))
