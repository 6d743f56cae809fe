"""The command line of the experiments: ``python -m prunelab sweep FILE``, ``python -m prunelab report FOLDER``."""

import sys

from prunelab.experiments.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
