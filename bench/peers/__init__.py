"""prunelab beside its peers, in one run: `make bench`, or `python -m bench.peers`, or one table alone.

Every module here that ends up in the page has `TITLE`, `about()`, `rows(setting)`, `markdown(rows)` and
`ratios(rows)`, and runs alone: `python -m bench.peers.moments --quick`.  `TABLES` lists them in the order of the page.
Peers are imported where they are called; without one of them its columns say so.
"""

TABLES = ("tracing", "moments", "kfac", "products", "surgery", "quality", "memory", "speedup", "growth")
"""The modules of this package that measure something."""
