"""MAP_KEYS and ROLE_MAP. Input: the two settings, with a line break between. Sound: the parts and roles are known
ones, and a row read with them is refused in words or a dialogue."""

from __future__ import annotations

import random
from pathlib import Path

from fuzz import mutate
from fuzz.harness import Harness, sound
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.preprocess.keys import MAPPABLE, ROLE_NAMES, columns
from rwkv_peft.preprocess.schemas import Reader, RowError
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Dialogue

ROWS = (
    {"question": "Why?", "answer": "So.", "note": "x", "system": "s"},
    {"messages": [{"role": "customer", "content": "Hi"}, {"role": "agent", "content": "Hello"}]},
    {"a": "one", "b": "two", "": "three", "talk": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]},
)


class It(Harness):
    longest = 1 << 12
    places = ("MAP_KEYS", "ROLE_MAP")
    names = (*MAPPABLE, *ROLE_NAMES, "question", "answer", "customer", "agent", "talk", "a", "b", "note", "from", "")

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        return mutate.of_json_lines(data, random, other, self.names)

    def read(self, data: bytes, folder: Path) -> str:
        keys, _, roles = data.decode("utf-8", "surrogateescape").partition("\n")
        try:
            result = columns(keys, roles)
        except SettingErrors as problems:
            sound({p.name for p in problems.problems} <= {*self.places}, "names another setting", problems)
            raise
        sound({*result.given} <= {*MAPPABLE}, "an unknown part", result)
        sound(all(role is None or isinstance(role, Role) for role in result.roles.values()), "an unknown role", result)
        hash(result)
        outcomes = []
        for row in ROWS:
            try:
                schema, made = Reader(result, "auto", True).read(dict(row))
                sound(isinstance(made, (str, Dialogue)), "neither text nor dialogue", made)
                outcomes.append(schema.split("/")[0][:10])
            except RowError as error:
                sound(str(error.message).strip(), "a refusal without words", error)
                outcomes.append(error.reason)
        return " ".join(outcomes)
