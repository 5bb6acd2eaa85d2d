"""One actor's day: take a ticket, generate its group, grade it, send it, keep it until it is
acknowledged.

Read `loop.py` first, then `work.py`, `episode.py`, `desk.py`, `line.py`, `fetch.py`,
`engine/base.py`, `grade/pool.py`.
"""
