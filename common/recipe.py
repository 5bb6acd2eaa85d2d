"""Recipes: one TOML file a run, read strictly.

    load("tiny", {"run": RunConfig, "actor": ActorConfig}, ["run.seed=3"])
        ->  {"run": RunConfig(...), "actor": ActorConfig(...)}

A recipe is the path of a TOML file or the name of a shipped one (`common/recipes`). Unknown tables
and keys, wrong types and impossible combinations are refused in one line that names the TOML path
and the nearest valid name. Where a value may be absent, the string "none" says so (TOML has no
null).

A section may have `check(self) -> None` that raises ConfigError for combinations that cannot work,
and a nested struct may too; the loader puts the path in front of the message.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from common.config import LOCAL, RunConfig, Section, without_password
from common.errors import ConfigError

SHIPPED = Path(__file__).parent / "recipes"
SECTIONS_GROUP = "isentrope.sections"
NONE = "none"

Tree = dict[str, Any]


def load(
    recipe: str, sections: Mapping[str, type[Section]], overrides: Sequence[str] = ()
) -> dict[str, Section]:
    """The sections asked for, decoded and checked; raises ConfigError."""
    tree = read(recipe, overrides)
    tables = sorted(
        {"run", *sections, *(entry.name for entry in entry_points(group=SECTIONS_GROUP))}
    )
    for name, table in tree.items():
        if name not in tables:
            raise ConfigError(
                _at(recipe, overrides, f"{name}: unknown table{_nearest(name, tables)}")
            )
        if not isinstance(table, dict):
            raise ConfigError(f"{recipe}: {name}: expected a table, got {_kind(table)}")
    try:
        return {name: decode(name, cls, tree.get(name, {})) for name, cls in sections.items()}
    except ConfigError as error:
        raise ConfigError(_at(recipe, overrides, str(error))) from None


def load_all(recipe: str, overrides: Sequence[str] = ()) -> dict[str, Section]:
    """Every section that is installed (the entry points of the group `isentrope.sections`), and
    [run]."""
    found = {entry.name: entry.load() for entry in entry_points(group=SECTIONS_GROUP)}
    return load(recipe, {"run": RunConfig, **found}, overrides)


def digest(run: RunConfig) -> str:
    """What two processes of one run compare: [run] without what may differ between them."""
    shared = {k: v for k, v in msgspec.to_builtins(run).items() if k not in LOCAL}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


# -- reading ---------------------------------------------------------------------------------------


def names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def locate(recipe: str) -> Path:
    """The file of a recipe; raises ConfigError with the names there are."""
    for path in (Path(recipe).expanduser(), SHIPPED / f"{recipe}.toml"):
        if path.is_file():
            return path
    if Path(recipe).expanduser().is_dir():
        raise ConfigError(
            f"{recipe} is a folder: give the TOML file of a recipe, or --resume to go on with a run"
        )
    if recipe.endswith(".toml") or "/" in recipe:
        raise ConfigError(f"no recipe {recipe!r}: there is no such file")
    near = _nearest(recipe, names())
    raise ConfigError(
        f"no recipe {recipe!r}{near}; give a TOML file, or one of: {', '.join(names())}"
    )


def read(recipe: str, overrides: Sequence[str] = ()) -> Tree:
    """The tables of a recipe with the overrides in place, not yet decoded."""
    path = locate(recipe)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    for override in overrides:
        _override(tree, override)
    return tree


def _override(tree: Tree, override: str) -> None:
    """Put `section.key=value` into the tree; the value is TOML, or else taken as a bare string. A
    number is a place in a list: `learner.methods.0.target=0.25`.
    """
    name, equals, text = override.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"-s {override}: expected section.key=value, as in -s learner.lr=2e-6")
    table: Any = tree
    for key in keys[:-1]:
        table = table.setdefault(key, {}) if isinstance(table, dict) else _place(table, key, name)
        if not isinstance(table, dict | list):
            raise ConfigError(f"-s {override}: {key} is {_kind(table)}, not a table")
    if isinstance(table, list):
        _place(table, keys[-1], name)
    table[int(keys[-1]) if isinstance(table, list) else keys[-1]] = _value(text.strip())


def _place(values: list[Any], key: str, name: str) -> Any:
    """The item of a list that `key` counts from 0; raises ConfigError when there is none."""
    if not key.isdecimal() or int(key) >= len(values):
        raise ConfigError(
            f"-s {name}: {key} is no place in a list of {len(values)}; 0 is the first"
        )
    return values[int(key)]


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _at(recipe: str, overrides: Sequence[str], message: str) -> str:
    """`message` with the place in front that the path it begins with came from: the command line or
    the file."""
    path = re.split(r"[:=\s]", message, maxsplit=1)[0]
    for override in overrides:
        key = override.partition("=")[0].strip()
        if path == key or path.startswith((f"{key}.", f"{key}[")) or key.startswith(f"{path}."):
            return f"-s {without_password(override)}: {message}"
    return f"{recipe}: {message}"


# -- decoding --------------------------------------------------------------------------------------


def decode(name: str, cls: type[Section], table: Tree) -> Section:
    """One table as its struct; raises ConfigError whose message begins with the path, as in
    `learner.lr`."""
    try:
        section = msgspec.convert(_vet(table, inspect.type_info(cls), name), cls)
    except msgspec.ValidationError as error:
        raise ConfigError(_told(name, str(error))) from None
    for path, part in _parts(name, section):
        try:
            part.check()
        except ConfigError as error:
            raise ConfigError(f"{path}.{error}") from None
    return section


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`value` and every struct in it that knows how to check itself, with paths."""
    if isinstance(value, msgspec.Struct):
        if hasattr(value, "check"):
            yield path, value
        for field in value.__struct_fields__:
            yield from _parts(f"{path}.{field}", getattr(value, field))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _parts(f"{path}[{index}]", item)


def _vet(value: Any, wanted: inspect.Type, path: str) -> Any:
    """`value` with "none" made None where that is allowed; raises ConfigError at the first unknown
    key."""
    if isinstance(wanted, inspect.UnionType):
        return _vet_union(value, wanted, path)
    if isinstance(wanted, inspect.StructType) and isinstance(value, dict):
        if wanted.tag_field:
            _vet_tag(value, {wanted.tag: wanted}, path)
        fields = {field.encode_name: field.type for field in wanted.fields}
        valid = [*fields, *([wanted.tag_field] if wanted.tag_field else [])]
        for key in value:
            if key not in valid:
                raise ConfigError(f"{path}.{key}: unknown{_nearest(key, valid, path + '.')}")
        return {
            k: _vet(v, fields[k], f"{path}.{k}") if k in fields else v for k, v in value.items()
        }
    if isinstance(wanted, inspect.LiteralType) and value not in wanted.values:
        known = [str(v) for v in wanted.values]
        raise ConfigError(
            f"{path}: unknown {value!r}{_nearest(str(value), known)}; one of: {', '.join(known)}"
        )
    if isinstance(value, list):
        return [_vet(v, _item(wanted), f"{path}[{i}]") for i, v in enumerate(value)]
    return value


def _vet_union(value: Any, wanted: inspect.UnionType, path: str) -> Any:
    if value == NONE and wanted.includes_none and not _takes_text(wanted):
        return None
    structs = {t.tag: t for t in wanted.types if isinstance(t, inspect.StructType)}
    if not structs or not isinstance(value, dict):
        return value
    return _vet(value, _vet_tag(value, structs, path), path)


def _vet_tag(
    value: Tree, structs: Mapping[Any, inspect.StructType], path: str
) -> inspect.StructType:
    """The struct that `type = ...` names; one alone, without a tag, needs no name."""
    tag_field = next(iter(structs.values())).tag_field
    if tag_field is None:
        return next(iter(structs.values()))
    tag, tags = value.get(tag_field), sorted(str(tag) for tag in structs)
    if tag not in structs:
        said = f"{tag_field} missing" if tag is None else f"unknown {tag_field} {tag!r}"
        raise ConfigError(f"{path}: {said}{_nearest(str(tag), tags)}; one of: {', '.join(tags)}")
    return structs[tag]


def _takes_text(union: inspect.UnionType) -> bool:
    return any(isinstance(t, inspect.StrType) for t in union.types)


def _item(wanted: inspect.Type) -> inspect.Type:
    """The type of the items of a list; anything where it is no list."""
    return getattr(wanted, "item_type", inspect.AnyType())


def _told(name: str, message: str) -> str:
    """msgspec's "Expected `float`, got `str` - at `$.lr`" as "learner.lr: expected a number, got a
    string"."""
    said, _, where = message.partition(" - at ")
    path = name + where.strip("`").removeprefix("$")
    said = re.sub(
        r"`(\w+)( \| null)?`",
        lambda m: WORDS.get(m[1], m[1]) + (f' or "{NONE}"' if m[2] else ""),
        said,
    )
    return f"{path}: {said[0].lower()}{said[1:]}"


WORDS = {
    "str": "a string",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "array": "a list",
    "object": "a table",
}


def _kind(value: Any) -> str:
    name = type(value).__name__
    return WORDS.get({"list": "array", "dict": "object"}.get(name, name), name)


def _nearest(name: str, valid: Iterable[str], path: str = "") -> str:
    """`; did you mean learner.lr?`: the valid name nearest to `name`, or all of them when none is
    near."""
    valid = list(valid)
    found = [v for v in valid if _initials(name) == v][:1]  # learning_rate is lr
    found = found or difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if found:
        return f"; did you mean {path}{found[0]}?"
    return f"; there is: {', '.join(valid)}" if path and valid else ""


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


# -- writing ---------------------------------------------------------------------------------------


def dump(sections: Mapping[str, Section]) -> str:
    """TOML text of every value in force, without what belongs to one process only (`LOCAL` of
    [run])."""
    text = []
    for name, section in sections.items():
        values = msgspec.to_builtins(section)
        text.append(
            _table(name, {k: v for k, v in values.items() if name != "run" or k not in LOCAL})
        )
    return "\n".join(text)


def freeze(recipe: str, overrides: Sequence[str] = ()) -> str:
    """What a run folder keeps: every value in force, so that later defaults change nothing."""
    return dump(load_all(recipe, overrides))


def _table(name: str, values: Mapping[str, Any]) -> str:
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [
        f"{_key(key)} = {inline(value)}\n" for key, value in values.items() if key not in tables
    ]
    return "".join(
        [f"[{name}]\n", *lines, *(f"\n{_table(f'{name}.{_key(k)}', v)}" for k, v in tables.items())]
    )


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def inline(value: Any) -> str:
    """A value as TOML on one line."""
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
