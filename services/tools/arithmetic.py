"""Arithmetic on text, safe to give to a model: only numbers, operators and a few functions, each step bounded."""

import ast
import math
import operator
from collections.abc import Callable
from typing import Any, Final

EXPRESSION_CHARS_MAX: Final = 1_000
RESULT_BITS_MAX: Final = 4_096
DIGITS_MAX: Final = 400  # to round to; beyond it nothing changes, and whole numbers take for ever

Number = int | float

_BINARY: Final[dict[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: Final[dict[type[ast.unaryop], Callable[[Any], Any]]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "abs": abs,
    "ceil": math.ceil,
    "cos": math.cos,
    "exp": math.exp,
    "floor": math.floor,
    "log": math.log,
    "log10": math.log10,
    "max": max,
    "min": min,
    "round": lambda number, digits=0: round(number, max(-DIGITS_MAX, min(DIGITS_MAX, digits))),
    "sin": math.sin,
    "sqrt": math.sqrt,
    "tan": math.tan,
}
_CONSTANTS: Final = {"e": math.e, "pi": math.pi, "tau": math.tau}


class BadExpression(ValueError):
    """It cannot be calculated. The message says why."""


def evaluate(expression: str) -> Number:
    """The expression's value. Raises `BadExpression`."""
    if len(expression) > EXPRESSION_CHARS_MAX:
        raise BadExpression(f"an expression has at most {EXPRESSION_CHARS_MAX} characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as error:
        raise BadExpression(f"not an arithmetic expression: {error.msg}") from error
    except ZeroDivisionError as error:
        raise BadExpression("division by zero") from error
    except OverflowError as error:
        raise BadExpression("the result is too large") from error
    except (RecursionError, MemoryError) as error:  # the parser raises either for deep nesting
        raise BadExpression("nested too deeply") from error
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, BadExpression) else BadExpression(str(error)) from error


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _bounded(_UNARY[type(op)](_value(operand)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            one, other = _value(left), _value(right)
            if isinstance(op, ast.Pow):
                _check_power(one, other)
            return _bounded(_BINARY[type(op)](one, other))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _bounded(_FUNCTIONS[name](*map(_value, args)))
    raise BadExpression(f"not allowed here: {ast.unparse(node)[:50]}")


def _check_power(base: Number, exponent: Number) -> None:
    """Refuses before it is calculated what would take for ever, or more memory than there is."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > RESULT_BITS_MAX:
        raise BadExpression("the power is too large")


def _bounded(value: Any) -> Number:
    if isinstance(value, int) and value.bit_length() > RESULT_BITS_MAX:
        raise BadExpression("the result is too large")
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise BadExpression("the result is not a real number")
    return value
