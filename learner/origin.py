"""What a step says about where its problems came from: by template and by source.

Accuracy, length and format score are of all main groups that the batch rule looked at, since those
it passed over were asked too; the entropy is of the tokens trained on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from common.wire import Group
from learner.batch import Batch
from learner.config import LearnerConfig
from learner.measure import Metrics
from learner.overlong import facts as overlong_facts
from learner.prompts.templates import FORMAT
from learner.table import Table


def of_step(batch: Batch, table: Table, config: LearnerConfig) -> Metrics:
    """What only the step knows: entropies, and what was done to long answers."""
    groups = [item.group for item in batch.items[: batch.main_groups]]
    found: Metrics = {}
    if config.overlong is not None:
        found["overlong"] = overlong_facts(groups, config.overlong, config.max_tokens)
    for name, numbers in _by_origin(groups, config).items():
        here = table.main & torch.isin(table.group, torch.tensor(numbers).to(table.group))
        if here.any():
            found[name] = {"entropy": float(table.H[here].double().mean())}
    return found


def of_answers(groups: Sequence[Group], config: LearnerConfig) -> dict[str, dict[str, float]]:
    """What the answers themselves say. Those whose grader failed say nothing."""
    found: dict[str, dict[str, float]] = {}
    for name, numbers in _by_origin(groups, config).items():
        answers = [r for number in numbers for r in groups[number].rollouts if not r.error]
        count = max(1, len(answers))
        facts = {
            "groups": float(len(numbers)),
            "correct": sum(r.correct for r in answers) / count,
            "length": sum(r.length for r in answers) / count,
        }
        formats = [r.parts[-1][FORMAT] for r in answers if r.parts and FORMAT in r.parts[-1]]
        if formats:
            facts["format"] = sum(formats) / len(formats)
        found[name] = facts
    return found


def _by_origin(groups: Sequence[Group], config: LearnerConfig) -> dict[str, list[int]]:
    """Numbers of the groups behind each line; none where there is nothing to compare."""
    found: dict[str, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        if config.prompts.templates is not None:
            found[f"templates/{group.template}"].append(number)
        if config.prompts.sources:
            found[f"sources/{group.source}"].append(number)
    return dict(sorted(found.items()))
