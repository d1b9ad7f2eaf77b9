"""A real browser for pages: `visit(path)` opens an HTML file, and finally checks that it is self-contained."""

import os
import shutil

import pytest

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser():
    """Chromium from PATH; the tests that ask for it are skipped where there is none, unless PEMA_BROWSER=required.

    It lives as long as a module's tests, not the session: while Playwright's synchronous API is open, asyncio believes
    that a loop runs in this thread, and tests of other rooms start loops of their own.
    """
    executable = shutil.which("chromium")
    if executable is None:
        reason = "no chromium on PATH: install it (Debian: apt-get install chromium)"
        if os.environ.get("PEMA_BROWSER") == "required":
            pytest.fail(f"PEMA_BROWSER=required, but {reason}")
        pytest.skip(reason)
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield chromium
        chromium.close()


DRAWN = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
"""True after two frames: charts are drawn when the browser reports their width, which is within the first one."""


@pytest.fixture
def visit(browser):
    """Open an HTML file; when the test ends, the page must have asked for nothing else and logged no error."""
    contexts, wrong = [], []

    def visit(path, *, width=1280, height=900, **options):
        address = path.resolve().as_uri()
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(20000)  # milliseconds; a busy machine is slow, not wrong
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: note(request.url) if request.url.split("#")[0] != address else None)
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        if options.get("java_script_enabled", True):  # a page without scripts is never called back
            page.wait_for_function(DRAWN)  # unlike evaluate, it has a time limit
        return page

    def note(url):
        if not url.startswith("data:"):
            wrong.append(f"asks for {url}")

    yield visit
    for context in contexts:
        context.close()
    assert not wrong
