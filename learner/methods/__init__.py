"""One paper, one file, one struct. `AnyMethod`: what `[[learner.methods]]` may hold."""

from __future__ import annotations

from learner.methods.entropy_bonus import EntropyBonus

AnyMethod = EntropyBonus
