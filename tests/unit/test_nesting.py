import json

import pytest
from pydantic import BaseModel, ConfigDict

from shared.db.submissions import body_digest
from shared.domain.errors import InvalidRequest
from shared.domain.nesting import MAX_DEPTH, cut_deep, is_too_deep, refuse_deep


def nested(depth, kind="list"):
    value = "end"
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_the_limit_is_exact_and_nothing_recurses(kind):
    assert not is_too_deep("text") and not is_too_deep(nested(MAX_DEPTH, kind))
    assert is_too_deep(nested(MAX_DEPTH + 1, kind)) and is_too_deep({"a": [nested(100_000, kind), 1]})
    with pytest.raises(InvalidRequest):
        refuse_deep(nested(100_000, kind))
    assert not is_too_deep(cut_deep(nested(100_000, kind)))
    assert cut_deep(nested(MAX_DEPTH, kind)) == nested(MAX_DEPTH, kind)


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")

    a: int = 1


@pytest.mark.parametrize("depth", [300, 100_000])
def test_a_digest_is_made_of_anything(depth):
    """pydantic gave up at 255 levels, json at about a thousand."""
    assert body_digest("x", {"a": nested(depth)}) == body_digest("x", {"a": nested(depth)})
    assert body_digest("x", Open(b=nested(depth))) != body_digest("x", Open(b=nested(depth), a=2))
    assert body_digest("x", Open.model_validate({"b": {"\ud800": "\ud800"}}))


def test_digests_are_what_they_were():
    """Answers are kept under them across an upgrade."""
    import hashlib

    body = Open.model_validate({"b": {"z": [1, 2.5, None, "ä"]}})
    expected = hashlib.sha256(json.dumps(["x", body.model_dump(mode="json")], sort_keys=True).encode()).hexdigest()
    assert body_digest("x", body) == expected
