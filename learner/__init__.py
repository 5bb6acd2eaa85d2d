"""One learner's step: take a batch, train on it, record it, publish the new version.

Read `loop.py` first, then `desk.py` (the socket thread), `ledger.py`, `step.py`, `methods/base.py`.
"""
