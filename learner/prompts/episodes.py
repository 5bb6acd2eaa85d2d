"""What a ticket says of later turns and hints, in tokens: rendered once, here, in the model's own
chat template where it has one.

    …assistant: ANSWER <end> | <user turn> WORDS <end> <assistant turn> |  next answer
                       `end`   `open`            `close`

An answer that stopped by itself brings its end with it, so that the next turn goes on from the very
tokens that were sampled. What an answer was made to begin with (a prefill) stands before each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from common.episodes import Episode, Feedback, Intervene, Voice, progressive
from common.errors import ConfigError, DataError
from common.wire import Kind
from learner.prompts.config import PromptsConfig
from learner.turns import FeedbackConfig, InterveneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ANSWER, _WORDS = "an answer of somebody", "the words of another"  # places in a template


class Episodes:
    """Raises ConfigError for words that the tokenizer cannot write, DataError for a chat template
    that is broken."""

    def __init__(
        self,
        feedback: FeedbackConfig | None,
        intervene: InterveneConfig | None,
        prompts: PromptsConfig,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self._tokenizer, self._config = tokenizer, feedback
        has_one = bool(getattr(tokenizer, "chat_template", None))
        self._chat = has_one if prompts.chat == "auto" else prompts.chat
        self._system = prompts.system
        self._intervene = None if intervene is None else self._hints(intervene)
        self._begin: tuple[int, ...] = ()  # where the template lets an answer begin
        self._around = ("", "")  # text before and after the words of feedback
        self._feedback: Feedback | None = None
        if feedback is not None and feedback.turns > 1:
            self._feedback = self._render(feedback)

    def of(self, kind: Kind, prompt: np.ndarray, question: str) -> Episode | None:
        """What comes after the first answer to `prompt`; None: nothing. Training alone gets hints,
        and further turns unless the configuration says otherwise."""
        training = kind == "main"
        feedback = None
        if self._feedback is not None and self._config is not None:
            if training or (kind == "eval" and self._config.evaluate):
                feedback = self._asked(self._feedback, self._config, prompt, question)
            if feedback is not None and not training:
                feedback = msgspec.structs.replace(feedback, temperatures=())
        intervene = self._intervene if training else None
        if feedback is None and intervene is None:
            return None
        return Episode(feedback=feedback, intervene=intervene)

    def _asked(
        self, rendered: Feedback, config: FeedbackConfig, prompt: np.ndarray, question: str
    ) -> Feedback:
        """With this problem's own words in it, and what its answers begin with."""
        again = self._prefill(prompt)
        words = config.wrong.replace("{question}", question)
        wrong = self._ids(words.join(self._around))[len(rendered.end) :]
        return msgspec.structs.replace(
            rendered, wrong=(*wrong, *again), close=(*rendered.close, *again)
        )

    def _prefill(self, prompt: np.ndarray) -> tuple[int, ...]:
        """What stands in a prompt behind the place where an answer begins."""
        begin, size = np.array(self._begin, np.int32), len(self._begin)
        for at in range(prompt.size - size, -1, -1) if size else ():
            if np.array_equal(prompt[at : at + size], begin):
                return tuple(prompt[at + size :].tolist())
        return ()

    def _render(self, config: FeedbackConfig) -> Feedback:
        self._demand("feedback.wrong", config.wrong.replace("{question}", ""))
        before, after = "\n", "\n"
        end: tuple[int, ...] = ()
        if self._chat:
            before, after = self._boundary()
            end = self._turn_end(before)
            self._begin = self._ids(
                self._templated(_ASKED, True).removeprefix(self._templated(_ASKED, False))
            )
        self._around = (before, after)
        temperatures = tuple(
            progressive(k, config.temperature_step, config.temperature_floor)
            for k in range(config.turns)
        )
        return Feedback(
            turns=config.turns,
            wrong=(),
            end=end,
            open=self._ids(before)[len(end) :],
            close=self._ids(after),
            voice=_voice(config.voice, config.model, config.key, config.timeout_s),
            words=config.words,
            temperatures=temperatures if config.temperature_step else (),
            tries=config.tries,
            train_tried=config.train_tried,
            gamma=config.gamma,
            seconds=config.episode_s,
        )

    def _hints(self, config: InterveneConfig) -> Intervene:
        if not config.judge:
            self._demand("intervene.hint", config.hint)
        hint = self._ids(config.hint)
        if len(hint) > config.hint_tokens and not config.judge:
            raise ConfigError(
                f"learner.intervene.hint: {len(hint)} tokens; hint_tokens = {config.hint_tokens}"
            )
        return Intervene(
            triggers=config.triggers,
            hint=() if config.judge else hint,
            ngram=config.ngram,
            times=config.times,
            long=config.long,
            judge=_voice(config.judge, config.model, config.key, config.timeout_s),
            cut=config.cut,
            rounds=config.rounds,
            hint_tokens=config.hint_tokens,
            share=config.share,
            seconds=config.episode_s,
        )

    def _boundary(self) -> tuple[str, str]:
        """What the template writes between an answer and feedback, and behind the feedback."""
        turns = [*_ASKED, _turn("assistant", _ANSWER), _turn("user", _WORDS)]
        _, answered, rest = self._templated(turns, True).partition(_ANSWER)
        before, said, after = rest.partition(_WORDS)
        if not answered or not said:
            raise DataError(
                "learner.feedback: the model's chat template leaves out earlier turns; "
                "take prompts.chat = false"
            )
        return before, after

    def _turn_end(self, before: str) -> tuple[int, ...]:
        """The special token that ends an answer, where the template has one."""
        ids = self._ids(before)
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        return ids[:1] if set(ids[:1]) <= special else ()

    def _templated(self, turns: list[dict[str, str]], add: bool) -> str:
        system = [_turn("system", self._system)] if self._system else []
        try:
            text: Any = self._tokenizer.apply_chat_template(
                [*system, *turns], tokenize=False, add_generation_prompt=add
            )
        except Exception as error:  # noqa: BLE001  a model's own template may raise anything
            raise DataError(f"the model's chat template: {type(error).__name__}: {error}") from None
        return str(text)

    def _ids(self, text: str) -> tuple[int, ...]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tuple(ids)

    def _demand(self, name: str, words: str) -> None:
        """Raises ConfigError when the tokenizer has no tokens for them."""
        if str(self._tokenizer.decode(list(self._ids(words)))).split() != words.split():
            raise ConfigError(
                f"learner.{name}: the model's tokenizer cannot write {words!r}; "
                "use words that it knows"
            )


def _voice(place: str, model: str, key: str, seconds: float) -> Voice | None:
    return Voice(place=place, model=model, key=key, seconds=seconds) if place else None


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_ASKED = [_turn("user", "a question")]
