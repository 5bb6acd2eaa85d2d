"""The data server: part of the desk's thread, reads the pool, writes the records that change it.

    a main group solved sometimes ─▶ seeds ─▶ propose ticket ─▶ text ─▶ checks ─▶ label ─┐
        main ticket ◀─ pool ◀─ accepted? ◀─ score ticket ◀──────────────────────────────┘
                                  └▶ all of a propose ticket's are settled: `ready` with its rewards

`turn` looks at what waits and writes what follows from it; a learner that died in between does so
again. Nothing here waits for anything, and every queue has a bound. What to ask is asking.py's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from common.records import AnyRecord, Drop, Halt, Proposal, Ready
from learner.config import LearnerConfig
from learner.ledger import Ledger
from learner.prompts.stream import Prompts
from learner.synthesis.asking import Asking, share
from learner.synthesis.checks import clusters, leaks
from learner.synthesis.label import Labeller, Opinion, majority, same
from learner.synthesis.pool import SETTLED, Made, Pool, worn
from learner.synthesis.reward import diversity, in_band, unusable, worth
from learner.synthesis.texts import Texts

log = logging.getLogger("isentrope.synthesis")

LEAST_AUDITED = 8  # labels, before their error is an estimate
NO_MAJORITY = "no majority"


class Synthesis:
    """Raises ConfigError when a labeller cannot be loaded."""

    def __init__(
        self,
        config: LearnerConfig,
        pool: Pool,
        ledger: Ledger,
        prompts: Prompts,
        write: Callable[[AnyRecord], None],
    ) -> None:
        assert config.synthesis is not None, "synthesis is off"
        self._settings, self._seed = config.synthesis, prompts.seed
        self._pool, self._ledger, self._write = pool, ledger, write
        self._texts = Texts(config, prompts)
        self.asking = Asking(config, pool, ledger, self._texts, self._seed)
        self._labeller = Labeller(self._settings.labeller)
        self._auditor = Labeller(self._settings.auditor)
        self._pending: set[str] = set()  # proposals whose label is on its way
        self._golds: dict[str, str] = {}  # … and what it is to be once it is audited
        self._seen = -1  # how much of the pool's life `turn` has looked at
        self._said_barren = False

    def turn(self) -> None:
        """Write every record that is due."""
        heard = [*self._labeller.hear()], [*self._auditor.hear()]
        if self._seen == self._pool.changes and not any(heard):
            return
        if self._seen < 0:
            self._recheck()
        self._reject_unknown()
        self._seen = self._pool.changes
        for opinion in heard[0]:
            self._label(opinion)
        for opinion in heard[1]:
            self._audited(opinion)
        if self._pool.state.halted:
            self._clear_up()
            return
        for made in list(self._pool.state.made.values()):
            self._advance(made)
        for id_, asked in list(self._pool.state.asked.items()):
            if asked.admitted and all(made.state in SETTLED for made in self._pool.of(id_)):
                self._settle(id_, asked.source)
        self._watch()

    def close(self) -> None:
        self._labeller.close()
        self._auditor.close()

    def _recheck(self) -> None:
        """What fitted under the settings of an earlier start need not fit under these."""
        for made in list(self._pool.state.made.values()):
            waits = made.state in ("extracted", "labelled") and made.score < 0
            if waits and self._texts.draft(made) is None:
                self._reject(made, "too long")

    def _reject_unknown(self) -> None:
        """Groups that the pool does not know: synthesis was off since their tickets were issued."""
        known = self._pool.state.asked
        for id_, entry in list(self._ledger.open.items()):
            waits = entry.group is not None and not entry.scores
            if entry.ticket.kind == "propose" and waits and id_ not in known:
                log.warning("ticket %d was issued before synthesis was off; it is dropped", id_)
                self._write(Drop(ticket=id_, reason="surplus"))

    # ---- from state to state -----------------------------------------------------------------

    def _advance(self, made: Made) -> None:
        """One proposal, as far as it goes."""
        if made.state == "proposed":
            self._read(made)
        if made.state in ("extracted", "labelled") and made.lost:
            self._reject(made, made.lost)
        if made.state == "extracted" and made.id not in self._pending:
            self._look_for_label(made)
        if made.state == "labelled":
            self._score(made)
        if made.state == "scored":
            self._judge(made)
        if made.state == "active" and (reason := worn(made, self._pool.state.t, self._settings)):
            self._record(made, "expired", reason)

    def _read(self, made: Made) -> None:
        asked = self._pool.state.asked[made.ticket]
        rollout = self._ledger.open[made.ticket].item.group.rollouts[made.rollout]
        text, reason = self._texts.statement(rollout, asked)
        if text:
            others = [m.text for m in self._pool.state.made.values() if m.text]
            others += [parent.text for parent in self._pool.state.seeds]
            reason = self._texts.objection(text, made, asked, others)
        if reason:
            self._record(made, "rejected", reason, text=text)
        else:
            self._record(made, "extracted", text=text, parent=asked.parent)

    def _look_for_label(self, made: Made) -> None:
        label = self._settings.label
        if label == "consensus" and not made.answers:
            return  # its score ticket is on its way
        self._pending.add(made.id)
        if label == "program_verified":
            self._labeller.ask(made.id, made.text)
        elif label == "inherited":
            self._label(Opinion(made.id, self._pool.state.asked[made.ticket].gold))
        else:
            self._label(Opinion(made.id, self._majority(made)[0], NO_MAJORITY))

    def _majority(self, made: Made) -> tuple[str, float]:
        """What the answers to it agree on, and the share of the commonest one."""
        return majority([self._texts.answer(said) for said in made.answers])

    def _label(self, opinion: Opinion) -> None:
        made = self._pool.state.made.get(opinion.id)
        if made is None or made.state != "extracted":
            return
        parent = self._pool.state.asked[made.ticket]
        if not opinion.gold:
            self._reject(made, opinion.why)
        elif self._settings.label != "inherited" and leaks(made.text, opinion.gold, parent.text):
            self._reject(made, "gives the answer away")
        elif self._auditor and share(self._seed, "audit", made.id) < self._settings.audited:
            self._golds[made.id] = opinion.gold
            self._auditor.ask(made.id, made.text)
        else:
            self._record(made, "labelled", gold=opinion.gold, origin=self._settings.label)

    def _audited(self, opinion: Opinion) -> None:
        made, gold = self._pool.state.made.get(opinion.id), self._golds.pop(opinion.id, "")
        if made is None or made.state != "extracted":
            return
        verdict = ("right" if same(opinion.gold, gold) else "wrong") if opinion.gold else ""
        self._record(made, "labelled", gold=gold, origin=self._settings.label, audit=verdict)

    def _score(self, made: Made) -> None:
        p = self._majority(made)[1] if self._settings.label == "consensus" else made.found
        if p is not None:
            self._record(made, "scored", p=p)

    def _judge(self, made: Made) -> None:
        p = made.p
        assert p is not None, "it was scored"
        if in_band(p, self._settings.accept):
            self._record(made, "active")
        else:
            self._reject(made, "too easy" if p > self._settings.accept[1] else "too hard")

    def _reject(self, made: Made, reason: str) -> None:
        self._record(made, "rejected", reason)

    def _record(self, made: Made, state: Any, reason: str = "", **found: Any) -> None:
        if state in SETTLED:
            self._pending.discard(made.id)
        self._write(
            Proposal(ticket=made.ticket, rollout=made.rollout, state=state, reason=reason, **found)
        )

    # ---- the proposer's reward ---------------------------------------------------------------

    def _settle(self, id_: int, source: str) -> None:
        """Everything that a propose ticket proposed is settled: what its rollouts are worth."""
        scores = self._rewards(self._pool.of(id_), source)
        if not self._settings.proposers:
            self._write(Drop(ticket=id_, reason="surplus"))
        elif len(set(scores)) == 1:
            self._write(Drop(ticket=id_, reason="zero_variance"))
        else:
            self._write(Ready(ticket=id_, scores=scores))

    def _rewards(self, made: list[Made], source: str) -> tuple[float, ...]:
        known = [diversity(each.p) for each in made if each.p is not None]
        mean = math.fsum(known) / len(known) if known else 0.0
        baseline = self._pool.state.baselines.get(source, mean)
        alike = clusters([self._texts.print(each.text or each.id) for each in made])
        return tuple(
            self._reward(each, cluster, baseline) for each, cluster in zip(made, alike, strict=True)
        )

    def _reward(self, made: Made, cluster: float, baseline: float) -> float:
        settings = self._settings
        if made.p is not None:
            return worth(made.p, cluster=cluster, baseline=baseline, config=settings)
        if made.reason == NO_MAJORITY and settings.reward == "r_zero":
            return worth(
                self._majority(made)[1], cluster=cluster, baseline=baseline, config=settings
            )
        if made.reason == "duplicate" and settings.reward == "diversity":
            return -settings.duplicate
        return unusable(cluster, settings)

    # ---- when it does not work ---------------------------------------------------------------

    def _watch(self) -> None:
        """The end of synthesis when too many labels are wrong; a word when nothing comes of it."""
        state, settings, error = self._pool.state, self._settings, self._pool.label_error()
        if state.audited >= LEAST_AUDITED and (error or 0.0) > settings.max_label_error:
            reason = (
                f"{state.wrong} of {state.audited} audited labels are wrong; "
                f"max_label_error = {settings.max_label_error:g}"
            )
            log.error("synthesis is off from here on: %s; the originals go on", reason)
            self._write(Halt(reason=reason))
        barren = state.barren >= settings.patience
        if barren and not self._said_barren:
            log.warning(
                "the proposer brings nothing usable: no problem out of %d propose tickets in a "
                "row (isentrope synth says why); it is asked ever more seldom",
                state.barren,
            )
        self._said_barren = barren

    def _clear_up(self) -> None:
        """Synthesis is off: what is open ends, what the pool holds is not asked any more."""
        for made in list(self._pool.state.made.values()):
            if made.state == "active":
                self._record(made, "expired", "synthesis is off")
            elif made.state not in SETTLED:
                self._reject(made, "synthesis is off")
        for id_ in [id_ for id_, asked in self._pool.state.asked.items() if asked.admitted]:
            self._write(Drop(ticket=id_, reason="surplus"))
