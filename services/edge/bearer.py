"""Tokens (JWT) of an identity provider: whose they are, and until when.

What kind of key checks a token's signature is the deployment's to say, never the token's: with a shared secret only
HS256 is taken, with a provider's key set only RS256 and ES256.
"""

from typing import Any, Final

import jwt
from tapeline import limits

from .auth import Caller, refused
from .jwks import ALGORITHMS, KeySet

_REFUSED: Final = (
    (jwt.ExpiredSignatureError, "The token has expired."),
    (jwt.ImmatureSignatureError, "The token is not valid yet."),
    (jwt.InvalidAudienceError, "The token is for another audience."),
    (jwt.InvalidIssuerError, "The token is of another issuer."),
    (
        jwt.MissingRequiredClaimError,
        "The token lacks a claim; it needs `sub`, `exp`, `aud`, and `iss` where it is set.",
    ),
    (jwt.InvalidSignatureError, "The token's signature does not match."),
    (jwt.PyJWTError, "The token is not one of this deployment."),
)


class Tokens:
    """Names the user of a token."""

    def __init__(self, keys: bytes | KeySet, audience: str, issuer: str | None) -> None:
        self.keys = keys
        self._audience = audience
        self._issuer = issuer

    @classmethod
    def configured(cls, secret: bytes, url: str, audience: str, issuer: str) -> "Tokens":
        """Checked with a shared secret, or with the keys at `url`. Raises `ConfigError`."""
        return cls(secret or KeySet(url), audience, issuer or None)

    async def keep(self) -> None:
        """Keeps what tokens are checked with up to date, for ever."""
        if isinstance(self.keys, KeySet):
            await self.keys.keep()

    async def caller(self, token: str) -> Caller:
        """The token's `sub`. Raises `Problem` 401, and 503 where the provider's keys are not known."""
        if len(token) > limits.TOKEN_CHARS_MAX:
            raise refused(f"A token may have {limits.TOKEN_CHARS_MAX} characters at most.")
        try:
            key, algorithm = await self._key(token)
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=limits.TOKEN_LEEWAY_S,
                options={"require": ["sub", "exp"]},
            )
        except (jwt.PyJWTError, ValueError) as error:  # a ValueError: not ASCII
            raise refused(next((why for kind, why in _REFUSED if isinstance(error, kind)), _REFUSED[-1][1])) from None
        user = claims["sub"]
        if not 0 < len(user) <= limits.USER_CHARS_MAX or not user.isprintable():
            raise refused(f"The token's `sub` must be 1 to {limits.USER_CHARS_MAX} printable characters.")
        return Caller(user, int(claims["exp"]) + limits.TOKEN_LEEWAY_S)  # when it is refused from on

    async def _key(self, token: str) -> tuple[Any, str]:
        if isinstance(self.keys, bytes):
            return self.keys, "HS256"
        header = jwt.get_unverified_header(token)
        algorithm, kid = header.get("alg", ""), header.get("kid")
        if algorithm not in ALGORITHMS.values():
            raise jwt.InvalidAlgorithmError
        key = await self.keys.key(kid, algorithm)
        if key is None:
            raise jwt.InvalidKeyError
        return key, algorithm
