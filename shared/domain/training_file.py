"""What a training file must look like, checked line by line: OpenAI's chat form, or prompt and completion.

A good line is decoded straight into typed structs, which costs microseconds; only a line that does not fit is looked at
again, slowly, to say what is wrong with it and where.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import msgspec
import orjson

from shared.domain.batch_file import MAX_LINE_BYTES, LineError
from shared.domain.errors import LamplighterError
from shared.domain.nesting import MAX_DEPTH, is_too_deep

MIN_EXAMPLES = 10
"""OpenAI's. Of the training file; a validation file may have fewer."""
MAX_MESSAGES = 1000
"""Of one example: where a template hides its turns, each costs a rendering of all before it."""
MAX_ERRORS = 100
"""Faulty lines that are told of one by one; the rest are counted."""

Name = str
"""A file by its parameter: `training_file`, `validation_file`, or one of a task's, `tasks[0].training_file`."""


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, tag_field="role", forbid_unknown_fields=True):
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The message's text, its parts joined, as a model is given it when it serves."""
        content = self.content
        return content if isinstance(content, str) else "".join(part.text for part in content)

    @property
    def role(self) -> str:
        return str(self.__struct_config__.tag)


class System(Message, tag="system"):
    pass


class Developer(Message, tag="developer"):
    pass


class User(Message, tag="user"):
    pass


class ToolResult(Message, tag="tool"):
    tool_call_id: str | None = None


class Assistant(Message, tag="assistant"):
    """`weight` 0: this turn is context only."""

    weight: Literal[0, 1] | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None

    @property
    def is_trained(self) -> bool:
        return self.weight != 0


class ChatExample(msgspec.Struct, forbid_unknown_fields=True):
    """A conversation; its assistant turns are what is learned."""

    form: ClassVar[str] = "chat"

    messages: list[System | Developer | User | ToolResult | Assistant]
    tools: None = None
    functions: None = None
    parallel_tool_calls: bool | None = None

    @property
    def trained(self) -> list[int]:
        """Indices of the messages that are learned."""
        return [
            index
            for index, message in enumerate(self.messages)
            if isinstance(message, Assistant) and message.is_trained
        ]

    def fault(self) -> LineError | None:
        """Return what is wrong with a conversation whose fields are right; None when nothing is."""
        messages = self.messages
        if not 0 < len(messages) <= MAX_MESSAGES:
            text = f"An example has 1 to {MAX_MESSAGES} messages; this one has {len(messages)}."
            return LineError("invalid_n_messages", text, param="messages")
        is_trained = False
        for index, message in enumerate(messages):
            if isinstance(message, Assistant):
                is_trained = is_trained or message.is_trained
                if not message.text.strip():
                    return LineError(
                        "empty_assistant_message", "An assistant message is empty.", param=_at(index, "content")
                    )
        if not isinstance(messages[-1], Assistant):
            text = f"The last message must be the assistant's; this one is the {messages[-1].role}'s."
            return LineError("last_message_not_assistant", text, param=_at(len(messages) - 1, "role"))
        if not is_trained:
            text = "Every assistant message has weight 0, so there is nothing to learn from this example."
            return LineError("nothing_to_train", text, param="messages")
        return None


class PromptExample(msgspec.Struct, forbid_unknown_fields=True):
    """A prompt, and the completion that is learned."""

    form: ClassVar[str] = "prompt and completion"

    prompt: str
    completion: str

    def fault(self) -> LineError | None:
        """Return what is wrong with a pair whose fields are right; None when nothing is."""
        if not self.completion.strip():
            return LineError("empty_completion", "The completion is empty.", param="completion")
        return None


Example: TypeAlias = ChatExample | PromptExample

_DECODERS: dict[type[Example], msgspec.json.Decoder[Any]] = {
    form: msgspec.json.Decoder(form) for form in (ChatExample, PromptExample)
}
_ROLES: dict[str, type[Message]] = {
    str(kind.__struct_config__.tag): kind for kind in (System, Developer, User, Assistant, ToolResult)
}
_PREFERENCE_FIELDS = frozenset(
    {"input", "preferred_completion", "non_preferred_completion", "preferred_output", "non_preferred_output"}
)
_TOOL_FIELDS = frozenset({"tools", "functions", "tool_calls", "function_call"})
_TOOLS_TEXT = "Training on tool calls is not available in this version; leave these examples out."


class TrainingFileRefused(LamplighterError):
    """A training file, or the validation file beside it, cannot be trained on; carries what is wrong with its lines.

    `errors`: at most MAX_ERRORS, in the order of their lines; `count`: how many there are in all.
    """

    def __init__(self, file: Name, errors: list[LineError], count: int, title: str | None = None) -> None:
        self.param, self.errors, self.count = file, errors, count
        self.code = errors[0].code
        super().__init__(_summary(title or file.replace("_", " "), errors[0], count))

    def job_error(self) -> dict[str, str]:
        """Return OpenAI's `error` of a job: `code`, `message` and `param`, the last naming the file."""
        return {"code": self.code, "message": self.message, "param": self.param}


def _summary(name: str, first: LineError, count: int) -> str:
    if first.line is None:
        return f"The {name} cannot be used: {first.message}"
    lines = "1 faulty line" if count == 1 else f"{count} faulty lines"
    field_name = f" ({first.param})" if first.param else ""
    return f"The {name} has {lines}. Line {first.line}{field_name}: {first.message}"


@dataclass
class Faults:
    """What is wrong with one file, of bounded size however much it is."""

    file: Name
    errors: list[LineError] = field(default_factory=list)
    count: int = 0
    title: str | None = None
    """What messages call it, where that is not its parameter."""

    @property
    def is_full(self) -> bool:
        return len(self.errors) >= MAX_ERRORS

    def add(self, line: int | None, fault: LineError) -> None:
        self.count += 1
        if not self.is_full:
            fault.line = line
            self.errors.append(fault)

    def refuse(self) -> None:
        """Raise TrainingFileRefused if anything is wrong."""
        if self.count:
            raise TrainingFileRefused(self.file, self.errors, self.count, self.title)


class TrainingFileChecker:
    """Feed it every line of one file, in order; the file's first example decides its form.

    `expected` is the form that a validation file has to have: that of the training file.
    """

    def __init__(self, faults: Faults, expected: type[Example] | None = None) -> None:
        self.faults = faults
        self.lines = 0
        self.form = expected
        self._is_expected = expected is not None

    def add(self, line: bytes) -> Example | None:
        """Check one line, given without its newline; return its example, or None for a faulty one."""
        self.lines += 1
        form = self.form or self._recognize(line)
        reason = ""
        if form is not None:
            try:
                example: Example = _DECODERS[form].decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                reason = str(error)
            else:
                fault = example.fault()
                if fault is None:
                    return example
                self.faults.add(self.lines, fault)
                return None
        # Beyond the errors that are listed, a fault's reason is not looked for.
        unknown = LineError("invalid_example", f"This example is not understood: {reason}.")
        self.faults.add(self.lines, unknown if self.faults.is_full else self._diagnose(line) or unknown)
        return None

    def add_oversized(self) -> None:
        """Count a line that was longer than MAX_LINE_BYTES and was not kept."""
        self.lines += 1
        text = f"This line is larger than {MAX_LINE_BYTES} bytes."
        self.faults.add(self.lines, LineError("line_too_large", text))

    def finish(self, least: int) -> None:
        """End the file. Raises TrainingFileRefused for what is wrong, and for fewer than `least` examples."""
        self.faults.refuse()
        check_n_examples(self.faults.file, self.lines, least)

    def _recognize(self, line: bytes) -> type[Example] | None:
        entry = loads(line)
        self.form = _form_of(entry) if isinstance(entry, dict) else None
        return self.form

    def _diagnose(self, line: bytes) -> LineError | None:
        """Return why a line is no example of this file's form; None when that cannot be said."""
        entry = loads(line)
        if isinstance(entry, LineError):
            return entry
        if not isinstance(entry, dict):
            return LineError("invalid_json_line", "This line is not a JSON object.")
        if is_too_deep(entry):
            return LineError("nested_too_deep", f"This line is nested more than {MAX_DEPTH} levels deep.")
        if _PREFERENCE_FIELDS & entry.keys():
            text = "Preference data (DPO) is not available in this version; supervised examples are."
            return LineError(
                "dpo_not_supported", text, param=next(name for name in entry if name in _PREFERENCE_FIELDS)
            )
        form = _form_of(entry)
        if form is None:
            text = "An example has messages, or prompt and completion."
            return LineError("missing_field", text, param="messages")
        if self.form not in (None, form):
            return self._other_form(form)
        return _chat_fault(entry) if form is ChatExample else _prompt_fault(entry)

    def _other_form(self, form: type[Example]) -> LineError:
        assert self.form is not None
        other = "The training file" if self._is_expected else "The file's first example"
        text = f"{other} has the form {self.form.form}, and this line {form.form}; both files have one form throughout."
        return LineError("mixed_forms", text)


def check_n_examples(file: Name, examples: int, least: int) -> None:
    """Raise TrainingFileRefused for a file of fewer than `least` examples."""
    if examples < least:
        plural = "" if least == 1 else "s"
        text = f"There must be at least {least} example{plural}, and there are {examples}."
        raise TrainingFileRefused(file, [LineError("invalid_n_examples", text)], 1)


def loads(line: bytes) -> Any:
    """Return a line's JSON value, or the LineError that says why it is none."""
    if not line.strip():
        return LineError("invalid_json_line", "This line is empty.")
    if line.startswith(b"\xef\xbb\xbf"):
        return LineError("invalid_json_line", "This line begins with a byte order mark; save the file without one.")
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return LineError("not_utf8", f"This line is not UTF-8: byte {error.start + 1} of it is not ({error.reason}).")
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        text = f"This line is not parseable as valid JSON: {error.msg} (column {error.colno})."
        return LineError("invalid_json_line", text)


def _form_of(entry: dict[str, Any]) -> type[Example] | None:
    if "messages" in entry:
        return ChatExample
    return PromptExample if "prompt" in entry or "completion" in entry else None


def _chat_fault(entry: dict[str, Any]) -> LineError | None:
    fault = _field_fault(entry, ChatExample, "")
    if fault is not None:
        return fault
    if entry.get("parallel_tool_calls") not in (None, True, False):
        return LineError("invalid_value", "This must be true or false.", param="parallel_tool_calls")
    messages = entry["messages"]
    if not isinstance(messages, list):
        return LineError("invalid_value", "This must be a list of messages.", param="messages")
    return next((fault for index, message in enumerate(messages) if (fault := _message_fault(index, message))), None)


def _message_fault(index: int, message: Any) -> LineError | None:
    if not isinstance(message, dict):
        return LineError("invalid_message", "A message must be an object with role and content.", param=_at(index))
    role = message.get("role")
    if role == "function":
        return LineError("tools_not_supported", _TOOLS_TEXT, param=_at(index, "role"))
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        text = (
            f"The role must be one of {known}; it is {shown(role)}." if "role" in message else "A message needs a role."
        )
        return LineError("invalid_role", text, param=_at(index, "role"))
    fault = _field_fault(message, _ROLES[role], f"{_at(index)}.") or _content_fault(index, message.get("content"))
    if fault is not None:
        return fault
    for name in ("name", "tool_call_id"):
        if not isinstance(message.get(name), str | None):
            return LineError("invalid_value", "This must be a string.", param=_at(index, name))
    weight = message.get("weight")
    if weight is not None and (type(weight) is not int or weight not in (0, 1)):
        return LineError(
            "invalid_weight", f"A weight is 0 or 1; this one is {shown(weight)}.", param=_at(index, "weight")
        )
    if message.get("refusal") is not None:
        return LineError("invalid_value", "Refusals are given as content.", param=_at(index, "refusal"))
    return None


def _content_fault(index: int, content: Any) -> LineError | None:
    param = _at(index, "content")
    if content is None:
        return LineError("missing_content", "A message needs content.", param=param)
    if isinstance(content, str):
        return None
    if not isinstance(content, list):
        return LineError("invalid_content", "Content must be a string, or a list of parts of type text.", param=param)
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            text = "Only content parts of type text can be learned."
            return LineError("invalid_content", text, param=f"{param}[{number}].type")
        if not isinstance(part.get("text"), str):
            return LineError("invalid_content", "A text part needs a text.", param=f"{param}[{number}].text")
        fault = _field_fault(part, TextPart, f"{param}[{number}].")
        if fault is not None:
            return fault
    return None


def _prompt_fault(entry: dict[str, Any]) -> LineError | None:
    for name in ("prompt", "completion"):
        if name not in entry:
            return LineError("missing_field", f"The {name} is missing.", param=name)
        if not isinstance(entry[name], str):
            return LineError("invalid_value", "This must be a string.", param=name)
    return _field_fault(entry, PromptExample, "")


def _field_fault(entry: dict[str, Any], kind: type[msgspec.Struct], where: str) -> LineError | None:
    """Return what is wrong with the names of an object's fields."""
    for name, value in entry.items():
        if name in _TOOL_FIELDS and value is not None:
            return LineError("tools_not_supported", _TOOLS_TEXT, param=where + name)
        if name not in kind.__struct_fields__ and name != kind.__struct_config__.tag_field:
            return LineError("unknown_field", "There is no such field.", param=where + shown(name))
    return None


def _at(index: int, name: str | None = None) -> str:
    return f"messages[{index}].{name}" if name else f"messages[{index}]"


def shown(value: Any) -> str:
    """Return the beginning of a value as errors show it: storable, whatever characters it holds."""
    if isinstance(value, str) and value.isidentifier() and value.isascii():
        return value[:80]
    return ascii(value)[:80] if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
