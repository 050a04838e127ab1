"""Sessions of the job board. A session stands for a key: it has the key's scopes, and ends when the key does.

The token is shown to the browser alone and stored only as a digest, as keys are. Sessions that are over are deleted
when their tenant's next one begins, so that there are never many.
"""

import hashlib
import secrets
from datetime import timedelta

from sqlalchemy import Connection, text

from shared.db.tenants import Caller
from shared.domain.errors import AuthenticationFailed

LIFETIME = timedelta(hours=12)
MOST_TOKEN_CHARACTERS = 100

_BEGIN = text("""
    INSERT INTO board_session (tenant_id, digest, key_id, expires_at)
    VALUES (:tenant_id, :digest, :key_id, now() + :lifetime)
""")


def begin(connection: Connection, caller: Caller) -> str:
    """Begin a session of a caller's key; return its token."""
    connection.execute(
        text("DELETE FROM board_session WHERE tenant_id = :tenant_id AND expires_at < now()"),
        {"tenant_id": caller.tenant_id},
    )
    token = secrets.token_urlsafe(32)
    parameters = {"tenant_id": caller.tenant_id, "key_id": caller.key_id, "lifetime": LIFETIME}
    connection.execute(_BEGIN, parameters | {"digest": digest_of(token)})
    return token


def find(connection: Connection, token: str) -> Caller:
    """Return whose session a token is; raises AuthenticationFailed when it is over, or its key is."""
    statement = text("SELECT tenant_id, key_id, scopes FROM find_board_session(:digest)")
    row = connection.execute(statement, {"digest": digest_of(token)}).one_or_none()
    if row is None:
        raise AuthenticationFailed
    return Caller(row.tenant_id, row.key_id, frozenset(row.scopes))


def end(connection: Connection, token: str) -> None:
    """End a session; one that is over already stays so."""
    connection.execute(text("DELETE FROM board_session WHERE digest = :digest"), {"digest": digest_of(token)})


def digest_of(token: str) -> bytes:
    """Return what is stored of a token."""
    return hashlib.sha256(token[:MOST_TOKEN_CHARACTERS].encode()).digest()
