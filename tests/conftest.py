import numpy as np
import pytest

from tests.chromium import CHROMIUM
from tests.ranks import DDP, RESILIENT, SINGLE, data_gen, save_data, train


@pytest.fixture(scope="session")
def script():
    """The script that has all there is to survive: a test that says no more means this one."""
    return RESILIENT


@pytest.fixture(scope="session")
def ddp():
    """The script that shows DDP and no more."""
    return DDP


@pytest.fixture(scope="session")
def single():
    """The script of one process."""
    return SINGLE


@pytest.fixture(scope="session")
def gaussian(tmp_path_factory):
    """Gaussian data of the default sizes. Do not change the files."""
    folder = tmp_path_factory.mktemp("gaussian")
    assert data_gen("gaussian", "--out", folder) == 0
    return folder


@pytest.fixture(scope="session")
def gaussian_run(script, gaussian, tmp_path_factory):
    """One process with the default flags on the Gaussian data."""
    return train(0, script, gaussian, tmp_path_factory.mktemp("gaussian_run"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The handwritten digits. Do not change the files."""
    folder = tmp_path_factory.mktemp("digits")
    assert data_gen("digits", "--out", folder) == 0
    return folder


@pytest.fixture
def small(tmp_path):
    """A few samples in a folder of the test's own."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 3)).astype(np.float32), np.arange(60) % 3
    return save_data(tmp_path / "small", X_train=X[:40], y_train=y[:40], X_val=X[40:], y_val=y[40:])


@pytest.fixture(scope="module")  # not "session": Playwright's event loop would still run under nbmake's
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: install the package chromium")
    with playwright.sync_playwright() as p:
        # Playwright itself turns off the sandbox (which root cannot have) and most background traffic.
        quiet = ["--disable-domain-reliability", "--disable-sync", "--no-pings"]
        browser = p.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield browser
        browser.close()
