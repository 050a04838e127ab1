"""What a preprocessor and a trainer both know of a prepared data set: its manifest.

```
DIGEST/tokens.bin     uint32, little-endian: the tokens of all examples, one after another
DIGEST/weights.bin    uint8, one for each token: 1 where the token is learned
DIGEST/offsets.bin    int64, little-endian: where each example begins, and the end of the last
DIGEST/manifest.json  `Manifest`
```
A token is predicted from those before it, so the first of an example is never learned.
"""

import msgspec

FORMAT_VERSION = 1


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a prepared data set holds; `max_length`, `longest` and all counts are in tokens."""

    version: int = FORMAT_VERSION
    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    vocabulary: int
    pad_token: int | None
    data_sha256: str
    tokenizer_sha256: str
    template_sha256: str
    max_length: int
