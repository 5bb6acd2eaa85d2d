"""One paper, one file, one struct. `AnyMethod` is what `[[learner.methods]]` of a recipe may hold."""

from __future__ import annotations

from learner.methods.entropy_bonus import EntropyBonus

AnyMethod = EntropyBonus
