"""Tools without a server: the schema that type hints make, arguments held to it, and what comes of a call."""

import asyncio
import copy
import dataclasses
import datetime
import enum
import functools
import json
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict
from uuid import uuid4

import jsonschema
import msgspec
import pydantic
import pytest
from hypothesis import given, settings, strategies
from msgspec import Meta
from tapeline import limits
from tapeline.tools import Context, ToolError, tool
from tapeline.tools.context import Flag
from tapeline.tools.desk import Desk
from tapeline.tools.execution import Result, run
from tapeline.tools.place import Loop
from tapeline.tools.schema import Invalid
from tapeline.tools.testing import call_tool

from services.tools import builtin


class Colour(enum.Enum):
    """A choice."""

    RED = "red"
    BLUE = "blue"


class Place(msgspec.Struct):
    """A Struct."""

    city: str
    country: str = "PT"


@dataclasses.dataclass
class Leg:
    """A dataclass of Structs."""

    start: Place
    end: Place
    km: float | None = None


class Options(TypedDict):
    """A TypedDict."""

    fast: bool
    note: NotRequired[str]


class Stop(NamedTuple):
    """A NamedTuple."""

    place: str
    minutes: int = 5


class Item(pydantic.BaseModel):
    """A pydantic model.

    Of two lines.
    """

    sku: str = pydantic.Field(pattern="^[a-z]+$", description="As in the catalogue.")
    qty: int = pydantic.Field(default=1, ge=1)
    colour: Colour = Colour.RED
    due: datetime.date | None = None


@dataclasses.dataclass
class Parcel:
    """A dataclass of models."""

    items: list[Item]
    sender: str = "me"


class Folder(pydantic.BaseModel):
    """As deep as one likes."""

    folders: list["Folder"] = []


# The schema


def test_the_schema_says_all_that_the_function_does() -> None:
    @tool(name="book-trip", timeout_s=5, idempotent=True, needs_approval=True)
    def book(
        legs: list[Leg],
        colour: Colour,
        kind: Literal["train", "plane"],
        seats: Annotated[int, Meta(ge=1, le=9, description="How many of you.")] = 1,
        when: datetime.date | None = None,
        options: Options | None = None,
        *,
        context: Context,
    ) -> str:
        """Books a trip.

        Over several legs, and
        in one go.

        Args:
            legs: One after the other,
                at least one.
            kind (str): By what.
            seats: Ignored, since the hint says it.

        Returns:
            A booking number.
        """
        return "42"

    spec = book.spec("travel")
    assert (spec.name, spec.timeout_s, spec.idempotent, spec.needs_approval, spec.pool) == (
        "book-trip",
        5,
        True,
        True,
        "travel",
    )
    assert spec.description == "Books a trip.\n\nOver several legs, and\nin one go."
    schema = spec.parameters
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object"
    assert schema["required"] == ["legs", "colour", "kind"]
    assert schema["additionalProperties"] is False
    properties = schema["properties"]
    assert list(properties) == ["legs", "colour", "kind", "seats", "when", "options"], "the context is not the model's"
    assert properties["legs"]["description"] == "One after the other, at least one."
    assert properties["kind"] == {"enum": ["plane", "train"], "description": "By what."}
    assert properties["seats"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 9,
        "description": "How many of you.",
        "default": 1,
    }
    assert properties["when"]["default"] is None
    assert set(schema["$defs"]) == {"Leg", "Place", "Colour", "Options"}
    jsonschema.validate(
        {"legs": [{"start": {"city": "Lisboa"}, "end": {"city": "Porto"}}], "colour": "red", "kind": "train"}, schema
    )


def test_a_bare_decorator_is_enough() -> None:
    @tool
    def hello(name: str = "you") -> str:
        """Says hello."""
        return f"hello {name}"

    assert hello.name == "hello"
    assert hello("me") == "hello me", "from Python it is still the function"
    assert hello.spec().parameters == {
        "type": "object",
        "properties": {"name": {"type": "string", "default": "you"}},
        "required": [],
        "additionalProperties": False,
    }
    assert not hello.idempotent


def test_models_of_pydantic_are_in_the_one_schema() -> None:
    class Item(msgspec.Struct):
        """Of the same
        name."""

        number: int

    @tool
    def send(
        parcel: Parcel,
        item: Item,
        theirs: globals()["Item"],  # type: ignore[valid-type]
        folder: Folder,
        by_name: dict[str, Parcel] | None = None,
        copies: Annotated[int, pydantic.Field(ge=1, description="How many.")] = 1,
        few: Annotated[list[Folder], Meta(max_length=2, description="Few.")] = [],  # noqa: B006
    ) -> None:
        """Sends.

        Args:
            parcel: What to send.
            copies: Ignored, since the hint says it.
            folder: The top.
        """

    schema = send.spec().parameters
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object"
    properties, definitions = schema["properties"], schema["$defs"]
    assert properties["parcel"]["description"] == "What to send."
    assert properties["parcel"]["properties"]["items"]["items"] == {"$ref": "#/$defs/parcel_Item"}
    assert definitions["Item"]["description"] == "Of the same\nname."
    assert definitions["parcel_Item"]["properties"]["sku"]["description"] == "As in the catalogue."
    assert properties["folder"] == {"$ref": "#/$defs/Folder", "description": "The top."}
    assert properties["by_name"]["default"] is None
    assert properties["copies"] == {"type": "integer", "minimum": 1, "description": "How many.", "default": 1}
    assert (properties["few"]["maxItems"], properties["few"]["description"]) == (2, "Few.")
    names = set(re.findall(r"#/\$defs/(\w+)", json.dumps(schema)))
    assert names == set(definitions), "every reference leads somewhere, and nothing is left over"


class Opaque:
    """What JSON cannot carry."""


def bare(x):  # type: ignore[no-untyped-def]
    return x


def opaque(x: Opaque) -> None: ...
def ambiguous(x: list[int] | list[str]) -> None: ...
def starred(*numbers: int) -> None: ...
def keywords(**numbers: int) -> None: ...
def positional(x: int, /) -> None: ...
def unresolved(x: "Missing") -> None: ...  # type: ignore[name-defined]  # noqa: F821
def twice(one: Context, other: Context) -> None: ...


class Mixed(msgspec.Struct):
    """What neither msgspec nor pydantic can make."""

    item: Item


def mixed(x: Mixed) -> None: ...
def bounded(x: list[Annotated[Item, Meta(description="no")]]) -> None: ...
def fields(x: int = pydantic.Field(ge=1)) -> None: ...


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (bare, "argument x has no type hint"),
        (opaque, "argument x: .*Opaque.* cannot be given as JSON"),
        (ambiguous, "argument x: .* cannot be given as JSON"),
        (starred, "argument .*numbers.*: the model gives arguments by name"),
        (keywords, "argument .*numbers.*: the model gives arguments by name"),
        (positional, "argument x.*: the model gives arguments by name"),
        (unresolved, "name 'Missing' is not defined"),
        (twice, "argument other: there is a Context already"),
        (mixed, "argument x: .*Mixed.* cannot be given as JSON"),
        (bounded, "argument x: inside a hint for pydantic, .* with pydantic's Field"),
        (fields, "argument x: pydantic's Field belongs into the hint"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_where_it_is_written(function: Callable[..., Any], problem: str) -> None:
    with pytest.raises(TypeError, match=f"tool {function.__name__}: {problem}"):
        tool(function)


@pytest.mark.parametrize("thing", ["a name", functools.partial(abs, 1), Opaque()])
def test_only_a_function_can_be_a_tool(thing: Any) -> None:
    with pytest.raises(TypeError, match="@tool is for functions"):
        tool(thing)


@pytest.mark.parametrize("options", [{"name": "no spaces"}, {"timeout_s": 0}, {"timeout_s": 1e9}])
def test_options_out_of_bounds_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        tool(**options)(lambda: None)


# Arguments


@tool
def take(
    number: int,
    colour: Colour = Colour.RED,
    place: Place | None = None,
    leg: Leg | None = None,
    options: Options | None = None,
    when: datetime.datetime | None = None,
    share: Annotated[float, Meta(ge=0, le=1)] = 0.5,
    kind: Literal["a", 1] = "a",
    table: dict[str, list[int]] | None = None,
    anything: Any = None,
) -> str:
    """Says what it was given."""
    return repr((number, colour, place, leg, options, when, share, kind, table, anything))


async def test_arguments_arrive_as_the_hints_say() -> None:
    called = await call_tool(
        take,
        {
            "number": 1,
            "colour": "blue",
            "place": {"city": "Lisboa"},
            "leg": {"start": {"city": "A"}, "end": {"city": "B", "country": "ES"}},
            "options": {"fast": True},
            "when": "2026-11-22T10:00:00Z",
            "share": 1,
            "kind": 1,
            "table": {"a": [1, 2]},
            "anything": [None, {"deep": 1}],
        },
    )
    utc = datetime.UTC
    assert called.content == repr(
        (
            1,
            Colour.BLUE,
            Place("Lisboa"),
            Leg(Place("A"), Place("B", "ES")),
            {"fast": True},
            datetime.datetime(2026, 11, 22, 10, tzinfo=utc),
            1.0,
            1,
            {"a": [1, 2]},
            [None, {"deep": 1}],
        )
    )
    assert (await call_tool(take, {"number": 1})).content.startswith("(1, <Colour.RED"), "the function's own defaults"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "missing required field `number`"),
        ({"number": "7"}, "Expected `int`, got `str` - at `$.number`"),
        ({"number": True}, "got `bool`"),
        ({"number": 1.5}, "got `float`"),
        ({"number": None}, "got `null`"),
        ({"number": 1, "extra": 1}, "unknown field `extra`"),
        ({"number": 1, "colour": "green"}, "Invalid enum value 'green' - at `$.colour`"),
        ({"number": 1, "place": {"country": "PT"}}, "missing required field `city` - at `$.place`"),
        ({"number": 1, "leg": {"start": {"city": 1}, "end": {"city": "B"}}}, "at `$.leg.start.city`"),
        ({"number": 1, "options": {}}, "missing required field `fast`"),
        ({"number": 1, "when": "yesterday"}, "Invalid RFC3339"),
        ({"number": 1, "share": 1.5}, "Expected `float` <= 1.0 - at `$.share`"),
        ({"number": 1, "table": {"a": ["x"]}}, "at `$.table[...][0]`"),
        ('{"number": 1', "not a JSON object"),
        ([1], "not a JSON object"),
        (None, "missing required field"),
    ],
)
async def test_wrong_arguments_name_the_place_and_the_problem(arguments: Any, problem: str) -> None:
    called = await call_tool(take, arguments)
    assert (called.outcome, called.is_error, called.content) == ("error", True, None)
    assert problem in called.message


@pytest.mark.parametrize("value", [datetime.date(2026, 11, 22), b"bytes", {1, 2}, float("nan"), Place("Lisboa")])
async def test_what_no_model_can_send_no_test_can_call_a_tool_with(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        await call_tool(take, {"number": 1, "anything": value})


async def test_a_tuple_arrives_as_a_list() -> None:
    called = await call_tool(take, {"number": 1, "anything": (1, 2)})
    assert called.content.endswith(", [1, 2])")


@tool
def pack(
    item: Item,
    parcel: Parcel | None = None,
    by_name: dict[str, list[Item]] | None = None,
    copies: Annotated[int, pydantic.Field(ge=1)] = 1,
    spare: Item = Item(sku="none"),  # noqa: B008
    tree: Folder | None = None,
) -> Any:
    """Says what it was given, and gives it back."""
    assert isinstance(item, Item)
    assert isinstance(spare, Item)
    return {"given": repr((item, parcel, by_name, copies)), "item": item, "set": {item.due}, "parcel": parcel}


async def test_models_of_pydantic_arrive_as_such_and_go_back_as_json() -> None:
    item = {"sku": "a", "colour": "blue", "due": "2026-11-22"}
    called = await call_tool(pack, {"item": item, "parcel": {"items": [item]}, "by_name": {"x": [item]}, "copies": 2})
    made = Item(sku="a", colour=Colour.BLUE, due=datetime.date(2026, 11, 22))
    whole = {"sku": "a", "qty": 1, "colour": "blue", "due": "2026-11-22"}
    assert called.content == {
        "given": repr((made, Parcel([made]), {"x": [made]}, 2)),
        "item": whole,
        "set": ["2026-11-22"],
        "parcel": {"items": [whole], "sender": "me"},
    }


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "Object missing required field `item`"),
        ({"item": {}}, "Field required - at `$.item.sku`"),
        ({"item": {"sku": "a"}, "extra": 1}, "unknown field `extra`"),
        ({"item": {"sku": "a", "qty": "1"}}, "Input should be a valid integer - at `$.item.qty`"),
        ({"item": {"sku": "X" * 10_000}}, "String should match pattern '^[a-z]+$' - at `$.item.sku`"),
        ({"item": {"sku": "a"}, "parcel": {"items": [{"sku": 1}]}}, "valid string - at `$.parcel.items[0].sku`"),
        ({"item": {"sku": "a"}, "copies": 0}, "greater than or equal to 1 - at `$.copies`"),
        (
            {"item": {"sku": 1, "qty": 0, "colour": "x", "due": "x"}},
            "string - at `$.item.sku`; Input should be greater than or equal to 1 - at `$.item.qty`; "  # noqa: ISC004
            "Input should be 'red' or 'blue' - at `$.item.colour`; and 1 more",
        ),
        ({"item": {"sku": "a"}, "by_name": {"k" * 10_000: [1]}}, f"$.by_name.{'k' * 60}[0]"),
    ],
)
async def test_wrong_models_name_the_place_and_the_problem(arguments: Any, problem: str) -> None:
    called = await call_tool(pack, arguments)
    assert (called.outcome, called.content) == ("error", None)
    assert problem in called.message
    assert called.message.startswith("invalid arguments: ")
    assert len(called.message) < 300
    assert "http" not in called.message


async def test_a_validator_that_breaks_keeps_its_secrets(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(pydantic.BaseModel):
        word: str

        @pydantic.field_validator("word")
        @classmethod
        def look(cls, word: str) -> str:
            raise KeyError("hunter2") if word == "key" else ValueError("no such word")

        @pydantic.field_serializer("word")
        def show(self, word: str) -> str:
            raise KeyError("hunter2")

    @tool
    def use(it: Broken) -> None: ...

    assert (await call_tool(use, {"it": {"word": "key"}})).message == "the tool use failed: KeyError"
    assert "hunter2" in caplog.text
    refused = await call_tool(use, {"it": {"word": "x"}})
    assert refused.message == "invalid arguments: refused with ValueError - at `$.it.word`"
    assert "no such word" in caplog.text

    @tool
    def give() -> Broken:
        return Broken.model_construct(word="x")

    assert (await call_tool(give)).message == "the tool give returned something that is not JSON"


@dataclasses.dataclass
class Dated:
    """A dataclass with an opinion."""

    on: int

    def __post_init__(self) -> None:
        if self.on == 0:
            raise Closed("on day 0 we are closed")
        int("hunter2 - at `$.nowhere`")


class Closed(ToolError, ValueError):
    """Is told, whatever else it is."""


class Booked(pydantic.BaseModel):
    """A model with the same opinion."""

    on: int

    @pydantic.field_validator("on")
    @classmethod
    def look(cls, on: int) -> int:
        Dated(on)
        return on


async def test_what_a_validator_says_stays_in_the_log_unless_it_is_a_tool_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @tool
    def close(days: list[Dated]) -> None: ...

    @tool
    def book(days: list[Booked]) -> None: ...

    for one, place in ((close, "$.days[0]"), (book, "$.days[0].on")):
        refused = await call_tool(one, {"days": [{"on": 1}]})
        assert refused.message == f"invalid arguments: refused with ValueError - at `{place}`"
        assert "hunter2" in caplog.text
        caplog.clear()
        assert (await call_tool(one, {"days": [{"on": 0}]})).message == "on day 0 we are closed"


@tool
def everything(
    number: Annotated[int, Meta(ge=0, le=9)],
    share: float,
    colour: Colour,
    kind: Literal["a", 1],
    leg: Leg,
    options: Options,
    stop: Stop,
    table: dict[str, list[int | None]],
    pair: tuple[int, str],
    item: Item,
    parcels: list[Parcel] | None = None,
) -> None:
    """Takes one of each."""


GOOD: dict[str, Any] = {
    "number": 1,
    "share": 0.5,
    "colour": "red",
    "kind": "a",
    "leg": {"start": {"city": "A"}, "end": {"city": "B", "country": "ES"}, "km": 1.5},
    "options": {"fast": True, "note": "x"},
    "stop": ["A", 3],
    "table": {"a": [1, None]},
    "pair": [1, "x"],
    "item": {"sku": "a", "qty": 2, "colour": "blue"},
    "parcels": [{"items": [{"sku": "b"}], "sender": "you"}],
}
NUMBERS = strategies.integers() | strategies.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x % 1)
WORDS = strategies.sampled_from(["a", "red", "sku", "A!"]) | strategies.text(max_size=5)
ANY_JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | NUMBERS | WORDS,
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)  # a busy machine takes longer than 200 ms now and then
@given(strategies.data())
def test_what_is_taken_is_what_the_schema_says(data: strategies.DataObject) -> None:
    """Both ways, for arguments with one thing wrong, or none. (A date's format is not the schema's to hold to.)"""
    arguments = copy.deepcopy(GOOD)
    place: Any = arguments
    while True:
        key = data.draw(strategies.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not (place[key] and isinstance(place[key], dict | list) and data.draw(strategies.booleans())):
            break
        place = place[key]
    match data.draw(strategies.sampled_from(["replace", "remove", "add"])):
        case "replace":
            place[key] = data.draw(ANY_JSON)
        case "remove":
            del place[key]
        case "add" if isinstance(place, dict):
            place.setdefault(data.draw(WORDS), data.draw(ANY_JSON))
        case _:
            place.append(data.draw(ANY_JSON))
    problems = [
        str(error) for error in jsonschema.Draft202012Validator(everything.arguments.schema).iter_errors(arguments)
    ]
    refused = ""
    try:
        everything.arguments.convert(arguments)
    except Invalid as error:
        refused = str(error)
    assert bool(refused) == bool(problems), (arguments, refused, problems)


@pytest.mark.parametrize("blocked", [False, True])
def test_pydantic_is_needed_by_nobody(blocked: bool) -> None:
    script = """
        import asyncio, dataclasses, sys
        if sys.argv[1] == "True":
            sys.modules["pydantic"] = None
        from tapeline.tools import tool
        from tapeline.tools.testing import call_tool

        @dataclasses.dataclass
        class Leg:
            km: int

        @tool
        def drive(legs: list[Leg]) -> list[Leg]:
            return legs

        print(asyncio.run(call_tool(drive, {"legs": [{"km": 1}]})).content, bool(sys.modules.get("pydantic")))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(blocked)]
    assert subprocess.check_output(command, text=True) == "[{'km': 1}] False\n"


class Leaf(msgspec.Struct):
    """As deep as one likes."""

    leaf: "Leaf | None" = None


async def test_arguments_nested_too_deeply_are_an_error() -> None:
    @tool
    def grow(tree: Leaf) -> None: ...

    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"leaf": deep}
    for one, arguments in ((grow, {"tree": deep}), (pack, {"item": {"sku": "a"}, "tree": deep})):
        called = await run(Desk(one), arguments, Context(tool=one.name, call="c", deadline=time.time() + 30))
        assert called.message == "invalid arguments: nested too deeply"


async def test_a_validator_that_blocks_is_left_behind_at_the_deadline() -> None:
    over = threading.Event()

    class Slow(msgspec.Struct):
        grams: int

        def __post_init__(self) -> None:
            assert over.wait(10), "nobody's loop waits for it"

    @tool
    def weigh(it: Slow) -> None: ...

    @tool
    async def weigh_async(it: Slow) -> None: ...

    loop = Loop()
    try:
        for one in (weigh, weigh_async):
            context = Context(tool=one.name, call="c", deadline=time.time() + 0.2)
            assert (await run(Desk(one, loop), {"it": {"grams": 1}}, context)).outcome == "timeout"
    finally:
        over.set()
        await loop.close()


# What a tool returns


class Answer(msgspec.Struct):
    """A result with a set and a date."""

    text: str
    tags: set[str]
    at: datetime.date


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("text", "text"),
        (None, None),
        (1.5, 1.5),
        (2**70, 2**70),
        ({"a": [1, (2, 3)]}, {"a": [1, [2, 3]]}),
        (Answer("x", {"y"}, datetime.date(2026, 1, 2)), {"text": "x", "tags": ["y"], "at": "2026-01-02"}),
        (
            [Leg(Place("A"), Place("B"))],
            [{"start": {"city": "A", "country": "PT"}, "end": {"city": "B", "country": "PT"}, "km": None}],
        ),
        (Colour.RED, "red"),
        ({1: "one"}, {"1": "one"}),
    ],
)
async def test_results_are_plain_json(value: Any, content: Any) -> None:
    @tool
    def give() -> Any:
        return value

    called = await call_tool(give)
    assert (called.outcome, called.content) == ("ok", content)
    msgspec.json.encode(called.content)


def circle() -> list[Any]:
    one: list[Any] = []
    one.append(one)
    return one


def nested(depth: int) -> list[Any]:
    one: list[Any] = []
    for _ in range(depth):
        one = [one]
    return one


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        [float("inf")],
        b"bytes",
        {"a": bytearray(b"x")},
        circle(),
        {(1, 2): "tuple key"},
        Opaque(),
        "\ud800",
        nested(limits.JSON_DEPTH_MAX + 1),
        nested(100_000),
        "x" * limits.TOOL_STORED_BYTES_MAX,
        "ü" * (limits.TOOL_STORED_BYTES_MAX // 2),
    ],
    ids=[
        "nan",
        "inf",
        "bytes",
        "bytearray",
        "circle",
        "tuple key",
        "object",
        "surrogate",
        "deep",
        "deeper",
        "large",
        "bytes, not characters",
    ],
)
async def test_what_no_event_can_carry_is_an_error_the_model_can_read(
    value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @tool
    def give() -> Any:
        return value

    called = await call_tool(give)
    assert (called.outcome, called.content) == ("error", None)
    assert called.message.startswith("the tool give returned ")
    assert len(called.message) < 200
    assert "its result cannot be sent: it returned " in caplog.text
    assert caplog.text.count("Traceback") == called.message.count("not JSON"), "the reason's, where there is one"


async def test_only_a_tool_error_is_told_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    @tool
    def refuse() -> None:
        raise ToolError("the shop is closed \ud800" + "x" * 10_000)

    @tool
    async def leak() -> None:
        raise ConnectionError("postgres://admin:hunter2@db")

    refused, leaked = await call_tool(refuse), await call_tool(leak)
    assert refused.message.startswith("the shop is closed ?x")
    assert len(refused.message) == limits.TOOL_MESSAGE_CHARS_MAX
    assert (leaked.outcome, leaked.message) == ("error", "the tool leak failed: ConnectionError")
    assert "hunter2" in caplog.text, "the worker's own log has it"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration(), asyncio.CancelledError()])
@pytest.mark.parametrize("is_async", [True, False])
async def test_no_exception_takes_the_worker_with_it(error: BaseException, is_async: bool) -> None:
    if is_async:

        @tool(name="bad")
        async def bad_async() -> None:
            raise error

        called = await call_tool(bad_async)
    else:

        @tool(name="bad")
        def bad() -> None:
            raise error

        called = await call_tool(bad)
    assert called.outcome == "error"


# While it runs


async def test_blocking_functions_run_beside_each_other_in_threads() -> None:
    together = threading.Barrier(3, timeout=5)

    @tool
    def meet() -> int:
        return together.wait()

    called = await asyncio.gather(*(call_tool(meet) for _ in range(3)))
    assert sorted(one.content for one in called) == [0, 1, 2]


async def test_the_context_says_what_the_tool_needs_to_know() -> None:
    @tool
    async def look(context: Context) -> dict[str, Any]:
        await context.progress(0.5, "half")
        context.progress(7, "too much")
        context.progress(float("nan"))
        context.log.info("seen")
        return {
            "call": context.call,
            "attempt": context.attempt,
            "left": context.time_left_s,
            "stopped": bool(context.stopped),
        }

    called = await call_tool(look, call="c1", attempt=2, timeout_s=9)
    assert 8 < called.content.pop("left") <= 9
    assert called.content == {"call": "c1", "attempt": 2, "stopped": False}
    assert called.progress == [(0.5, "half"), (1.0, "too much"), (None, "")]


async def test_progress_can_be_said_in_a_thread() -> None:
    @tool
    def work(context: Context) -> str:
        context.progress(0.1, "here")
        return threading.current_thread().name

    called = await call_tool(work, call="c1")
    assert (called.content, called.progress) == ("tool work c1", [(0.1, "here")])


async def test_a_late_tool_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    cleaned = asyncio.Event()
    held = threading.Event()

    @tool
    async def sleeper() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.set()

    @tool
    def holder() -> str:
        held.wait(60)
        return "late"

    started = time.monotonic()
    late, stuck = await asyncio.gather(call_tool(sleeper, timeout_s=0.1), call_tool(holder, timeout_s=0.1))
    assert (late.outcome, stuck.outcome) == ("timeout", "timeout")
    assert cleaned.is_set(), "an async function may clean up"
    assert time.monotonic() - started < 30
    held.set()
    async with asyncio.timeout(5):
        while "what it returned is dropped" not in caplog.text:
            await asyncio.sleep(0.01)


async def test_a_tool_that_ignores_its_cancellation_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    free = asyncio.Event()

    @tool
    async def stubborn() -> None:
        while not free.is_set():
            try:
                await free.wait()
            except asyncio.CancelledError:
                continue

    called = await call_tool(stubborn, timeout_s=0.1)
    free.set()
    assert called.outcome == "timeout"
    assert "left behind" in caplog.text


async def test_a_stop_reaches_the_tool_and_what_it_returns_then_is_kept() -> None:
    stopped = Flag()

    @tool
    async def patient(context: Context) -> str:
        await context.stopped.wait()
        return "as far as I got"

    @tool
    def threaded(context: Context) -> bool:
        return context.stopped.wait_in_thread(10)

    calls = asyncio.gather(call_tool(patient, stopped=stopped), call_tool(threaded, stopped=stopped))
    await asyncio.sleep(0)
    stopped.set()
    one, other = await calls
    assert (one.outcome, one.content) == ("stopped", "as far as I got")
    assert (other.outcome, other.content) == ("stopped", True)


# The built-in tools


async def test_the_clock_knows_time_zones() -> None:
    called = await call_tool(builtin.clock, {"timezone": "Asia/Tokyo"})
    assert called.content["time"].endswith("+09:00")
    assert (await call_tool(builtin.clock)).content["time"].endswith("+00:00")
    for wrong in ("Mars/Olympus", "../../etc/passwd", "", "\0"):
        assert (await call_tool(builtin.clock, {"timezone": wrong})).outcome == "error", wrong


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        ("-(2 ** 10) // 3", -342),
        ("7 / 2", 3.5),
        ("sqrt(16) + max(1, 2)", 6.0),
        ("round(pi, 2)", 3.14),
        ("round(7, -10**9)", 0),
        ("2 ** 64", "18446744073709551616"),
        (" 10 % 4 ", 2),
    ],
)
async def test_calculate(expression: str, value: Any) -> None:
    assert (await call_tool(builtin.calculate, {"expression": expression})).content == value


@pytest.mark.parametrize(
    "expression",
    [
        "9 ** 9 ** 9",
        "9.0 ** 9999",
        "(-8) ** 0.5",
        "1 / 0",
        "__import__('os').system('true')",
        "().__class__",
        "x + 1",
        "'a' * 9",
        "True + 1",
        "1 if 1 else 2",
        "[1][0]",
        "max(*[1])",
        "round(1.5, ndigits=1)",
        "abs()",
        "",
        "1 +",
        "(" * 400 + "1" + ")" * 400,
        "-" * 990 + "1",
        "1+" * 600 + "1",
        "log(0)",
        "1e999",
    ],
)
async def test_what_is_not_arithmetic_is_refused(expression: str) -> None:
    started = time.monotonic()
    called = await call_tool(builtin.calculate, {"expression": expression})
    assert (called.outcome, time.monotonic() - started < 2) == ("error", True)
    assert "Error" not in called.message, called.message


async def test_search_notes_finds_notes_and_says_how_far_it_is() -> None:
    called = await call_tool(builtin.search_notes, {"query": "fence", "seconds": 0})
    assert called.content["notes"][0]["title"] == "The fence"
    fractions = [fraction for fraction, _ in called.progress]
    assert fractions == sorted(fractions, key=lambda one: one or 0)
    assert fractions[-1] == 1.0
    assert (await call_tool(builtin.search_notes, {"query": "zebra", "seconds": 0})).content["notes"] == []
    assert (await call_tool(builtin.search_notes, {"query": "x", "seconds": 1e9})).outcome == "error"


async def test_search_notes_ends_early_when_stopped() -> None:
    stopped = Flag()
    searching = asyncio.create_task(call_tool(builtin.search_notes, {"query": "fence", "seconds": 30}, stopped=stopped))
    await asyncio.sleep(0)
    stopped.set()
    async with asyncio.timeout(10):
        assert (await searching).outcome == "stopped"


async def test_collatz_shows_each_step() -> None:
    called = await call_tool(builtin.collatz, {"start": 6, "seconds": 0})
    assert called.output == "6 → 3\n3 → 10\n10 → 5\n5 → 16\n16 → 8\n8 → 4\n4 → 2\n2 → 1\n"
    assert called.content == {"start": 6, "steps": 8, "highest": 16}
    assert (await call_tool(builtin.collatz, {"start": 1})).content["steps"] == 0


async def test_lots_fall_on_one_of_the_names() -> None:
    called = await call_tool(builtin.draw_lots, {"names": ["tea", "coffee"]})
    assert called.content["drawn"] in ("tea", "coffee")
    assert (await call_tool(builtin.draw_lots, {"names": []})).outcome == "error"


async def test_fail_fails() -> None:
    assert (await call_tool(builtin.fail, {"message": "on purpose"})).message == "on purpose"


async def test_results_become_json_two_at_a_time_those_included_whose_time_is_over() -> None:
    free, entered = threading.Event(), list[int]()

    class Large:
        def model_dump(self, mode: str) -> str:
            entered.append(1)
            assert free.wait(30)
            return mode

    @tool(name="give")
    def give() -> Any:
        return Large()

    async def called(desk: Desk, timeout_s: float) -> Result:
        return await run(desk, {}, Context(tool=desk.tool.name, call=uuid4().hex, deadline=time.time() + timeout_s))

    desk = Desk(give)
    try:
        calls = await asyncio.gather(*(called(desk, 0.2) for _ in range(3 * limits.TOOL_ENCODERS_MAX)))
        assert {one.outcome for one in calls} == {"timeout"}
        assert {one.message for one in calls} == {
            "the tool give has ended, but what it returned did not become JSON in time"
        }
        assert len(entered) == limits.TOOL_ENCODERS_MAX, "those that had no turn are not made any more"
        assert (await called(desk, 0.2)).outcome == "timeout"
        assert len(entered) == limits.TOOL_ENCODERS_MAX, "a turn is held for as long as it is used"
        assert (await called(Desk(builtin.clock), 30)).outcome == "ok", "another tool has turns of its own"
    finally:
        free.set()
    assert (await called(desk, 30)).content == "json", "and all is well again"


async def test_what_is_left_behind_keeps_its_slot_until_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    free = threading.Event()

    @tool(max_concurrency=2)
    def hold() -> None:
        assert free.wait(30)

    desk = Desk(hold)
    for call in ("one", "two"):
        await desk.slots.acquire()
        context = Context(tool="hold", call=call, deadline=time.time() + 0.1)
        assert (await run(desk, {}, context)).outcome == "timeout"
        desk.give_back(call)
    assert desk.slots.locked()
    assert desk.stuck_s > 0
    free.set()
    async with asyncio.timeout(10):
        await desk.slots.acquire()
        await desk.slots.acquire()
    assert desk.stuck_s == 0
    assert caplog.text.count("what it returned is dropped") == 2


async def test_where_there_can_be_no_more_threads_the_call_has_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for one in (builtin.calculate, builtin.fail, tool(process=True)(nested)):
        called = await call_tool(one, {})
        assert (called.outcome, called.message) == ("error", f"the tool {one.name} failed: RuntimeError")


def test_built_in_tools_are_described() -> None:
    tools = (builtin.clock, builtin.calculate, builtin.search_notes, builtin.collatz, builtin.draw_lots, builtin.fail)
    for one in tools:
        spec = one.spec()
        assert spec.description
        for name, schema in spec.parameters["properties"].items():
            assert schema.get("description"), f"{spec.name}: {name}"
        json.dumps(spec.parameters)
