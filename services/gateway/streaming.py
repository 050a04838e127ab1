"""Uploads as streams: a multipart body is parsed, hashed, checked and stored block by block, never held as a whole."""

import re
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from shared.domain.errors import BodyTooLarge, InvalidRequest
from shared.ingest import FileIngest

MAX_FILE_BYTES = 512 * 2**20
MAX_BATCH_FILE_BYTES = 200 * 10**6 + 2**20
MAX_FIELD_BYTES = 10_000
MAX_FIELDS = 20
MAX_FILENAME_CHARACTERS = 255
BLOCK_BYTES = 1 << 20
KNOWN_FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})


@dataclass
class Upload:
    """A parsed upload: the small form fields, and the file, whose content went to the store on the way."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    has_file: bool = False

    @property
    def unknown_fields(self) -> list[str]:
        """Form fields that nobody here knows; they are ignored."""
        return [name for name in self.fields if name not in KNOWN_FIELDS]


class UploadParser:
    """Feeds a multipart body to a FileIngest; raises InvalidRequest or BodyTooLarge as soon as a fault shows."""

    def __init__(self, boundary: bytes, ingest: FileIngest) -> None:
        self.upload = Upload()
        self._ingest = ingest
        self._part: dict[str, str] = {}
        self._value = bytearray()
        self._in_file = False
        self._header_name, self._header_value = bytearray(), bytearray()
        self._blocks: list[bytes] = []
        self.is_complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begin,
                    "on_part_data": self._part_data,
                    "on_part_end": self._part_end,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:  # the boundary is too long
            raise _unparseable(error) from None

    def feed(self, block: bytes) -> None:
        """Parse a block and pass its share of the file on."""
        try:
            self._parser.write(block)
        except FormParserError as error:
            raise _unparseable(error) from None
        if self._blocks:
            self._ingest.feed(b"".join(self._blocks))
            self._blocks.clear()
        limit = MAX_BATCH_FILE_BYTES if self.upload.fields.get("purpose") == "batch" else MAX_FILE_BYTES
        if self._ingest.bytes > limit:
            raise BodyTooLarge(f"The file is larger than {limit} bytes.", param="file")

    def _part_begin(self) -> None:
        self._part = {}
        self._value.clear()
        self._header_name.clear()
        self._header_value.clear()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        if bytes(self._header_name).lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._header_value))
            self._part = {
                key.decode(errors="replace"): value.decode(errors="replace") for key, value in options.items()
            }
        self._header_name.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        self._in_file = self._part.get("name") == "file"
        if not self._in_file:
            return
        if self.upload.has_file:
            raise InvalidRequest("There may be one file in an upload.", param="file", code="invalid_value")
        self.upload.has_file = True
        self.upload.filename = clean_filename(self._part.get("filename"))
        if self.upload.fields.get("purpose") not in (None, "batch"):
            self._ingest.lines = None  # only batch files are read line by line

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._blocks.append(data[start:end])
        elif len(self._value) + end - start > MAX_FIELD_BYTES:
            raise BodyTooLarge("A form field is too large.", param=self._part.get("name"))
        else:
            self._value += data[start:end]

    def _part_end(self) -> None:
        name = self._part.get("name")
        if not self._in_file and name is not None:
            if name in self.upload.fields:  # which of them would be meant?
                raise InvalidRequest(f"{name}: is given twice.", param=name, code="invalid_value")
            if len(self.upload.fields) >= MAX_FIELDS:
                raise InvalidRequest("There are too many form fields.", code="invalid_body")
            self.upload.fields[name] = bytes(self._value).decode(errors="replace")
        self._in_file = False

    def _end(self) -> None:
        self.is_complete = True


def _unparseable(error: FormParserError) -> InvalidRequest:
    return InvalidRequest(f"The multipart body cannot be parsed: {error}.", code="invalid_body")


def clean_filename(name: str | None) -> str:
    """Return a name that is safe to show: the last part of any path, printable, of bounded length.

    It is never used to find anything: names in the store are the server's own.
    """
    base = (name or "").replace("\\", "/").rsplit("/", 1)[-1]
    printable = "".join(character for character in base if character.isprintable())
    return printable[:MAX_FILENAME_CHARACTERS].strip(". ") or "upload"


async def receive_upload(request: Request, ingest: FileIngest) -> Upload:
    """Read a whole multipart request into `ingest`. Raises InvalidRequest, BodyTooLarge, ClientDisconnect."""
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    if content_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest("Send the file as multipart/form-data.", code="invalid_body")
    parser = UploadParser(options[b"boundary"], ingest)
    pending: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        pending.append(chunk)
        size += len(chunk)
        if size >= BLOCK_BYTES:
            # Hashing, checking and writing a block takes milliseconds: not on the event loop.
            await run_in_threadpool(parser.feed, b"".join(pending))
            pending, size = [], 0
    await run_in_threadpool(parser.feed, b"".join(pending))
    if not parser.is_complete:
        raise InvalidRequest("The multipart body ends in the middle.", code="incomplete_body")
    if not parser.upload.has_file:
        raise InvalidRequest("file: Field required.", param="file", code="missing_required_parameter")
    return parser.upload


def expires_after_seconds(fields: dict[str, Any], default: int | None) -> int | None:
    """Return how long the form wants the file kept, in seconds. Raises InvalidRequest."""
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return default
    if anchor != "created_at":
        raise InvalidRequest("expires_after.anchor must be 'created_at'.", param="expires_after", code="invalid_value")
    if not re.fullmatch(r"[0-9]{4,7}", seconds or "") or not 3600 <= int(seconds or "") <= 2_592_000:
        message = "expires_after.seconds must be an integer from 3600 to 2592000."
        raise InvalidRequest(message, param="expires_after", code="invalid_value")
    return int(seconds or "")
