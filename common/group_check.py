"""Whether a group that an actor sent can be true: shape, turns, tokens, versions, rewards."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from common.episodes import PLAIN, Episode
from common.errors import WireError
from common.grading import is_reward
from common.wire import Columns, Group, Rollout, Segment, Ticket


def check_group(group: Group, ticket: Ticket, vocab_size: int, clock_version: int) -> None:
    """Refuse a group that lies: raises WireError with a reason word.

    `clock_version` is the newest version ever announced; a token from a later one is a lie.
    """
    if (group.kind, group.problem) != (ticket.kind, ticket.problem):
        raise WireError("mismatch", f"ticket {ticket.id} asks {ticket.kind} {ticket.problem!r}")
    if len(group.rollouts) != ticket.n:
        raise WireError("count", f"{len(group.rollouts)} rollouts for a ticket of {ticket.n}")
    rollouts, episode = group.all, ticket.episode or PLAIN
    segments = [segment for rollout in rollouts for segment in rollout.segments]
    for rollout in group.rollouts:
        _check_length(rollout.segments, ticket.sampling.max_tokens, episode.turns)
    if group.hinted:
        _check_hinted(group.hinted, ticket, episode)
    _check_rewards(rollouts, episode.turns)
    _check_spans(segments, clock_version)
    columns = group.columns
    if columns.rollouts is not group.rollouts:  # it was made here, not received
        columns = Columns(
            np.concatenate([segment.tokens for segment in segments]),
            np.concatenate([segment.logps for segment in segments]),
        )
    _check_tokens(columns.tokens, vocab_size)
    _check_logps(columns.logps)


def _check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    most = np.maximum.reduce(tokens.view(np.uint32), initial=0)  # below 0 is far above as unsigned
    if most >= vocab_size:
        raise WireError("vocabulary", f"a token outside [0, {vocab_size})")


def _check_logps(logps: np.ndarray) -> None:
    most = np.maximum.reduce(logps, initial=-1.0)  # NaN wins both
    least = np.minimum.reduce(logps, initial=-1.0)
    if not math.isfinite(least) or not math.isfinite(most):
        raise WireError("nan", "a log-probability is not finite")
    if most > 1e-3:
        raise WireError("logprob", "a log-probability above 0")


def _check_rewards(rollouts: tuple[Rollout, ...], turns: int) -> None:
    graded = [rollout for rollout in rollouts if not rollout.error]
    numbers = [value for r in graded for part in r.parts for value in part.values()]
    if not all(map(is_reward, [*numbers, *[rollout.correct for rollout in rollouts]])):
        raise WireError("nan", "a part of the reward is not a number, or a huge one")
    if any(not part for r in graded for part in r.parts):
        raise WireError("parts", "a map of rewards is empty")
    if turns > 1 and any(len(r.parts) != r.turn + 1 for r in graded):
        raise WireError("parts", "a rollout has not one map of rewards a turn")


def _check_length(
    segments: tuple[Segment, ...], max_tokens: int, turns: int, answers: int = 0
) -> None:
    """Of one rollout: arrays of one size, turns that rise and that the ticket asks for, no more
    sampled tokens than those may have (or so many `answers` of one turn), none trained on that
    nobody sampled.
    """
    if not segments:
        raise WireError("empty", "a rollout without a segment")
    sampled = turn = 0
    for segment in segments:
        size, mask = segment.tokens.size, segment.mask
        if segment.logps.size != size or (mask is not None and mask.size != size):
            masked = size if mask is None else mask.size
            sizes = f"{size} tokens, {segment.logps.size} log-probs, mask of {masked}"
            raise WireError("length", sizes)
        if not 0 < segment.temperature < math.inf:
            raise WireError("temperature", f"{segment.temperature}")
        if segment.turn != turn:
            if not turn < segment.turn < turns:
                raise WireError("turn", f"{segment.turn} after {turn}; the ticket has {turns}")
            turn = segment.turn
        if segment.role == "policy":
            sampled += size
        elif mask is not None and mask.any():
            raise WireError("mask", f"a {segment.role} segment has tokens to train on")
    if sampled > max_tokens * (answers or turn + 1):
        raise WireError("length", f"{sampled} sampled tokens; the ticket allows {max_tokens}")


def _check_hinted(hinted: tuple[Rollout, ...], ticket: Ticket, episode: Episode) -> None:
    """At most one for each rollout, each with hints in it, as many and as long as was asked."""
    if episode.intervene is None or len(hinted) > ticket.n:
        raise WireError("hints", f"{len(hinted)} hinted rollouts that the ticket does not ask for")
    for rollout in hinted:
        sizes = [s.tokens.size for s in rollout.segments if s.role == "hint"]
        if not 1 <= len(sizes) <= episode.hints or max(sizes) > episode.intervene.hint_tokens:
            raise WireError("hints", f"hints of {sizes} tokens")
        _check_length(rollout.segments, ticket.sampling.max_tokens, 1, 1 + len(sizes))


def _check_spans(segments: list[Segment], clock_version: int) -> None:
    """First token 0, rising, inside the segment; versions between 0 and the newest."""
    for segment in segments:
        spans = segment.spans
        if not spans or spans[0][0] != 0 or (len(spans) > 1 and not _rise(segment)):
            raise WireError("spans", f"version spans {spans} of {segment.tokens.size} tokens")
    versions = [version for segment in segments for _, version in segment.spans]
    if min(versions) < 0 or max(versions) > clock_version:
        raise WireError("version", f"{max(versions)}; the newest version is {clock_version}")


def _rise(segment: Segment) -> bool:
    firsts = [first for first, _ in segment.spans]
    return firsts[-1] < segment.tokens.size and all(a < b for a, b in pairwise(firsts))
