"""Settings of a run: frozen and strict, read from YAML, written back beside every result."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from smelt.errors import RecipeError

SettingsT = TypeVar("SettingsT", bound="Settings")


class Settings(BaseModel):
    """A group of settings: nothing unknown is accepted, nothing changes after it was checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def load_recipe(path: str | Path, cls: type[SettingsT], overrides: Sequence[str] = ()) -> SettingsT:
    """The recipe of a YAML file, with `a.b=value` overrides, checked before anything else is read.

    Args:
        path: a YAML file holding one mapping.
        cls: the settings the file must fit.
        overrides: as in `--set a.b=c`; the value is read as YAML (`3e-3`, `true`, `[a, b]`).
    """
    values = read_values(path, cls)
    for override in overrides:
        override_value(values, override)
    return check_recipe(values, cls, origin=str(path))


def find_recipe(named: str | Path, kind: str) -> Path:
    """The file that is meant: a path, or the bare name of a recipe that comes with smelt.

    Args:
        named: `recipes/study/tiny.yaml`, or `tiny` or `tiny.yaml` where there is no such file.
        kind: the folder of such recipes: study, train.
    """
    path = Path(named)
    if path.suffix not in ("", ".yaml") or len(path.parts) != 1 or path.is_file():
        return path
    package = Path(__file__).parent
    folders = (package / "recipes" / kind, package.parents[1] / "recipes" / kind)  # wheel, clone
    known = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    if path.stem not in known:
        raise RecipeError(
            f"{named}: there is no such recipe. Write the path of a YAML file, or one of "
            f"{', '.join(sorted(known)) or 'none (this smelt has none with it)'}."
        )
    return known[path.stem]


def read_values(path: str | Path, cls: type[Settings]) -> dict[str, Any]:
    """The settings that a YAML file spells, not yet checked against `cls`."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe file. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe ({error}).") from None
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise RecipeError(f"{path}: not valid YAML ({where}). Mend the file.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of settings. {_offer(cls, ())}")
    return values


def check_recipe(
    values: Mapping[str, Any], cls: type[SettingsT], *, origin: str = "recipe"
) -> SettingsT:
    """The settings that `values` spell, or one error that names every setting that does not fit."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem, cls) for problem in error.errors()]
        raise RecipeError(f"{origin}: " + " ".join(lines)) from None


def dump_recipe(recipe: Settings, path: str | Path) -> None:
    """Write the recipe as YAML, every default spelt out; `load_recipe` reads the same back."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def expand_environment(text: str) -> str:
    """The text with every `${NAME}` replaced by that environment variable; unset is an error."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:
            raise RecipeError(
                f"{text!r} needs the environment variable {match[1]}, which is not set. "
                f"Set it first, e.g. export {match[1]}=/folder."
            )
        return found

    return re.sub(r"\$\{(\w+)\}", value, text)


def override_value(values: dict[str, Any], override: str) -> None:
    """Set one dotted key in place, as `--set a.b=c` asks; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"--set {override!r}: write it as name=value or group.name=value.")
    *groups, last = key.split(".")
    for group in groups:
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override!r}: {group!r} is a value, not a group of settings.")
    try:
        values[last] = _number(yaml.safe_load(text))
    except yaml.YAMLError:
        values[last] = text


def _number(value: Any) -> Any:
    """YAML 1.1 reads `3e-3` as a string; a person means a number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _explain(problem: Any, cls: type[Settings]) -> str:
    """One pydantic problem, as one sentence a user can act on."""
    where = [str(part) for part in problem["loc"]]
    name = ".".join(where)
    if problem["type"] == "extra_forbidden":
        return f"there is no setting {name!r}. {_offer(cls, where[:-1])}"
    if problem["type"] == "missing":
        return f"the setting {name!r} is missing. {_offer(cls, where[:-1])}"
    said = problem["msg"].removeprefix("Value error, ")
    return f"{name} = {problem['input']!r} cannot be: {said}." if name else f"{said}."


def _offer(cls: type[Settings], groups: Sequence[str]) -> str:
    """The settings there are at that place of the recipe."""
    for group in groups:
        field = cls.model_fields.get(group)
        inner = next(_settings_of(field.annotation), None) if field else None
        if inner is None:
            break
        cls = inner
    return f"The settings here are: {', '.join(cls.model_fields)}."


def _settings_of(annotation: Any) -> Iterator[type[Settings]]:
    """The settings classes inside an annotation such as `Model | None` or `tuple[Source, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    elif get_origin(annotation) is not None or get_origin(annotation) is Union:
        for part in get_args(annotation):
            yield from _settings_of(part)
