"""Turns examples into tokens, and says which of them are learned; without torch, as the model's own tokenizer would.

A token is learned when any of its characters is (`{% generation %}` of transformers goes by the same rule). The first
token of an example never is, as nothing comes before it that could foretell it.
"""

import hashlib
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, count, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import orjson
from tokenizers import AddedToken, Encoding, Tokenizer, normalizers, pre_tokenizers

from services.preprocessor.chat_template import ChatForm, PlainForm, Span, TemplateFault, TemplateForm
from shared.domain.batch_file import LineError
from shared.domain.errors import ModelRefused
from shared.domain.training_file import ChatExample, Example

# Files are prepared side by side, each on one core: threads inside one would fight the others.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DEFAULT_CONTEXT_TOKENS = 2048
STANDARD_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PIECE_CHARACTERS = 1 << 16
TOKENS_AT_A_CUT = 32
_ADD_SPACES: tuple[tuple[type, str, Any], ...] = (
    (normalizers.Prepend, "prepend", ""),
    (pre_tokenizers.Metaspace, "prepend_scheme", "never"),
    (pre_tokenizers.ByteLevel, "add_prefix_space", False),
)
_OFFSET_KINDS = ("roberta", "xlm-roberta", "camembert", "longformer", "xlm-roberta-xl", "data2vec-text", "mpnet")
"""Models whose position embeddings begin after the pad token's number."""
_start_of, _end_of = itemgetter(0), itemgetter(1)


@dataclass(frozen=True)
class TokenizerFiles:
    """What a model's directory says of its tokenizer, as far as it can be read without building it.

    `named`: the tokens that have names, such as `eos_token`. `declared`, `extra`: tokens that the configuration adds to
    those of `tokenizer.json`, the latter at the end. `stops`: ids at which an answer ends when the model serves; None:
    at the tokenizer's own end token.
    """

    directory: Path
    template: str | None
    named: dict[str, AddedToken]
    declared: list[AddedToken]
    extra: list[AddedToken]
    splits_special_tokens: bool
    stops: list[int] | None
    context_tokens: int
    unusable_positions: int
    model_vocabulary: int | None
    sha256: str

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read them. Raises ModelRefused."""
        path = directory / "tokenizer.json"
        if not path.exists():
            raise ModelRefused("Fine-tuning needs a tokenizer.json among the model's files.")
        config, settings = _read_json(directory / "config.json"), _read_json(directory / "tokenizer_config.json")
        if "added_tokens_decoder" not in settings:
            settings |= _read_json(directory / "special_tokens_map.json")
        text_config = config.get("text_config", config)
        contexts = (text_config.get("max_position_embeddings"), text_config.get("n_positions"), DEFAULT_CONTEXT_TOKENS)
        try:
            fields = _token_fields(settings)
            fields |= {"stops": _stops(directory, config), "model_vocabulary": text_config.get("vocab_size")}
            template = _template(directory, settings)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelRefused(f"The tokenizer's configuration is not understood: {error!r}.") from None
        return cls(
            directory=directory,
            template=template,
            context_tokens=next(filter(None, contexts)),
            unusable_positions=1 + (config.get("pad_token_id") or 0)
            if config.get("model_type") in _OFFSET_KINDS
            else 0,
            # An AddedToken shows all that it is.
            sha256=hashlib.sha256(path.read_bytes() + repr(sorted(fields.items())).encode()).hexdigest(),
            **fields,
        )

    @property
    def row_tokens(self) -> int:
        """How many tokens a row of several tasks may have: RoBERTa's kind counts positions from beyond its pad."""
        return self.context_tokens - self.unusable_positions

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256((self.template or PlainForm.source).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelRefused(f"{path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelRefused(f"{path.name} is not a JSON object.")
    return content


def _template(directory: Path, settings: dict[str, Any]) -> str | None:
    """Return the chat template where transformers looks for it; a file of its own comes first."""
    path = directory / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.exists() else settings.get("chat_template")
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}
    if isinstance(template, dict):
        template = template.get("default")
        if template is None:
            raise ModelRefused("The model has several chat templates, and none of them is its default.")
    return template or None


def _token_fields(settings: dict[str, Any]) -> dict[str, Any]:
    by_id = settings.get("added_tokens_decoder", {})
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    return {
        "named": _named_tokens(settings),
        "declared": [_token({"special": False} | by_id[token]) for token in sorted(by_id, key=int)],
        "extra": [_token(value) for value in listed] if isinstance(listed, list) else [],
        "splits_special_tokens": settings.get("split_special_tokens", False),
    }


def _token(value: Any) -> AddedToken:
    """Return a token as configurations write it: its text, or an object with that as `content`."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    fields = {name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(value["content"], special=value.get("special", True), **fields)


def _named_tokens(settings: dict[str, Any]) -> dict[str, AddedToken]:
    """Return the tokens that a template may call by name: the standard ones first, then those of this model."""
    extra = settings.get("extra_special_tokens")
    values = {name: settings[name] for name in STANDARD_TOKENS if name in settings}
    values |= {name: value for name, value in settings.items() if name.endswith("_token")}
    values |= extra if isinstance(extra, dict) else {}
    return {
        name: _token(value)
        for name, value in values.items()
        if isinstance(value, str) or (isinstance(value, dict) and "content" in value)
    }


def _stops(directory: Path, config: dict[str, Any]) -> list[int] | None:
    """Return the ids at which generation stops, from where the engine has them."""
    path = directory / "generation_config.json"
    configured = (_read_json(path) if path.exists() else config).get("eos_token_id")
    return [configured] if isinstance(configured, int) else configured


@dataclass(frozen=True)
class Encoded:
    """One example: token ids (array of type `I`), and for each token 1 where it is learned, else 0."""

    tokens: "array[int]"
    weights: bytearray


@dataclass(frozen=True)
class _Draft:
    """An example before it is encoded: a text with spans of it that are learned, and a completion that is all learned.

    `has_prefix`: tokens that the tokenizer puts before a text come first. `needs_end`: an end token comes last.
    `is_cut`: the rest of an immense text was left out.
    """

    text: str
    spans: list[Span]
    completion: str | None
    has_prefix: bool
    needs_end: bool
    is_cut: bool


class ExampleEncoder:
    """Encodes examples for one model, as it will be given them when it serves."""

    def __init__(self, files: TokenizerFiles, max_length: int, *, truncate: bool) -> None:
        """Build the tokenizer. Raises ModelRefused.

        max_length: Tokens of an example at most. truncate: Cut longer ones at their end instead of refusing them.
        """
        self._max_length, self._truncate = max_length, truncate
        self._tokenizer = tokenizer = _load_tokenizer(files)
        added = tokenizer.get_added_tokens_decoder()
        self.vocabulary = max(tokenizer.get_vocab_size(), max(added, default=0) + 1)
        self._model_vocabulary = files.model_vocabulary or self.vocabulary
        self._prefix = _prefix(tokenizer)
        # From here on a text's tokens are its own: what serving puts before it is added by hand, and offsets are exact.
        tokenizer.post_processor = None
        self._space_adders = [*_space_adders(tokenizer.normalizer), *_space_adders(tokenizer.pre_tokenizer)]
        self.pad_token, end = (_id(tokenizer, files.named.get(name)) for name in ("pad_token", "eos_token"))
        stops = files.stops if files.stops is not None else [end] if end is not None else []
        self._end = end if end in stops else min(stops, default=None)
        self._stops = tuple(filter(None, map(tokenizer.id_to_token, stops)))
        special = tuple(token.content for token in added.values() if token.special) + self._stops
        self._form = _chat_form(files, special, self._stops)

    def encode(self, examples: list[Example]) -> list[Encoded | LineError]:
        """Return each example's tokens and weights, or why it cannot be learned."""
        drafts = [self._draft(example) for example in examples]
        good = [draft for draft in drafts if isinstance(draft, _Draft)]
        texts = [draft.text for draft in good]
        completions = [draft.completion for draft in good if draft.completion is not None]
        encoded = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        with _within_a_text(self._space_adders):
            completed = iter(self._tokenizer.encode_batch(completions, add_special_tokens=False))
        outcomes: list[Encoded | LineError] = []
        for draft in drafts:
            if isinstance(draft, LineError):
                outcomes.append(draft)
            else:
                text, completion = next(encoded), next(completed) if draft.completion is not None else None
                outcomes.append(self._assemble(draft, text, completion))
        return outcomes

    def _draft(self, example: Example) -> _Draft | LineError:
        if not isinstance(example, ChatExample):
            prompt, completion = self._bounded(example.prompt), self._bounded(example.completion)
            is_cut = len(prompt) + len(completion) < len(example.prompt) + len(example.completion)
            return _Draft(prompt, [], completion, True, not self._is_ended(completion), is_cut)
        try:
            rendered = self._form.render(example)
        except TemplateFault as error:
            return LineError("template_error", error.message, param="messages")
        text, has_prefix = self._bounded(rendered.text), not self._form.has_special_tokens
        needs_end = rendered.needs_end and not self._is_ended(rendered.text)
        return _Draft(text, rendered.spans, None, has_prefix, needs_end, is_cut=len(text) < len(rendered.text))

    def _is_ended(self, text: str) -> bool:
        return bool(self._stops) and text.endswith(self._stops)

    def _bounded(self, text: str) -> str:
        """Return a text, or as much of it as is longer than any example may be.

        A token in the making takes hundreds of bytes, so an immense text is counted piece by piece first. Where it is
        cut apart, there may be a few tokens too many.
        """
        if len(text) <= PIECE_CHARACTERS:
            return text
        tokens = 0
        for end in range(PIECE_CHARACTERS, len(text), PIECE_CHARACTERS):
            piece = text[end - PIECE_CHARACTERS : end]
            tokens += len(self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0]) - TOKENS_AT_A_CUT
            if tokens > self._max_length:
                return text[:end]
        return text

    def _assemble(self, draft: _Draft, text: Encoding, completion: Encoding | None) -> Encoded | LineError:
        prefix = self._prefix if draft.has_prefix else []
        end = [self._end] if draft.needs_end and self._end is not None else []
        length = len(prefix) + len(text) + (len(completion) if completion is not None else 0) + len(end)
        if length > self._max_length and not self._truncate:
            more = "more than " if draft.is_cut else ""
            message = f"This example has {more}{length} tokens; at most {self._max_length} are allowed."
            return LineError("example_too_long", message)
        tokens = array("I", prefix + text.ids)
        weights = bytearray(len(prefix)) + _learned(text, draft.spans)
        rest = (completion.ids if completion is not None else []) + end
        tokens.extend(rest)
        weights += b"\x01" * len(rest)
        return self._checked(tokens, weights)

    def _checked(self, tokens: "array[int]", weights: bytearray) -> Encoded | LineError:
        del tokens[self._max_length :], weights[self._max_length :]
        weights[:1] = bytes(len(weights[:1]))
        if not any(weights):
            cut = f", cut at {self._max_length} tokens," if self._truncate else ""
            return LineError("nothing_to_train", f"This example{cut} has no token to learn.")
        if self.vocabulary > self._model_vocabulary and max(tokens) >= self._model_vocabulary:
            text = f"Token {max(tokens)} is beyond the model's vocabulary of {self._model_vocabulary}."
            return LineError("unknown_token", text)
        return Encoded(tokens, weights)


@dataclass(frozen=True)
class EncodedRow:
    """A row's tokens, with those that the tokenizer adds; for words, the number of the word that each token begins."""

    tokens: "array[int]"
    begins: list[int | None]


class RowEncoder:
    """Encodes texts, or lists of words, as the model's own tokenizer does when it serves: heads read all its tokens."""

    def __init__(self, files: TokenizerFiles, max_length: int, *, truncate: bool) -> None:
        """Build the tokenizer. Raises ModelRefused. `max_length`, `truncate`: as for examples."""
        self._max_length, self._truncate = max_length, truncate
        self._tokenizer = tokenizer = _load_tokenizer(files)
        if truncate:
            tokenizer.enable_truncation(max_length)
        added = tokenizer.get_added_tokens_decoder()
        self.vocabulary = max(tokenizer.get_vocab_size(), max(added, default=0) + 1)
        self._model_vocabulary = files.model_vocabulary or self.vocabulary
        self.pad_token = _id(tokenizer, files.named.get("pad_token"))

    def texts(self, texts: list[str]) -> list[EncodedRow | LineError]:
        """Return each text's tokens, or why it cannot be learned."""
        return [self._row(encoding, []) for encoding in self._tokenizer.encode_batch(texts)]

    def words(self, rows: list[list[str]]) -> list[EncodedRow | LineError]:
        """Return each row's tokens. Words are joined by spaces: tokenizers treat a word by what stands before it."""
        encodings = self._tokenizer.encode_batch([" ".join(words) for words in rows])
        return [self._row(encoding, _begun(encoding, words)) for encoding, words in zip(encodings, rows, strict=True)]

    def _row(self, encoding: Encoding, begins: list[int | None]) -> EncodedRow | LineError:
        if len(encoding) > self._max_length:
            text = f"This row has {len(encoding)} tokens; at most {self._max_length} are allowed."
            return LineError("example_too_long", text)
        tokens = array("I", encoding.ids)
        if not tokens:
            return LineError("nothing_to_train", "This row has no token.")
        if self.vocabulary > self._model_vocabulary and max(tokens) >= self._model_vocabulary:
            text = f"Token {max(tokens)} is beyond the model's vocabulary of {self._model_vocabulary}."
            return LineError("unknown_token", text)
        return EncodedRow(tokens, begins)


def _begun(encoding: Encoding, words: list[str]) -> list[int | None]:
    """Return for each token the word that it is the first of, by where words stand in their joined text."""
    ends = list(accumulate(len(word) + 1 for word in words))
    begins: list[int | None] = []
    seen = -1
    for (start, end), is_special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
        # A token may start with the space before its word.
        word = bisect_right(ends, end - 1)
        is_first = not is_special and end > start and word > seen and word < len(words)
        seen = word if is_first else seen
        begins.append(word if is_first else None)
    return begins


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that the tokenizer puts before every text by itself."""
    encoding = tokenizer.encode("x")
    return [token for token, _ in takewhile(_end_of, zip(encoding.ids, encoding.special_tokens_mask, strict=True))]


def _space_adders(part: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield the parts of a tokenizer that put a space before a text, each with what to set, and to what, to stop it."""
    if isinstance(part, normalizers.Sequence | pre_tokenizers.Sequence):
        with suppress(IndexError):  # the only sign of their end
            for index in count():
                yield from _space_adders(part[index])
    for kind, attribute, off in _ADD_SPACES:
        if isinstance(part, kind) and getattr(part, attribute) != off:
            yield part, attribute, off


@contextmanager
def _within_a_text(space_adders: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Have a tokenizer encode texts as what follows others: without a space of its own at their beginning."""
    before = [getattr(part, attribute) for part, attribute, _ in space_adders]
    for part, attribute, off in space_adders:
        setattr(part, attribute, off)
    try:
        yield
    finally:
        for (part, attribute, _), value in zip(space_adders, before, strict=True):
            setattr(part, attribute, value)


def _load_tokenizer(files: TokenizerFiles) -> Tokenizer:
    """Return the tokenizer with the tokens that transformers adds to it, in the same order. Raises ModelRefused."""
    try:
        tokenizer = Tokenizer.from_file(str(files.directory / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001  # the library raises nothing narrower
        raise ModelRefused(f"tokenizer.json cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = files.splits_special_tokens
    present = tokenizer.get_added_tokens_decoder().values()
    known, named = {repr(token) for token in present}, {token.content for token in files.named.values()}
    missing = [token for token in files.declared if repr(token) not in known]
    for token in missing:
        token.special = token.special or token.content in named
    texts = {token.content for token in (*present, *missing)}
    for token in (*files.named.values(), *files.extra):
        if token.content not in texts:
            texts.add(token.content)
            missing.append(token)
    tokenizer.add_tokens(missing)
    return tokenizer


def _chat_form(files: TokenizerFiles, special: tuple[str, ...], stops: tuple[str, ...]) -> ChatForm:
    if files.template is None:
        return PlainForm()
    variables = {name: token.content for name, token in files.named.items()}
    try:
        return TemplateForm(files.template, variables, special, stops)
    except TemplateFault as error:
        raise ModelRefused(error.message) from None


def _id(tokenizer: Tokenizer, token: AddedToken | None) -> int | None:
    return None if token is None else tokenizer.token_to_id(token.content)


def _learned(encoding: Encoding, spans: list[Span]) -> bytearray:
    """Return 1 for each token that has a character in one of the spans, else 0."""
    offsets = encoding.offsets if spans else []
    weights = bytearray(len(encoding))
    for start, end in spans:
        first, after = bisect_right(offsets, start, key=_end_of), bisect_left(offsets, end, key=_start_of)
        weights[first:after] = b"\x01" * (after - first)
    return weights
