"""`openmimo chat`: talk to a model in the terminal and watch which MTP head proposed which token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from openmimo.cli.engine_options import Activations, CacheFormat, DraftHeads, ModelFolder, RunnerName, Verify, Weights

if TYPE_CHECKING:
    from rich.console import Console

    from openmimo.engine import Engine, SamplingParams
    from openmimo.text import ChatTemplate

HEAD_STYLES = ("green", "cyan", "magenta")
HELP = """/help            this list
/reset           forget the conversation
/drafts on|off   decode with or without MTP drafts
/quit            leave (or Ctrl-D); Ctrl-C stops an answer"""


def chat_command(
    model: ModelFolder,
    max_tokens: Annotated[int, typer.Option(help="Most tokens per answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above 0 samples.")] = 0.0,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    draft_heads: DraftHeads = "auto",
    weights: Weights = "bf16",
    activations: Activations = "auto",
    cache: CacheFormat = "auto",
    runner: RunnerName = "auto",
    verify: Verify = False,
) -> None:
    """Chat with a model. Tokens that an MTP head drafted are coloured by head."""
    from rich.console import Console

    from openmimo.engine import Engine, SamplingParams
    from openmimo.errors import RequestError
    from openmimo.text import ChatTemplate, Tokenizer

    heads = parse_draft_heads(draft_heads)
    engine = Engine(
        model,
        draft_heads=heads,
        weights=weights,
        activations=activations,
        cache=cache,
        runner=runner,
        verify=verify,
    )
    if not isinstance(engine.tokenizer, Tokenizer):
        raise RequestError(f"{str(model)!r} has no tokenizer.json, so there is no chat; pass a folder that has one")
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    template = ChatTemplate(engine.tokenizer)
    ChatSession(engine, template, params, console=Console(highlight=False), system=system).run()


class ChatSession:
    """A conversation and the terminal it runs in; without a terminal it reads lines and writes plain text."""

    def __init__(
        self, engine: Engine, template: ChatTemplate, params: SamplingParams, *, console: Console, system: str = ""
    ) -> None:
        self.engine = engine
        self.template = template
        self.params = params
        self.console = console
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.drafts_on: int | str = "auto" if engine.adaptive else engine.draft_heads
        self.reset()

    def run(self) -> None:
        """Read, answer, repeat, until the input ends."""
        if self.console.is_terminal:
            self._say(f"{self._drafts_line()}; /help lists the commands", style="dim")
        for line in self._lines():
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.answer(line)

    def reset(self) -> None:
        """Forget the conversation, except the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def command(self, line: str) -> None:
        """Carry out a line that starts with a slash."""
        from openmimo.errors import nearest

        word, _, argument = line.partition(" ")
        if word == "/help":
            self._say(HELP)
        elif word == "/reset":
            self.reset()
            self._say("the conversation is forgotten", style="dim")
        elif word == "/drafts" and argument in ("on", "off"):
            self.engine = self.engine.with_drafts(self.drafts_on if argument == "on" else 0)
            self._say(self._drafts_line(), style="dim")
        elif word == "/drafts":
            self._say("say /drafts on or /drafts off")
        else:
            self._say(f"no command {word}; {nearest(word, ('/help', '/reset', '/drafts', '/quit'))}")

    def answer(self, text: str) -> None:
        """Stream the model's answer; Ctrl-C keeps what has been said so far."""
        from openmimo.engine import DraftStats
        from openmimo.errors import MimoError

        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        draft: DraftStats | None = None
        num_tokens, stopped = 0, False
        try:
            with closing(self.engine.stream(self.template.render(self.messages), self.params)) as events:
                for event in events:
                    num_tokens += len(event.token_ids)
                    draft = event.completion.draft if event.completion else None
                    for piece, head in zip(event.pieces, event.drafted, strict=True):
                        said.append(piece)
                        self._say(piece, style="" if head is None else HEAD_STYLES[head % len(HEAD_STYLES)], end="")
        except KeyboardInterrupt:
            stopped = True
        except MimoError as error:
            self.messages.pop()
            self._say(f"{error} (/reset starts over)", style="red")
            return
        self._say("")
        if stopped:
            self._say("[stopped]", style="dim")
        elif draft is not None and draft.num_steps:
            self._say(f"[{num_tokens} tokens, {draft.acceptance_length:.2f} per step]", style="dim")
        self.messages.append({"role": "assistant", "content": "".join(said)})

    def _lines(self) -> Iterator[str]:
        """Lines of input without the spaces around them; Ctrl-C at the prompt only clears the line."""
        prompt = "> " if self.console.is_terminal else ""
        while True:
            try:
                yield self.console.input(prompt).strip()
            except KeyboardInterrupt:
                self._say("")
            except EOFError:
                return

    def _drafts_line(self) -> str:
        heads = self.engine.draft_heads
        if not heads:
            return "no drafts"
        colours = ", ".join(f"head {head + 1} {HEAD_STYLES[head % len(HEAD_STYLES)]}" for head in range(heads))
        return f"drafts by {heads} MTP heads ({colours})"

    def _say(self, text: str, *, style: str = "", end: str = "\n") -> None:
        from rich.text import Text

        self.console.print(Text(printable(text), style=style), end=end, soft_wrap=True)


def printable(text: str) -> str:
    """A model may write anything: control characters, which could drive the terminal, become a replacement sign."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def parse_draft_heads(value: str) -> int | str:
    """A number, or the word for the engine to judge."""
    return int(value) if value.isdecimal() else value
