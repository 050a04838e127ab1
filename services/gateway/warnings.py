"""Unknown fields of OpenAI's calls are ignored, as OpenAI's own server does with many; a header says so."""

MAX_NAMED = 10
MAX_CHARACTERS = 40


def warn_of_unknown(names: list[str]) -> dict[str, str]:
    """Return a `Warning` header (RFC 7234, 299: miscellaneous) that names ignored fields; empty when there are none."""
    if not names:
        return {}
    # Names come from the client: nothing but plain characters may reach a header.
    plain = ["".join(c if c.isascii() and (c.isalnum() or c in "_-.[]") else "?" for c in name) for name in names]
    named = ", ".join(name[:MAX_CHARACTERS] for name in plain[:MAX_NAMED])
    return {"Warning": f'299 lamplighter "ignored unknown fields: {named}"'}
