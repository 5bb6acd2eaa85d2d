"""One actor's day: take a ticket, generate its group, grade it, send it, keep it until it is acknowledged.

Read `loop.py` first, then `episode.py`, `fetch.py`, `engine/base.py`.
"""
