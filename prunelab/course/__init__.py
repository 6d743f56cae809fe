"""The course: what the notebooks show and check.

``figures`` draws, ``widgets`` redraws at a slider's move, ``exercises`` checks what a reader writes, ``notebook``
runs and saves notebooks.  The library imports nothing from here.
"""
