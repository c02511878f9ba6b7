"""What schemathesis is to know of Tapeline that no schema can say."""

import hashlib
import re
from typing import Any, Final

import schemathesis
from tapeline import limits

QUICK: Final = "1000"
RUN_CHARS_MAX: Final = 64  # of what a message may name
_KEY: Final = re.compile(rf"[\x21-\x7e]{{1,{limits.IDEMPOTENCY_KEY_CHARS_MAX}}}")


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """A slow replay is right to take its time; the same key for another message, arguments for a denied call, and a run
    to replace that is not there, are rightly refused: not so here.
    """
    if _is_slow(case.query.get("pace")):
        case.query["pace"] = QUICK
    if isinstance(case.body, dict) and case.body.get("approved") is False:
        case.body.pop("arguments", None)
    if isinstance(case.body, dict) and isinstance(run := case.body.get("replaces"), str) and len(run) <= RUN_CHARS_MAX:
        case.body["replaces"] = ""
    if _KEY.fullmatch(str(case.headers.get("Idempotency-Key", ""))):
        case.headers["Idempotency-Key"] = hashlib.sha256(repr(case.body).encode(errors="replace")).hexdigest()


def _is_slow(pace: object) -> bool:
    try:
        return limits.PACE_MIN <= float(str(pace)) < float(QUICK)
    except ValueError:
        return False
