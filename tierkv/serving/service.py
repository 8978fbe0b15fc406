"""What all requests of a server share: the engine, the tokenizer, the limits, and whether more may come in."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any, TypeVar

from tierkv.cache import TierCache
from tierkv.engine.engine import Engine
from tierkv.engine.generation import GenerationOptions
from tierkv.engine.model_support import context_of
from tierkv.engine.prompts import TEMPLATE_DAY, chat_template_of, check_unicode, render_chat
from tierkv.engine.runner import Runner
from tierkv.engine.sampling import SamplingOptions
from tierkv.engine.token_stream import TokenStream
from tierkv.errors import ConfigError, TierKVError
from tierkv.serving.api_errors import ApiError, refused, shutting_down, too_busy
from tierkv.serving.fields import ChatFields, CompletionFields
from tierkv.serving.limits import ServeLimits
from tierkv.serving.logprob_memory import LogprobMemory
from tierkv.serving.monitor import Monitor
from tierkv.serving.refusal_log import RefusalLog
from tierkv.serving.text import Detokenizer
from tierkv.serving.token_text import TokenTexts
from tierkv.serving.tool_calls import ToolFormat, tool_format_of

__all__ = ["GenerationPlan", "Service"]

_T = TypeVar("_T")
_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """What the common fields of a request say. stops: strings. own_stop_ids: those that the request named."""

    sampling: SamplingOptions
    max_new_tokens: int | None
    num_choices: int
    stops: tuple[str, ...]
    stop_ids: frozenset[int]
    own_stop_ids: frozenset[int]
    priority: int
    deadline_s: float
    is_stream: bool
    include_usage: bool


class Service:
    """Turns requests into token streams. Everything here runs on the thread of one event loop, unless it says else.

    name: of the model, as clients give it. day: what chat templates write as today's date; None is the real one.
    is_stopping: set once, then every new request is refused.
    """

    def __init__(
        self, runner: Runner, engine: Engine, *, name: str, limits: ServeLimits, day: date | None = TEMPLATE_DAY
    ) -> None:
        self.engine: Engine = engine
        self.cache: TierCache = runner.cache
        self.name = name
        self.limits = limits
        self.day = day
        self.monitor: Monitor = Monitor()
        self.refusals: RefusalLog = RefusalLog()
        self.logprob_memory: LogprobMemory = LogprobMemory(limits.max_logprob_bytes)
        self.is_stopping: bool = False
        self.started: float = time.monotonic()
        self.created: int = int(time.time())
        self._tokenizer = runner.loaded.tokenizer
        if self._tokenizer is None:
            raise ConfigError("a server needs the model's tokenizer")
        # Rust's tokenizers refuse a call while another thread is inside: one thread encodes, another copy decodes.
        self._decoder = copy.deepcopy(self._tokenizer)
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="tierkv-encode")
        self.token_texts: TokenTexts = TokenTexts(self._decoder)
        self.room: int = _room_of(runner)
        self.max_prompt_tokens: int = min(limits.max_prompt_tokens or self.room, self.room)
        self.max_body_bytes: int = limits.body_bytes(self.max_prompt_tokens)
        self._end_ids = _end_ids(runner)
        self._num_ids = runner.loaded.model.get_input_embeddings().num_embeddings
        self._special_ids = frozenset(self._decoder.all_special_ids)
        self._num_active = self._num_limited = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self) -> None:
        """End the thread that encodes."""
        self._encoding.shutdown(wait=True, cancel_futures=True)

    @contextmanager
    def one_request(self) -> Iterator[Callable[[], None]]:
        """Count a request in, and out at the end. Raises ApiError while the server ends, and beyond the limit.

        The function that it gives counts the request out of the limit before, when all but the last event is sent: a
        client may ask again as soon as it has that.
        """
        if self.is_stopping:
            raise shutting_down()
        if self._num_limited >= self.limits.max_requests:
            raise too_busy(f"{self._num_limited} requests are being answered, which is the limit")
        is_limited = True

        def answered() -> None:
            nonlocal is_limited
            self._num_limited -= is_limited
            is_limited = False

        self._num_limited += 1
        self._num_active += 1
        self._idle.clear()
        try:
            yield answered
        finally:
            answered()
            self._num_active -= 1
            if not self._num_active:
                self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is being answered. Return whether that was so in time."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    @property
    def num_active(self) -> int:
        """Requests that are being answered."""
        return self._num_active

    def check_model(self, name: str) -> None:
        """Raise ApiError, status 404, for another model's name."""
        if name != self.name:
            raise ApiError(
                404,
                f"there is no model {name[:200]!a} here, only {self.name!a}",
                code="model_not_found",
                param="model",
            )

    def tool_format(self, tools: Sequence[dict[str, Any]]) -> ToolFormat:
        """Return the form of the model's calls. Raises ApiError for a model whose chat template has none."""
        form = tool_format_of(chat_template_of(self._tokenizer, tools=tools))
        if form is None:
            raise ApiError(400, "tools are not supported: the model's chat template has none", param="tools")
        return form

    async def encode_chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], variables: Mapping[str, Any]
    ) -> list[int]:
        """Return the tokens of a conversation. Raises ApiError for one that the template refuses, or that is long."""
        return await self._encoded(
            lambda: render_chat(self._tokenizer, messages, tools=tools, day=self.day, variables=variables), "messages"
        )

    async def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a text. Raises ApiError for one that is too long."""

        def encode() -> list[int]:
            check_unicode(text, "the prompt")
            ids: list[int] = self._tokenizer.encode(text)
            return ids

        return await self._encoded(encode, "prompt")

    async def _encoded(self, encode: Callable[[], list[int]], param: str) -> list[int]:
        try:
            token_ids = await asyncio.get_running_loop().run_in_executor(self._encoding, encode)
        except ConfigError as exc:
            raise ApiError(400, str(exc), param=param) from exc
        self.check_prompt(token_ids, param)
        return token_ids

    def check_prompt(self, token_ids: Sequence[int], param: str) -> None:
        """Raise ApiError for a prompt that is empty, too long, or has unknown tokens."""
        if not token_ids:
            raise ApiError(400, "the prompt has no tokens", param=param)
        if len(token_ids) > self.max_prompt_tokens:
            raise ApiError(
                400,
                f"the prompt has {len(token_ids):,} tokens, and the limit is {self.max_prompt_tokens:,}",
                code="context_length_exceeded",
                param=param,
            )
        if max(token_ids) >= self._num_ids:
            raise ApiError(400, f"{max(token_ids)} is not one of the model's {self._num_ids} token ids", param=param)

    def plan(self, fields: ChatFields | CompletionFields) -> GenerationPlan:
        """Return what the common fields say, with OpenAI's defaults. Raises ApiError."""
        if fields.stream_options is not None and not fields.stream:
            raise ApiError(400, "stream_options is for streams only", param="stream_options")
        own = frozenset(fields.stop_token_ids or ())
        is_chat = isinstance(fields, ChatFields)
        max_new_tokens = (isinstance(fields, ChatFields) and fields.max_completion_tokens) or fields.max_tokens
        if max_new_tokens is not None and max_new_tokens > self.limits.max_new_tokens:
            raise ApiError(400, f"an answer may have {self.limits.max_new_tokens:,} tokens at most", param="max_tokens")
        stop = fields.stop if fields.stop is not None else ()
        return GenerationPlan(
            sampling=self._sampling(fields),
            max_new_tokens=max_new_tokens if is_chat or max_new_tokens else _COMPLETION_TOKENS,
            num_choices=fields.n or 1,
            stops=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_ids=own | (frozenset() if fields.ignore_eos else self._end_ids),
            own_stop_ids=own,
            priority=fields.priority or 0,
            deadline_s=min(fields.deadline_s or self.limits.max_seconds, self.limits.max_seconds),
            is_stream=bool(fields.stream),
            include_usage=bool(fields.stream_options and fields.stream_options.include_usage),
        )

    def _sampling(self, fields: ChatFields | CompletionFields) -> SamplingOptions:
        top_logprobs: int | None
        if isinstance(fields, ChatFields):
            if fields.top_logprobs is not None and not fields.logprobs:
                raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
            top_logprobs = fields.top_logprobs or 0 if fields.logprobs else None
        else:
            top_logprobs = fields.logprobs
        return SamplingOptions(
            temperature=1.0 if fields.temperature is None else fields.temperature,
            top_p=1.0 if fields.top_p is None else fields.top_p,
            top_k=max(fields.top_k or 0, 0),
            seed=fields.seed,
            top_logprobs=top_logprobs,
        )

    def hold_logprobs(self, prompts: Sequence[Sequence[int]], plan: GenerationPlan) -> AbstractContextManager[None]:
        """Return a context that has memory for the log-probabilities of all answers to prompts. It raises ApiError."""
        num_tokens = sum(plan.max_new_tokens or self._most_new(prompt) for prompt in prompts) * plan.num_choices
        return self.logprob_memory.hold(num_tokens, plan.sampling.top_logprobs, is_stream=plan.is_stream)

    def _most_new(self, prompt: Sequence[int]) -> int:
        return min(self.limits.max_new_tokens, self.room - len(prompt) + 1)  # the last token is not computed

    def submit(self, prompt: Sequence[int], plan: GenerationPlan, number: int) -> TokenStream:
        """Hand a prompt to the engine. number: of the answer, among those of one prompt. Raises ApiError."""
        if (plan.max_new_tokens or 0) > self.room - len(prompt) + 1:
            reason = (
                f"the prompt's {len(prompt):,} tokens and {plan.max_new_tokens:,} new ones are more than the "
                f"{self.room:,} that there is room for"
            )
            raise ApiError(400, reason, code="context_length_exceeded", param="max_tokens")
        options = GenerationOptions(
            max_new_tokens=plan.max_new_tokens or self._most_new(prompt),
            sampling=plan.sampling,
            stop_ids=plan.stop_ids,
            store_partial=True,  # the conversation's next request finds all that is computed
        )
        try:
            return self.engine.submit(
                prompt, options, priority=plan.priority, deadline_s=plan.deadline_s, number=number
            )
        except TierKVError as exc:
            raise refused(exc) from exc

    def check_choices(self, count: int, param: str) -> None:
        """Raise ApiError for more answers than one request may have."""
        if count > self.limits.max_choices:
            raise ApiError(
                400, f"a request may have {self.limits.max_choices} answers, this one asks for {count}", param=param
            )

    def detokenizer(self, *, kept: Sequence[str] = ()) -> Detokenizer:
        """Return the text of an answer. kept: special tokens that are a part of it."""
        known = self._decoder.get_vocab() if kept else {}
        ids = {known[token] for token in kept if token in known}
        return Detokenizer(self._decoder, skipped=self._special_ids - ids)


def _room_of(runner: Runner) -> int:
    """Return how many tokens a prompt and its answer may have: those of the hot pool and of the model's context."""
    pool = runner.cache.hot
    room = pool.num_blocks * pool.layout.block_size
    return min(room, context_of(runner.loaded.model) or room)


def _end_ids(runner: Runner) -> frozenset[int]:
    """Return the ids that end an answer: the model's, and the tokenizer's, which some models forget to name."""
    ids = getattr(runner.loaded.model.generation_config, "eos_token_id", None)
    found = set(ids if isinstance(ids, list) else [ids]) | {runner.loaded.tokenizer.eos_token_id}
    return frozenset(each for each in found if each is not None)
