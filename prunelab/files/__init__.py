"""Files: written whole or not at all (``atomic``), with a header that is checked when they are read (``header``)."""
