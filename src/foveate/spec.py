"""Text to Method and back: `name[:field=value[,field=value]...]`, stages joined by `+`, `@file` for a stored one."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from foveate import methods
from foveate.core import FoveateError, Method, did_you_mean, hints_of, short
from foveate.paths import LONGEST_PATH, checked, read_json

_NUMBER = re.compile(r"-?((\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|inf|nan)", re.IGNORECASE)
_EXPONENT = re.compile(r"[=/,]\s*-?(\d+(\.\d*)?|\.\d+)[eE]\Z")
_BARE = re.compile(r"[^,:+/\"'\\\s]+")
_WORDS = {"none": None, "true": True, "false": False}

LONGEST = 10_000
"""Characters of a spec; a path in it can have 4,096."""

MOST_BYTES = 1_000_000
"""Of the JSON behind `@file`; `tune` writes its findings beside the spec."""


def parse(text: str) -> Method:
    """The one method that `text` names.

    Raises:
        FoveateError: unknown method or field, a value of the wrong type or range, or several stages.
    """
    stages = parse_stages(text)
    if len(stages) != 1:
        raise FoveateError(f"{_told(text)} names {len(stages)} stages where one method is expected")
    return stages[0]


def parse_stages(text: str) -> tuple[Method, ...]:
    """Every stage of `a:keep=0.5+b:keep=0.25`, or of the JSON behind `@file`."""
    if len(text) > LONGEST:
        raise FoveateError(f"{_told(text)} is too long for a spec; the most is {LONGEST} characters")
    if text.startswith("@"):
        return _load(text)
    parts = _split(text, "+")
    if not all(part.strip() for part in parts):
        raise FoveateError(f"{_told(text)} has an empty stage; write name[:field=value,...], stages joined by +")
    return tuple(_parse_one(part.strip()) for part in parts)


def format(what: Method | Sequence[Method]) -> str:
    """The text of a method or of several stages: `keep`, and the fields that differ from their default."""
    if not isinstance(what, Method):
        return "+".join(format(stage) for stage in what)
    fields = []
    for field in dataclasses.fields(what):
        value = getattr(what, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if not field.init or ((field.name != "keep" or value is None) and _same(value, default)):
            continue
        name = "from" if field.name == "path" and hasattr(what, "from_pretrained") else field.name
        fields.append(f"{name}={_write(value)}")
    name = methods.name_of(what)
    return f"{name}:{','.join(fields)}" if fields else name


def _same(left: object, right: object) -> bool:
    """Equal and of one type: 1 token and 1.0 of all tokens are not the same."""
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return type(left) is type(right) and left == right


def _parse_one(text: str) -> Method:
    name, colon, rest = text.partition(":")
    kind = methods.get(name.strip())
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}
    hints = hints_of(kind)
    values: dict[str, Any] = {}
    for item in _split(rest, ",") if colon else []:
        field, equals, value = item.partition("=")
        field = field.strip()
        if not equals:
            raise FoveateError(f"{_told(item.strip())} in {_told(text)} is no field=value")
        if field == "from" and hasattr(kind, "from_pretrained"):
            field = "path"
        elif field not in known:
            raise FoveateError(f"{name} has no field {_told(field)}; {did_you_mean(field, known)}")
        if field in values:
            raise FoveateError(f"{name} is given {field!r} twice")
        values[field] = _read(value.strip(), hints.get(field, str), f"{name}: {field}")
    if "path" in values and hasattr(kind, "from_pretrained"):
        loaded: Method = kind.from_pretrained(values.pop("path"), **values)
        return loaded
    missing = [key for key, field in known.items() if key not in values and _required(field)]
    if missing:
        raise FoveateError(f"{name} needs {' and '.join(missing)}; write {name}:{missing[0]}=...")
    return kind(**values)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _split(text: str, separator: str) -> list[str]:
    """Split at `separator` outside quotes."""
    parts, current, quote, escaped = [], "", "", False
    for place, letter in enumerate(text):
        if escaped:
            escaped = False
        elif letter == "\\" and quote:
            escaped = True
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == separator and not (
            separator == "+" and text[place + 1 : place + 2].isdigit() and _EXPONENT.search(current)
        ):
            parts.append(current)
            current = ""
            continue
        current += letter
    if quote:
        raise FoveateError(f"{_told(text)} has an open {quote} quote")
    return [*parts, current]


def _read(text: str, hint: Any, where: str) -> Any:
    value = _value(text, where)
    for reading in _readings(text, value):
        if _fits(reading, hint):
            return reading
    choices = [choice for part in _alternatives(hint) for choice in typing.get_args(part) if _is_literal(part)]
    if choices:
        raise FoveateError(f"{where}={short(text)} is not among its choices; {did_you_mean(text, map(str, choices))}")
    raise FoveateError(f"{where}={short(text)} is {_kind_name(value)}, not {_hint_name(hint)}")


def _readings(text: str, value: Any) -> Iterator[Any]:
    """What a field may take `text` for, the most literal first: as written, as floats, as one item, as a string."""
    yield value
    yield _floats(value)
    if not isinstance(value, tuple):
        yield (value,)
        yield (_floats(value),)
    if '"' not in text and "'" not in text:
        yield text
        yield tuple(part for part in _split(text, "/") if part)


def _floats(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_floats, value))
    return float(value) if type(value) is int else value


def _value(text: str, where: str) -> Any:
    if text == "/":
        return ()
    parts = [part.strip() for part in _split(text, "/")]
    if len(parts) > 1 and all(parts[:-1]):
        return tuple(_value(part, where) for part in parts if part)
    if text[:1] in {'"', "'"}:
        return _unquote(text, where)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if text.endswith("%") and _NUMBER.fullmatch(text[:-1]):
        return float(text[:-1]) / 100
    if _NUMBER.fullmatch(text):
        return int(text) if re.fullmatch(r"-?\d{1,300}", text) else float(text)
    if not _BARE.fullmatch(text):
        told = short(text) or "(nothing)"
        raise FoveateError(f"{where}={told}: a string that is empty or holds , : + / or space is quoted")
    return text


def _unquote(text: str, where: str) -> str:
    if len(text) < 2 or text[-1] != text[0]:
        raise FoveateError(f"{where}={short(text)} has an open quote")
    return re.sub(r"\\(.)", r"\1", text[1:-1])


def _write(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(int(value) if isinstance(value, int) else float(value))  # NumPy's floats write their type
    if isinstance(value, tuple):
        return "/".join(map(_write, value)) + ("/" if len(value) < 2 else "")
    text = str(value)
    plain = _BARE.fullmatch(text) and text.lower() not in _WORDS and not _NUMBER.fullmatch(text.rstrip("%"))
    return text if plain else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        return tuple(inner for part in typing.get_args(hint) for inner in _alternatives(part))
    return (hint,)


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def _fits(value: object, hint: Any) -> bool:
    if hint is Any:
        return True
    for part in _alternatives(hint):
        if _is_literal(part):
            if any(_same(value, choice) for choice in typing.get_args(part)):
                return True
        elif typing.get_origin(part) is tuple:
            items = typing.get_args(part)
            if isinstance(value, tuple) and _items_fit(value, items):
                return True
        elif part is None or part is type(None):
            if value is None:
                return True
        elif isinstance(part, type) and type(value) is part:
            return True
    return False


def _items_fit(value: tuple[Any, ...], items: tuple[Any, ...]) -> bool:
    if len(items) == 2 and items[1] is Ellipsis:
        return all(_fits(item, items[0]) for item in value)
    return len(value) == len(items) and all(_fits(item, part) for item, part in zip(value, items, strict=True))


def _kind_name(value: Any) -> str:
    return "none" if value is None else type(value).__name__


def _hint_name(hint: Any) -> str:
    """The types that a hint allows, as a user writes them: "int or float or none"."""
    names = []
    for part in _alternatives(hint):
        plain = isinstance(part, type) and not typing.get_args(part)
        names.append("none" if part in {None, type(None)} else part.__name__ if plain else str(part))
    return " or ".join(names)


def _load(text: str) -> tuple[Method, ...]:
    """The stages behind `@file`."""
    told = short(text, LONGEST_PATH)
    stored = read_json(checked(text[1:]), told, most=MOST_BYTES)
    spec = stored.get("prune") if isinstance(stored, dict) else stored
    if not isinstance(spec, str):
        raise FoveateError(f'{told} has no "prune" entry that holds a spec')
    if spec.startswith("@"):
        raise FoveateError(f"{told} points on to {short(spec, LONGEST_PATH)}; the file itself holds the spec")
    return parse_stages(spec)


def _told(text: str) -> str:
    """What a user wrote, in quotes and no longer than a message can take."""
    return short(repr(text))
