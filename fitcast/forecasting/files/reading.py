"""Values of a file, each as the kind that its key wants, and what was left over.

YAML has its traps: `1e-4` is text there, an empty value is None, `no` is False. A value that cannot
be what its key says is refused in one sentence.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fitcast.units import Said, refusal

ALIKE = 0.88  # from which share of equal letters on an unknown key is a slip for a known one


def load(path: Path) -> dict[str, Any]:
    """The keys and values at the top of a YAML or JSON file.

    Raises:
        ValueError: No such file, another format, or no keys.
    """
    import yaml

    try:
        text = path.read_text("utf-8")
        found = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise refusal(
            "file", "be there and readable", Said(f"{path} ({error.strerror})"), "check the path"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        where = " ".join(str(error).split())
        raise refusal(
            str(path), "be YAML or JSON", Said(where[:200]), "mend the line that it names"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise refusal(
            str(path),
            "have keys and values, as in `model_name_or_path: ...`",
            Said(f"{type(found).__name__}"),
            "give the file that the tool is started with",
        )
    return found


class Values:
    """The keys of a file that were not taken yet.

    Args:
        values: As the file has them; an empty value is as if the key were not there.
    """

    def __init__(self, values: dict[str, Any]):
        self.left = {key: value for key, value in values.items() if value not in (None, "", [], {})}
        self.taken: set[str] = set()

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it stands in the file."""
        self.taken.add(key)
        return self.left.pop(key, default)

    def whole(self, key: str, default: int | None = None) -> int | None:
        """A whole number from 1."""
        value = self.raw(key)
        if value is None:
            return default
        number = as_number(value)
        if number is None or number != int(number) or number < 1:
            raise refusal(key, "be a whole number from 1", value, f"for example {key}: 8")
        return int(number)

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number; YAML reads 1e-4 as text, which is taken as one here."""
        value = self.raw(key)
        if value is None:
            return default
        number = as_number(value)
        if number is None:
            raise refusal(key, "be a number", value, f"for example {key}: 0.05")
        return number

    def yes_no(self, key: str, default: bool = False) -> bool:
        """True or False."""
        value = self.raw(key)
        if value is None:
            return default
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise refusal(key, "be true or false", value, f"write {key}: true, or leave it out")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """A name."""
        value = self.raw(key)
        if value is not None and not isinstance(value, str):
            raise refusal(key, "be a name", value, f'write {key}: "..."')
        return default if value is None else value.strip()

    def names(self, key: str) -> list[str] | None:
        """Names, as a list or as text with commas between."""
        value = self.raw(key)
        if isinstance(value, str):
            value = [name.strip() for name in value.split(",") if name.strip()]
        named = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if value is not None and not named:
            raise refusal(
                key, "be names, or text with commas between", value, f"write {key}: q_proj,v_proj"
            )
        return value

    def one_of(self, key: str, choices: Iterable[str], default: str, remedy: str) -> str:
        """One of some names."""
        value = self.text(key, default)
        choices = list(choices)
        if value not in choices:
            raise refusal(key, f"be one of {', '.join(choices)}", value, remedy)
        return str(value)

    def notes(
        self, quiet: re.Pattern[str], not_modelled: dict[str, str], known: Iterable[str] = ()
    ) -> list[str]:
        """A sentence for each key that is left: it is not modelled, or not understood.

        Args:
            quiet: Keys that change no byte of a training step.
            not_modelled: Keys that do, and why they are not followed.
            known: Keys that decide memory, beside those that were taken.

        Raises:
            ValueError: A key is all but one that decides memory.
        """
        found = []
        for key, value in self.left.items():
            if key in not_modelled:
                if value is not False:
                    found.append(f"{key}: {shown(value)} is not modelled: {not_modelled[key]}")
            elif not quiet.fullmatch(key):
                self._refuse_slip(key, value, known)
                found.append(f"{key}: {shown(value)} is not understood, and is left out")
        return found

    def _refuse_slip(self, key: str, value: object, known: Iterable[str]) -> None:
        names = sorted({*self.taken, *known})
        if close := difflib.get_close_matches(key, names, n=1, cutoff=ALIKE):
            raise refusal("key", "be spelled as the tool spells it", Said(f"{key}: {shown(value)}"),
                          f"did you mean {close[0]}?")  # fmt: skip


def as_number(value: object) -> float | None:
    """A number, or text that is one; `None` for anything else, True and False included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def shown(value: object, most: int = 60) -> str:
    """A value on one line, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
