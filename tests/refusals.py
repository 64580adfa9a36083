"""What a refusal looks like: an error of one line and of just that kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from streamprune.errors import StreampruneError


def refused(kind: type[StreampruneError], call: Callable[[], object], *needles: str) -> str:
    """Calls; wants an error of `kind` whose message has all `needles`, and returns the message."""
    with pytest.raises(StreampruneError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert len(message.splitlines()) == 1
    for needle in needles:
        assert needle in message
    return message
