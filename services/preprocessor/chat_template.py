"""Renders conversations as their model will see them when it serves, and finds what in the text is to be learned.

The Jinja environment is that of transformers (`utils/chat_template_utils.py`), made again as no torch is imported here:
`tests/integration/test_preprocessing.py` holds the two against each other, byte for byte.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, Protocol

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.utils import Namespace

from shared.domain.errors import LamplighterError
from shared.domain.training_file import ChatExample

Span = tuple[int, int]
"""Characters `[start, end)` of a text."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "\U000f5afe"
"""A private-use character: where a message's content begins and ends in a rendering made to find that out."""
# What a template can raise, beside Jinja's own errors: it is a program.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RecursionError,
)


class TemplateFault(LamplighterError):
    """A conversation cannot be rendered, or not so that its turns can be told apart."""


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, and the spans of it that are learned, in order.

    `needs_end`: the text does not end as an answer ends when the model serves, so an end token has to follow.
    """

    text: str
    spans: list[Span]
    needs_end: bool


class ChatForm(Protocol):
    """How a model is shown conversations."""

    has_special_tokens: bool
    """Whether the text holds every token that serving puts around it; if not, the tokenizer's are added."""

    def render(self, example: ChatExample) -> Rendered:
        """Return an example's text and what of it is learned. Raises TemplateFault."""


class PlainForm:
    """The form of a model without a chat template, as the engine's `Prompts.encode` writes it.

    Learned are an answer with the space before it, and the end token after the last one. The line break after an
    earlier answer is not: what a model generates never comes so far.
    """

    source = "plain: role, colon, space, content, line break"
    """Stands for a template where there is none."""
    has_special_tokens = False

    def render(self, example: ChatExample) -> Rendered:
        trained, spans, position, pieces = set(example.trained), [], 0, []
        for index, message in enumerate(example.messages):
            piece = f"{message.role}: {message.text}\n"
            if index in trained:
                spans.append((position + len(message.role) + 1, position + len(piece) - 1))
            position += len(piece)
            pieces.append(piece)
        return Rendered("".join(pieces)[:-1], spans, needs_end=len(example.messages) - 1 in trained)


class TemplateForm:
    """A model's own chat template."""

    has_special_tokens = True

    def __init__(
        self, source: str, variables: dict[str, str], special: tuple[str, ...], stops: tuple[str, ...]
    ) -> None:
        """Compile a template. Raises TemplateFault for one that is not valid.

        variables: The tokenizer's named tokens, which a template may use.
        special: Texts of tokens that may end a turn. stops: Of those that end an answer when the model serves.
        """
        self._variables, self._special, self._stops = variables, special, stops
        self._marks_turns = _GENERATION.search(source) is not None
        environment, self._tracker = _environment()
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateFault(f"The model's chat template is not valid: {error}") from None

    def render(self, example: ChatExample) -> Rendered:
        messages = [{"role": message.role, "content": message.text} for message in example.messages]
        if self._marks_turns:
            return self._render_marked_turns(example, messages)
        text = self._text(messages)
        trained = example.trained
        # The last is found by itself; others by itself too unless they look like it, which is quicker to see.
        last = self._turn(text, messages, trained[-1])
        spans = self._alike(text, messages, trained, last) if len(trained) > 2 else None
        if spans is None:
            spans = [self._turn(text, messages, index) for index in trained[:-1]] + [last]
        if trained[-1] == len(messages) - 1 and not self._is_ended(text[: last[1]]):
            spans[-1] = (last[0], len(text))
            return Rendered(text, spans, needs_end=True)
        return Rendered(text, spans, needs_end=False)

    def _text(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except _TEMPLATE_ERRORS as error:
            raise TemplateFault(_refusal(error)) from None

    def _render_marked_turns(self, example: ChatExample, messages: list[dict[str, str]]) -> Rendered:
        """Render with a template that says itself, in `{% generation %}`, what the model writes."""
        with self._tracker.tracking() as (pieces, spans):
            try:
                for piece in self._template.generate(
                    messages=messages, tools=None, documents=None, add_generation_prompt=False, **self._variables
                ):
                    pieces.append(piece)
            except _TEMPLATE_ERRORS as error:
                raise TemplateFault(_refusal(error)) from None
        turns = [index for index, message in enumerate(example.messages) if message.role == "assistant"]
        trained = example.trained
        if turns != trained:
            if len(spans) != len(turns):
                raise TemplateFault(
                    f"The model's chat template marks {len(spans)} passages as generated in a conversation with "
                    f"{len(turns)} assistant messages, so those of weight 0 cannot be told from the others."
                )
            chosen = set(trained)
            spans = [span for turn, span in zip(turns, spans, strict=True) if turn in chosen]
        return Rendered(pieces.text, spans, needs_end=False)

    def _turn(self, text: str, messages: list[dict[str, str]], index: int) -> Span:
        """Return what of `text` the model writes as message `index`: all that follows the prompt it is given then."""
        prompt = self._text(messages[:index], add_generation_prompt=True)
        turn = text if index == len(messages) - 1 else self._text(messages[: index + 1])
        if not (text.startswith(turn) and turn.startswith(prompt)):
            raise TemplateFault(
                f"The model's chat template writes messages[{index}], or what comes before it, in another way when the "
                "model is to answer than when more follows. Give all assistant messages but the last the weight 0."
            )
        return len(prompt), self._end_of_turn(turn, len(prompt))

    def _end_of_turn(self, text: str, start: int) -> int:
        """Return where a turn ends: white space after the token that ends it is never generated."""
        turn = text[start:].rstrip()
        return start + len(turn) if turn.endswith(self._special) else len(text)

    def _is_ended(self, text: str) -> bool:
        return not self._stops or text.endswith(self._stops)

    def _alike(self, text: str, messages: list[dict[str, str]], trained: list[int], last: Span) -> list[Span] | None:
        """Return the turns of a conversation, given the last of them; None unless they look alike.

        Message by message `_turn` costs a rendering of all that comes before. Here one rendering with marks around the
        contents tells where each stands. A turn is like the last when the same text leads to it from the message
        before, and the same text follows.
        """
        contents = self._find_contents(text, messages)
        if contents is None or trained[0] == 0:
            return None
        start, end = contents[trained[-1]]
        before, after = text[contents[trained[-1] - 1][1] : start], text[end : last[1]]
        lead = start - last[0]
        if lead < 0:
            return None  # the prompt anticipates what contents begin with, which each has to be looked at for
        spans = []
        for index in trained[:-1]:
            start, end = contents[index]
            if text[contents[index - 1][1] : start] != before or not text.startswith(after, end):
                return None
            spans.append((start - lead, end + len(after)))
        return [*spans, last]

    def _find_contents(self, text: str, messages: list[dict[str, str]]) -> list[Span] | None:
        """Return where each message's content stands in `text`, without white space around it; None if unclear."""
        if _MARK in text:
            return None
        contents = [message["content"].strip() for message in messages]
        try:
            marked = self._text([_marked(message) for message in messages])
        except TemplateFault:
            return None
        pieces = marked.split(_MARK)
        if pieces[1::2] != contents or "".join(pieces) != text:
            return None  # the template looks into what it is given
        spans, position = [], 0
        for between, content in zip(pieces[::2], contents, strict=False):
            start = position + len(between)
            position = start + len(content)
            spans.append((start, position))
        return spans


def _refusal(error: Exception) -> str:
    """Return what a template says, of bounded length and storable: it may repeat what a conversation holds."""
    said = str(error)[:300].replace("\0", "\ufffd")
    return f"The model's chat template refuses this conversation: {said}"


def _marked(message: dict[str, str]) -> dict[str, str]:
    """Return a message with marks around its content, within white space that a template may take away."""
    content = message["content"]
    bare = content.strip()
    start = content.index(bare)
    return message | {"content": f"{content[:start]}{_MARK}{bare}{_MARK}{content[start + len(bare) :]}"}


class _Pieces:
    """What a template has written so far. Its length is kept, as adding it up for every turn would be quadratic."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self.characters = 0

    def append(self, piece: str) -> None:
        self._pieces.append(piece)
        self.characters += len(piece)

    @property
    def text(self) -> str:
        return "".join(self._pieces)


class _GenerationTracker(jinja2.ext.Extension):
    """The tag `{% generation %}`: notes where in the text its bodies stand."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self._pieces: _Pieces | None = None
        self._spans: list[Span] = []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        written = caller()
        if self._pieces is not None:
            start = self._pieces.characters
            self._spans.append((start, start + len(written)))
        return written

    @contextmanager
    def tracking(self) -> Iterator[tuple[_Pieces, list[Span]]]:
        self._pieces, self._spans = _Pieces(), []
        try:
            yield self._pieces, self._spans
        finally:
            self._pieces = None


class _TemplateNamespace(Namespace):
    """Jinja's `namespace`, without names that lead into CPython."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works, as in Jinja
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"A chat template cannot store {name!r} in a namespace.")


class _TemplateDict:
    """`dict` without what a template could break out by."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


def _environment() -> tuple[jinja2.Environment, _GenerationTracker]:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTracker, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_TemplateDict(), namespace=_TemplateNamespace
    )
    (tracker,) = (each for each in environment.extensions.values() if isinstance(each, _GenerationTracker))
    return environment, tracker


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005  # the local time, as transformers has it


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
