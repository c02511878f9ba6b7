"""Stream tickets: what a browser's EventSource, which cannot send headers, puts into a URL in place of its user's key.

A ticket opens the events of one conversation for one user for a few minutes, on any edge, and does nothing else. It
governs the opening: the stream lives no longer than the token the ticket was made with.
"""

import hashlib
import math
import secrets
import time
from typing import Final

from tapeline import limits
from tapeline.settings import Settings

from . import auth
from .auth import Auth, Caller, refused
from .problem import Problem

SECRET: Final = "TAPELINE_TICKET_SECRET"

_AUDIENCE: Final = "tapeline:events"
_SALT: Final = b"tapeline: stream tickets"  # so that what is signed here is never taken for a bearer token


class Tickets:
    """Makes tickets and takes them."""

    def __init__(self, secret: bytes | None) -> None:
        """None: there are no tickets. All edges need the same secret."""
        # Slow on purpose: who holds a ticket could try out weak keys of other users against its signature.
        self._key = None if secret is None else hashlib.scrypt(secret, salt=_SALT, n=2**14, r=8, p=1, dklen=32)

    @classmethod
    def configured(cls, settings: Settings, who: Auth) -> "Tickets":
        """From whatever secret all edges have. Raises `ConfigError`."""
        if secret := auth.secret(settings, SECRET) or auth.secret(settings, auth.SECRET):
            return cls(secret)
        if keys := auth.static_keys(settings):
            return cls(repr(sorted(keys.items())).encode())
        return cls(secrets.token_bytes() if who.open else None)  # open: an edge of this machine, most often the one

    def issue(self, caller: Caller, conversation: str) -> tuple[str, int]:
        """A ticket, and when it ends (ms since the epoch). Raises `Problem` 501."""
        if self._key is None:
            raise Problem(501, "tickets_off", f"This deployment makes no tickets: its edges have no {SECRET}.")
        import jwt  # see `auth`

        expires_at = int(min(time.time() + limits.TICKET_S, caller.expires_at or math.inf))
        claims = {"aud": _AUDIENCE, "sub": caller.user, "exp": expires_at, "conversation": conversation}
        return jwt.encode(claims | {"until": caller.expires_at}, self._key, "HS256"), expires_at * 1000

    def caller(self, ticket: str, conversation: str) -> Caller:
        """Who may read this conversation's events by this ticket. Raises `Problem` 401."""
        import jwt

        try:
            if self._key is None or len(ticket) > limits.TOKEN_CHARS_MAX:
                raise jwt.InvalidTokenError
            claims = jwt.decode(ticket, self._key, algorithms=["HS256"], audience=_AUDIENCE)
        except jwt.ExpiredSignatureError:
            raise refused("The ticket has expired; make another one.") from None
        except (jwt.PyJWTError, ValueError):
            raise refused("This is no ticket of this deployment.") from None
        if claims["conversation"] != conversation:
            raise refused("The ticket is for another conversation.")
        return Caller(claims["sub"], claims["until"])
