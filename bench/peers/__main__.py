"""All tables, or those that are named: `python -m bench.peers [--quick] [--data full] [tracing moments …]`."""

from bench.peers.command import main

main()
