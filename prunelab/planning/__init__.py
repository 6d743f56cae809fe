"""From scores and a budget to a plan: ``choose`` decides which units go, ``plan`` is what it decided, as plain data."""
