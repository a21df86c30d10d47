"""What all tests share; while they run, shapes and types of the tensor code are checked.

What users hand over unchecked (requests, pictures) is not in it: there the code itself must refuse.
"""

from pathlib import Path

from jaxtyping import install_import_hook

install_import_hook(
    [f"hidream.{name}" for name in ("nn", "models", "sampling", "pipelines", "data", "eval")],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

import pytest  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def unchecked():
    """For tests of what the code itself says to a value of the wrong type."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch works on one thread: what is summed by several is not always bit-identical."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of fixtures beside the repository; tests of it are skipped where it is not."""
    if not (SHARED / "parity").is_dir():
        pytest.skip(f"the parity fixtures are not on this machine ({SHARED})")
    return SHARED


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole O1 folder with random weights: read it, do not change it."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("tiny") / "o1-tiny"
    tiny.write_folder(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_i1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole I1 folder with random weights, Llama in it: read it, do not change it."""
    from tests.tiny_i1 import make_tiny_i1

    return make_tiny_i1(tmp_path_factory.mktemp("tiny") / "i1-tiny", llama_inside=True)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory):
    """No test writes into the home of who runs it (subprocesses aside)."""
    from hidream.cli import recording

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_model():
    """The model of `tiny_folder`; its weights need no gradient and must stay as they are."""
    from tests import tiny

    return tiny.random_o1()


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path):
    from hidream.models.o1.tokens import Tokenizer

    return Tokenizer(tiny_folder)
