"""All at once: ``prune`` traces, scores, plans, cuts and fine-tunes, once or in steps.

``schedule`` says how much is left after each step, ``report`` what happened, ``state`` keeps a run on disk so that it
can be resumed, and ``seeds`` makes a resumed run end like one that was never stopped.
"""
