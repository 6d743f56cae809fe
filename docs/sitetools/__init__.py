"""What the site needs beyond Sphinx.

``gather`` copies notebooks and pages of the repository into git-ignored folders here; ``course`` and ``criteria`` write
pages from what the repository holds; ``names`` links names to the reference; ``links`` checks the finished site.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sitetools import course, criteria, gather


def setup(app: Any) -> dict[str, Any]:
    """Gather before Sphinx looks for pages, and listen to what autodoc finds."""
    from sitetools import beside, names  # they need Sphinx; tests of the others do without

    docs = Path(app.srcdir)
    gather.gather(docs.parent, docs)
    gather.write(docs / "generated" / "course.md", course.page(docs.parent))
    gather.write(docs / "generated" / "criteria.md", criteria.page(docs.parent))
    beside.setup(app)
    names.setup(app)
    logging.getLogger("sphinx.sphinx.directives.other").addFilter(_no_glob)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _no_glob(record: logging.LogRecord) -> bool:
    """Drop one warning: some tables of contents name pages, by a pattern, that need not be there."""
    return "toctree glob pattern" not in str(record.msg)
