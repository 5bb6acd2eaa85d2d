"""From a question to the tokens that are sent: instruction, chat template, tokenizer, once.

What an actor samples follows these tokens directly; nothing is rendered or tokenised again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import DataError
from learner.prompts.config import PromptsConfig
from learner.prompts.templates import PLACE, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ANSWER = "answer"  # any word: what the template puts behind it ends a turn


class Renderer:
    """Raises DataError when a chat template is asked for and there is none, or it is broken."""

    def __init__(self, config: PromptsConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        self._config, self._tokenizer = config, tokenizer
        has_one = bool(getattr(tokenizer, "chat_template", None))
        if config.chat is True and not has_one:
            raise DataError(
                "learner.prompts.chat = true, but the model's tokenizer has no chat template: "
                'copy its chat_template.jinja into the model folder, or set chat = "auto"'
            )
        self.chat = has_one if config.chat == "auto" else config.chat
        self.stop = self._turn_end() if self.chat else ()

    def __call__(self, question: str, template: Template | None = None) -> np.ndarray:
        """int32 [P], up to where the model goes on; in the words of `template`, or the recipe's."""
        text = "\n".join(part for part in (question, self._config.instruction) if part)
        if template is None:
            return self._ids(self._config.system, text, self._config.prefill)
        user = template.user.replace(PLACE, text)
        return self._ids(template.system, user, template.prefill)

    def _ids(self, system: str, user: str, prefill: str) -> np.ndarray:
        if self.chat:
            text = self._templated([*_system(system), _turn("user", user)], add=True)
        else:
            text = f"{system}\n{user}" if system else user
        ids = self._tokenizer(text + prefill, add_special_tokens=False)["input_ids"]
        return np.asarray(ids, np.int32)

    def _turn_end(self) -> tuple[int, ...]:
        """The special token that the template writes behind an answer: it stops one."""
        system = _system(self._config.system)
        turns = [*system, _turn("user", "question"), _turn("assistant", _ANSWER)]
        _, _, rest = self._templated(turns, add=False).rpartition(_ANSWER)
        ids = self._tokenizer(rest, add_special_tokens=False)["input_ids"]
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        return tuple(ids[:1]) if set(ids[:1]) <= special else ()

    def _templated(self, turns: list[dict[str, str]], add: bool) -> str:
        try:
            text: Any = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add
            )
        except Exception as error:  # noqa: BLE001  a model's own template may raise anything
            raise DataError(f"the model's chat template: {type(error).__name__}: {error}") from None
        return str(text)


def _system(text: str) -> list[dict[str, str]]:
    return [_turn("system", text)] if text else []


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
