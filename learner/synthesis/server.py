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
from learner.inbox import SUSPECT
from learner.ledger import Ledger
from learner.prompts.stream import Prompts
from learner.synthesis.asking import Asking, share
from learner.synthesis.checks import leaks
from learner.synthesis.earnings import Earnings
from learner.synthesis.label import FAULT, NO_MAJORITY, Labeller, Opinion, same
from learner.synthesis.pool import SETTLED, Made, Pool, worn
from learner.synthesis.reward import in_band
from learner.synthesis.texts import Texts

log = logging.getLogger("isentrope.synthesis")

LEAST_AUDITED = 8  # labels, before their error is an estimate
OTHER_STAGE = "labelled by another stage"
STAYS_OFF = "it was ended before for wrong labels, and for the whole run"
ENDED = ("rejected", "expired")


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
        self._earnings = Earnings(self._settings, pool, self._texts)
        self._labeller = Labeller(self._settings.labeller)
        self._auditor = Labeller(self._settings.auditor)
        self._pending: set[str] = set()  # proposals whose label is on its way
        self._golds: dict[str, str] = {}  # … and what it is to be once it is audited
        self.begun = -1  # the step that is trained just now, or was last
        self._seen = -1  # how much of the pool's life `turn` has looked at
        self._said_barren = False
        if not self._auditor and self._settings.label != "program_verified":
            log.warning(
                'labels are "%s" and learner.synthesis.auditor names nobody: how many are wrong '
                "will not be known, and nothing ends synthesis when many are",
                self._settings.label,
            )

    def turn(self) -> None:
        """Write every record that is due."""
        heard = [*self._labeller.hear()], [*self._auditor.hear()]
        if self._seen == self._pool.changes and not any(heard):
            return
        if self._seen < 0:
            self._recheck()
            if self._ledger.halted is not None and not self._pool.state.halted:
                log.warning("synthesis stays off: %s", STAYS_OFF)  # a pool begun anew
                self._halt(STAYS_OFF)
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
        """What fitted under the settings of an earlier start need not fit under these. Labels of
        two stages are never in one pool.
        """
        for made in list(self._pool.state.made.values()):
            waits = made.state in ("extracted", "labelled") and made.score < 0
            if self._is_labelled_otherwise(made):
                self._retire(made, OTHER_STAGE)
            elif waits and self._texts.draft(made) is None:
                self._reject(made, "too long")

    def _is_labelled_otherwise(self, made: Made) -> bool:
        """By an earlier start with another `label`; or its score ticket was to make the label."""
        label = self._settings.label
        asked = made.state == "extracted" and made.score >= 0 and label != "consensus"
        return asked or (made.origin not in ("", label) and made.state not in ENDED)

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
            self._record(made, "extracted", "passed the checks", text=text, parent=asked.parent)

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
            gold, _, why = self._texts.agreed(made)
            self._label(Opinion(made.id, gold, why or NO_MAJORITY))

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
            self._is_labelled(made, opinion.gold)

    def _audited(self, opinion: Opinion) -> None:
        made, gold = self._pool.state.made.get(opinion.id), self._golds.pop(opinion.id, "")
        if made is None or made.state != "extracted":
            return
        verdict = ("right" if same(opinion.gold, gold) else "wrong") if opinion.gold else ""
        self._is_labelled(made, gold, audit=verdict)

    def _is_labelled(self, made: Made, gold: str, audit: str = "") -> None:
        label = self._settings.label
        self._record(made, "labelled", label, gold=gold, origin=label, audit=audit)

    def _score(self, made: Made) -> None:
        p, why = made.found, ""
        if self._settings.label == "consensus":
            _, p, why = self._texts.agreed(made)
        if why:
            self._reject(made, why)
        elif p is not None:
            self._record(made, "scored", "answered", p=p)

    def _judge(self, made: Made) -> None:
        p = made.p
        assert p is not None, "it was scored"
        if in_band(p, self._settings.accept):
            self._record(made, "active", "of the accepted difficulty")
        else:
            self._reject(made, "too easy" if p > self._settings.accept[1] else "too hard")

    def _reject(self, made: Made, reason: str) -> None:
        self._record(made, "rejected", reason)

    def _retire(self, made: Made, reason: str) -> None:
        """It is not asked any more, or never."""
        self._record(made, "expired" if made.state == "active" else "rejected", reason)

    def _record(self, made: Made, state: Any, reason: str, **found: Any) -> None:
        if state in SETTLED:
            self._pending.discard(made.id)
        self._write(
            Proposal(ticket=made.ticket, rollout=made.rollout, state=state, reason=reason, **found)
        )

    # ---- the proposer's reward ---------------------------------------------------------------

    def _settle(self, id_: int, source: str) -> None:
        """Everything that a propose ticket proposed is settled: what its rollouts are worth. One
        that nobody could judge is worth what the others are on average: nothing is learned from it.
        """
        scores = self._earnings.of(self._pool.of(id_), source)
        judged = [score for score in scores if score is not None]
        if not self._settings.proposers:
            self._write(Drop(ticket=id_, reason="surplus"))
        elif not judged:
            self._write(Drop(ticket=id_, reason=FAULT))
        elif len(set(judged)) == 1:
            self._write(Drop(ticket=id_, reason="zero_variance"))
        else:
            mean = math.fsum(judged) / len(judged)
            filled = tuple(mean if score is None else score for score in scores)
            self._write(Ready(ticket=id_, scores=filled))

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
            self._halt(reason)
        barren = state.barren >= settings.patience
        if barren and not self._said_barren:
            log.warning(
                "the proposer brings nothing usable: no problem out of %d propose tickets in a "
                "row (isentrope synth says why); it is asked ever more seldom",
                state.barren,
            )
        self._said_barren = barren

    def _halt(self, reason: str) -> None:
        """From the first step on that has not begun: a batch that is trained on just now was
        determined before.
        """
        t = self._ledger.t
        self._write(Halt(reason=reason, t=t + (self.begun == t)))

    def _clear_up(self) -> None:
        """Synthesis is off: what is open ends, what the pool holds is not asked any more. Groups
        that hang on its labels are the batch rule's to drop, whenever they come.
        """
        ledger, state = self._ledger, self._pool.state
        holds = ledger.halted is not None and ledger.halted <= ledger.t
        if not holds and ledger.t != self.begun:
            self._halt(state.halted)  # the step that had begun then never ended: it begins again
        for made in [made for made in state.made.values() if made.state not in ENDED]:
            self._retire(made, "synthesis is off")
        for id_ in [id_ for id_, asked in state.asked.items() if asked.admitted]:
            self._write(Drop(ticket=id_, reason=SUSPECT))
