"""Check the links of the finished site: ``python docs/sitetools/links.py out/site``.

Every link inside the site must lead to a file that is there, and to a place in it that has that name.  Those that lead
out are left to ``sphinx-build -b linkcheck``, which ``--online`` says whether to run: it asks for one of them.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

OUTSIDE = ("http", "https", "mailto", "data", "javascript")


class Page(HTMLParser):
    """What one page links to, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of a tag."""
        given = dict(attrs)
        self.names.update(value for key in ("id", "name") if (value := given.get(key)))
        for key in ("href", "src"):
            if given.get(key):
                self.links.append(given[key] or "")


def pages(site: Path) -> dict[Path, Page]:
    """Return every page of the site by its path."""
    found = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.relative_to(site).parts]
    return {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in found}


def broken(site: Path) -> Iterator[str]:
    """Yield what is wrong with each link that leads nowhere."""
    known = pages(site)
    for path, page in known.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme in OUTSIDE or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            where = path.relative_to(site.resolve())
            if not target.is_file():
                yield f"{where}: {link}: there is no such file"
            elif target in known and unquote(parts.fragment) not in known[target].names | {"", "top"}:
                yield f"{where}: {link}: there is no such place in it"


def outside(site: Path) -> list[str]:
    """Return the addresses that the site links to, each once."""
    links = (link for page in pages(site).values() for link in page.links)
    return sorted({link for link in links if urlsplit(link).scheme in ("http", "https")})


def online(site: Path, timeout: float = 5) -> bool:
    """Return whether one of the addresses that the site links to can be reached."""
    for address in outside(site)[:3]:
        try:
            urllib.request.urlopen(address, timeout=timeout).close()
        except urllib.error.HTTPError:
            return True  # somebody answered
        except OSError:
            continue
        else:
            return True
    return False


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="the folder that sphinx-build wrote")
    parser.add_argument("--online", action="store_true", help="succeed if addresses outside can be reached")
    args = parser.parse_args()
    if args.online:
        return 0 if online(args.site) else 1
    found = list(broken(args.site))
    for line in found:
        print(line)
    number = len(pages(args.site))
    print(f"links on {number} pages: " + (f"{len(found)} broken" if found else "all lead somewhere"))
    return 1 if found or not number else 0


if __name__ == "__main__":
    sys.exit(main())
