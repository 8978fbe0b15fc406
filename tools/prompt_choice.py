"""Which prompts a command is about: texts on the command line, from standard input, or from a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from tierkv.engine.prompts import PromptRequest, Tokenizer, check_unicode, read_prompts, render_chat
from tierkv.errors import ConfigError
from tierkv.tools.options import STANDARD_INPUT, Lines, as_prompt_path
from tierkv.values.files import read_text

__all__ = ["PromptChoice", "tokens_of"]

_LIMIT_BYTES = 256 << 20  # of a text from standard input, as of a prompt file
_BLANKS = " \t\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChoice:
    """The prompts of a command. `requests` raises ConfigError where there is none, or an empty one."""

    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Texts of the user; - reads one from standard input."),
    ] = None
    file: Annotated[
        Path | None,
        typer.Option(
            parser=as_prompt_path, metavar="FILE", help="File of more prompts, as for warm; - is standard input."
        ),
    ] = None
    lines: Lines = False
    system: Annotated[
        Path | None,
        typer.Option(
            parser=as_prompt_path, metavar="FILE", help="File with the system prompt, as for warm; - is standard input."
        ),
    ] = None
    nth: Annotated[int, typer.Option(help="Which prompt of a --system file that has several, from 1.")] = 1

    def requests(self) -> list[PromptRequest]:
        """Return each prompt as a whole conversation; its last message is what the model answers."""
        sources = [*(self.prompts or ()), *(path for path in (self.file, self.system) if path)]
        if sum(str(source) in ("-", str(STANDARD_INPUT)) for source in sources) > 1:
            raise ConfigError("standard input can be read once only")
        system = self._system()
        texts = [_text_of(prompt) for prompt in self.prompts or ()]
        found = [_with_user(system, text) for text in texts]
        if self.file is not None:
            found += [self._from_file(each, system) for each in read_prompts(self.file, lines=self.lines)]
        if not found:
            raise ConfigError("there is no prompt: name a text, - for standard input, or --file")
        return found

    def _system(self) -> PromptRequest:
        if self.system is None:
            return PromptRequest()
        prompts = read_prompts(self.system)
        if not 1 <= self.nth <= len(prompts):
            raise ConfigError(f"{self.system} holds {len(prompts)} prompts, there is no number {self.nth}")
        return prompts[self.nth - 1]

    def _from_file(self, request: PromptRequest, system: PromptRequest) -> PromptRequest:
        if not request.messages:
            return _with_user(replace(system, tools=[*system.tools, *request.tools]), request.system)
        if self.system is not None:
            raise ConfigError(f"{self.file} has conversations: --system is for texts")
        return request


def tokens_of(tokenizer: Tokenizer, request: PromptRequest, *, day: date | None) -> list[int]:
    """Return the tokens of a conversation up to the beginning of the answer. Raises as `render_chat`."""
    system = [{"role": "system", "content": request.system}] if request.system else []
    return render_chat(tokenizer, [*system, *request.messages], tools=request.tools, day=day)


def _with_user(request: PromptRequest, text: str) -> PromptRequest:
    return replace(request, messages=[*request.messages, {"role": "user", "content": text}])


def _text_of(argument: str) -> str:
    """Return the text of an argument; where the locale is not UTF-8, its bytes may be. Raises ConfigError."""
    if argument == "-":
        argument = read_text(STANDARD_INPUT, limit_bytes=_LIMIT_BYTES).strip(_BLANKS)
    if not argument:
        raise ConfigError("the prompt is empty")
    try:
        return os.fsencode(argument).decode()
    except UnicodeError as exc:
        check_unicode(argument, "the prompt")
        raise ConfigError(f"the prompt is not UTF-8 text: {exc}") from exc
