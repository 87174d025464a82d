"""What every test shares: one thread, a fixed seed, and a copy of the project in a folder with a space in its name."""

from __future__ import annotations

import os
import shutil
import signal

# before torch is imported: libgomp's spinning makes small operations far slower when processes share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

pytest.register_assert_rewrite("helpers")  # before they are imported

from helpers import tiny  # noqa: E402
from helpers.kit import EVERYTHING, Kit  # noqa: E402

torch.set_num_threads(1)
# a run heeds no signal that whoever started it ignores; started from a script's background, we would be such a starter
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
# the same examples every time: a run that fails can be run again, and one that was green stays so
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


# files of minutes, longest first: what begins last would be waited for by idle workers
LONG = (
    "test_quickstart", "test_strategy", "test_resume", "test_end_to_end", "test_rendezvous", "test_cpu", "test_matrix",
    "test_processes", "test_fuzz", "test_bench", "test_fla", "test_diagnose", "test_training", "test_saves", "test_names",
)  # fmt: skip


def smoke_cases(cases: list[dict[str, str]], count: int | None) -> set[int]:
    """Return which cases the default suite runs.

    Args:
        cases: For each case, the value of each parameter, as text.
        count: How many, evenly from first to last. None: so many that every value of every parameter occurs.
    """
    if count is not None:
        return {i * len(cases) // count for i in range(min(count, len(cases)))}
    missing, chosen = {pair for case in cases for pair in case.items()}, set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(missing & cases[i].items()))
        chosen.add(best)
        missing -= cases[best].items()
    return chosen


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(config, items) -> None:
    groups: dict[tuple, list] = {}
    for item in items:
        if item.get_closest_marker("smoke") and not item.get_closest_marker("slow"):
            groups.setdefault((item.path, item.originalname), []).append(item)
    for cases in groups.values():
        marker = cases[0].get_closest_marker("smoke")
        chosen = smoke_cases(
            [{name: repr(value) for name, value in case.callspec.params.items()} for case in cases],
            *(marker.args or (None,)),
        )
        for number, case in enumerate(cases):
            if number not in chosen:
                case.add_marker(pytest.mark.slow)
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(0 if EVERYTHING else 600))


@pytest.fixture(autouse=True)
def clean_torch():
    """Begin with a fixed seed; leave no default dtype, thread count, seed or process group to the next test."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Save a blank picture in place of a drawn one: drawing loss.png is two thirds of what a tiny run takes.

    Tests marked `pictures`, and processes of their own, draw.
    """
    if not request.node.get_closest_marker("pictures"):
        from matplotlib.figure import Figure  # (here, where it is used: some tests are about what is imported)

        monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"\x89PNG\r\n\x1a\n"))


@pytest.fixture
def project_folder(tmp_path, monkeypatch):
    """The kit's folders, empty, for code that runs in this process."""
    from rwkv_peft.common import paths

    root = tmp_path / "a project"
    for folder in ("data", "model", "output", "merge"):
        (root / folder).mkdir(parents=True)
    monkeypatch.setattr(paths, "ROOT", root)
    monkeypatch.setattr(paths, "OUTPUT", root / "output")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return root


@pytest.fixture
def kit(tmp_path) -> Kit:
    return Kit(tmp_path / "my kit")


@pytest.fixture(scope="session")
def shared_kit(tmp_path_factory) -> Kit:
    """One copy for tests that leave it as they found it: a tiny base, tokenized data."""
    kit = Kit(tmp_path_factory.mktemp("shared") / "my kit")
    tiny.save_model(kit.root / "model" / "tiny.pth")
    kit.data("chat.jsonl", *tiny.CHATS)
    kit.run("make_tokenize.sh", "chat.jsonl")
    kit.set(MODEL_PATH="tiny.pth", DATA_PATH="chat", PRECISION="fp32", EPOCH_COUNT="1")
    return kit


@pytest.fixture(scope="session")
def prepared_project(tmp_path_factory):
    """Make the files that `ready` copies, once for all tests of a worker."""
    from helpers.training import tokenize

    from rwkv_peft.common import paths

    root = tmp_path_factory.mktemp("prepared")
    for folder in ("data", "model"):
        (root / folder).mkdir()
    tiny.save_model(root / "model" / "tiny.pth")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(paths, "ROOT", root)
        tokenize(tiny.write_jsonl(root / "data" / "chat.jsonl", tiny.CHATS))
    return root


@pytest.fixture
def ready(project_folder, prepared_project):
    """A tiny base and tokenized data in a project of its own."""
    return shutil.copytree(prepared_project, project_folder, dirs_exist_ok=True)


def pytest_make_parametrize_id(config, val, argname):
    """Bytes are named by their place: packed ones hold the time, which differs between processes that collect the same tests."""
    return argname if isinstance(val, bytes) else None
