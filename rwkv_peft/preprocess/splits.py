"""Names of splits: which rows of a data set are meant for training, and which are held out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# the names that data sets give to their splits; those of one kind mean the same
KINDS = {
    "train": ("train", "training", "trainset"),
    "valid": ("valid", "validation", "val", "dev", "eval", "evaluation", "validset", "devset"),
    "test": ("test", "testing", "testset"),
}
OF_NAME = {name: kind for kind, names in KINDS.items() for name in names}
HELD_OUT = "held"  # the use of rows or lists that are held out
WORDS = re.compile(r"[a-z]+")
CHINESE = {"训练": "train", "訓練": "train", "验证": "valid", "驗證": "valid", "测试": "test", "測試": "test"}
IN_CHINESE = re.compile(rf"({'|'.join(CHINESE)})(?:集|\Z)")


def split_of(name: str) -> str:
    """train, valid or test by the words of a name (train_sft, test-00000-of-00002, my.dev), or "" if it has none of these."""
    words = WORDS.findall(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    splits = [OF_NAME[word] for word in words if word in OF_NAME]
    if not splits and (chinese := IN_CHINESE.search(name)):
        return CHINESE[chinese[1]]
    return splits[0] if splits else ""


def is_wanted(name: str, wanted: str) -> bool:
    """Whether the split called `name` is the one that VALID_SPLIT names: by its own name, or by the kind of it."""
    if not wanted:
        return False
    return name.lower() == wanted.lower() or (wanted.lower() in OF_NAME and split_of(name) == OF_NAME[wanted.lower()])


def split_of_file(path: Path, root: Path) -> str:
    """The split that a file of a folder belongs to: by its own name, else by the folders between."""
    for part in reversed(path.relative_to(root).parts):
        # only the first word without its number counts inside a name: "train-00000-of-00001", "my_test.jsonl"
        if by_word := split_of(part.partition(".")[0]):
            return by_word
    return ""


def chosen(files: Sequence[Path], root: Path, wanted: str) -> tuple[list[Path], list[Path], list[Path], list[Path]]:
    """Return files to train on, files to hold out, files of other splits, and those without a split's name.

    The last are among the first. A folder with nothing but files for testing is read as training data.
    """
    kinds = {path: split_of_file(path, root) for path in files}
    held_out = [p for p in files if wanted and kinds[p] != "train" and is_wanted_file(p, root, wanted, kinds[p])]
    rest = [p for p in files if p not in set(held_out)]
    train = [p for p in rest if kinds[p] in ("train", "")]
    if not train and not held_out:
        return list(files), [], [], list(files)
    if not train:  # nothing but two splits, one of which is wanted
        return rest, held_out, [], []
    others = [p for p in rest if kinds[p] not in ("train", "")]
    unnamed = [p for p in train if not kinds[p]] if "train" in kinds.values() and (held_out or others) else []
    return train, held_out, others, unnamed


def is_wanted_file(path: Path, root: Path, wanted: str, kind: str) -> bool:
    """Whether VALID_SPLIT names the split of this file, or its name without endings, or a folder that it is in."""
    parts = path.relative_to(root).parts
    return (wanted.lower() in OF_NAME and kind == OF_NAME[wanted.lower()]) or wanted.lower() in [
        part.lower().partition(".")[0] for part in parts
    ]
