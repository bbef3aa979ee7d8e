"""Opens a page from disk in Chromium (Qt WebEngine, off screen, no network), uses it, and prints what it saw
as JSON:

    python tests/browser.py report.html [folder for screenshots]

A process of its own, so that a browser's crash is a failed test and no more. Exit code 3 and a line on
stderr where this machine has no browser that starts.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QT_QUICK_BACKEND": "software"}
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = (
    '--no-sandbox --disable-gpu --host-resolver-rules="MAP * ~NOTFOUND"'
)
try:
    from PySide6.QtCore import QEventLoop, QPoint, Qt, QTimer, QUrl
    from PySide6.QtTest import QTest
    from PySide6.QtWebEngineCore import (
        QWebEnginePage,
        QWebEngineProfile,
        QWebEngineSettings,
        QWebEngineUrlRequestInterceptor,
    )
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication, QWidget
except ImportError as error:
    print(f"no browser: {error}", file=sys.stderr)
    sys.exit(3)

ORDER = "Array.from(document.querySelector('table').tBodies[0].rows).map(row => row.cells[0].textContent)"
HEADS = "document.querySelector('table').tHead.rows[0].cells"


class Interceptor(QWebEngineUrlRequestInterceptor):
    """Blocks whatever is neither a file nor inside the page, and keeps a list of it."""

    def __init__(self):
        super().__init__()
        self.blocked = []

    def interceptRequest(self, info):
        if info.requestUrl().scheme() not in ("file", "data"):
            self.blocked.append(info.requestUrl().toString())
            info.block(True)


class Page(QWebEnginePage):
    def __init__(self, profile):
        super().__init__(profile)
        self.messages = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.messages.append(message)


class Browser:
    def __init__(self, app):
        self.app, self.interceptor, self.profile, self.view = (
            app,
            Interceptor(),
            QWebEngineProfile(),
            QWebEngineView(),
        )
        self.profile.setUrlRequestInterceptor(self.interceptor)
        self.page = Page(self.profile)
        self.view.setPage(self.page)
        self.view.resize(1280, 900)
        self.view.show()

    def wait(self, start, seconds: float = 20):
        """What the callback given to `start` is called with."""
        loop, answer = QEventLoop(), []
        QTimer.singleShot(int(seconds * 1000), loop.quit)
        start(lambda *values: (answer.extend(values), loop.quit()))
        if not answer:
            loop.exec()
        return answer[0] if answer else None

    def open(self, path: Path, javascript=True):
        settings, attribute = self.page.settings(), QWebEngineSettings.WebAttribute
        settings.setAttribute(attribute.JavascriptEnabled, javascript)
        settings.setAttribute(
            attribute.LocalContentCanAccessRemoteUrls, True
        )  # so that the interceptor sees what is asked for
        self.page.loadFinished.connect(opened := Once())
        self.page.load(QUrl.fromLocalFile(str(path.resolve())))
        return self.wait(opened.then)

    def run(self, script: str):
        return json.loads(
            self.wait(lambda done: self.page.runJavaScript(f"JSON.stringify({script})", done)) or "null"
        )

    def pause(self, seconds: float):
        self.wait(lambda done: None, seconds)

    @property
    def target(self) -> QWidget:
        """The widget that mouse and keyboard reach."""
        proxy = self.view.focusProxy()
        assert proxy is not None, "a page has been opened"
        return proxy

    def click(self, element: str):
        """A mouse click on the middle of an element."""
        self.run(f"{element}.scrollIntoView({{block: 'center', inline: 'center'}})")
        box = self.run(
            f"(box => [box.x + box.width / 2, box.y + box.height / 2])({element}.getBoundingClientRect())"
        )
        QTest.mouseClick(self.target, Qt.MouseButton.LeftButton, pos=QPoint(*map(int, box)))
        self.pause(0.2)

    def write(self, text: str):
        QTest.keyClicks(self.target, text)
        self.pause(0.2)

    def press(self, key):
        QTest.keyClick(self.target, key)
        self.pause(0.2)

    def resize(self, width: int, height: int):
        self.view.resize(width, height)
        self.pause(0.4)

    def picture(self, name: str):
        if len(sys.argv) > 2:
            self.pause(0.3)
            self.view.grab().save(str(Path(sys.argv[2]) / name))


class Once:
    """A slot that hands on its first value, whenever that comes."""

    def __init__(self):
        self.values, self.done = [], None

    def __call__(self, *values):
        self.values = values
        if self.done:
            self.done(*values)

    def then(self, done):
        self.done = done
        if self.values:
            done(*self.values)


SHOWN = (
    "Array.from(document.querySelector('table').tBodies[0].rows).filter(row => !row.hidden).map(row =>"
    " row.cells[0].textContent)"
)


def sort(browser: Browser) -> dict:
    """Sort the first table by mouse and by keyboard."""
    column = f"Array.from({HEADS}).findIndex(head => head.textContent === 'unlearning')"
    seen: dict = {"order": [browser.run(ORDER)], "aria_sort": []}
    for _ in range(2):
        browser.click(f"{HEADS}[{column}].querySelector('button')")
        seen["order"].append(browser.run(ORDER))
        seen["aria_sort"].append(
            browser.run(f"Array.from({HEADS}).map(head => head.getAttribute('aria-sort'))")
        )
    browser.picture("sorted.png")
    browser.press(Qt.Key.Key_Tab)  # from the head that was clicked to the next one
    browser.press(Qt.Key.Key_Return)
    browser.press(Qt.Key.Key_Space)
    seen["by_keyboard"] = {
        "head": browser.run("document.activeElement.textContent"),
        "order": browser.run(ORDER),
        "sort": browser.run("document.activeElement.parentElement.getAttribute('aria-sort')"),
    }
    return seen


def search(browser: Browser) -> dict:
    """Search the first table, then choose by its first filter."""
    browser.click("document.querySelector('.tools input')")
    browser.write("Adaptive unlocking")
    seen = {"searched": browser.run(SHOWN), "count": browser.run("document.querySelector('output').value")}
    browser.picture("searched.png")
    browser.run("document.querySelector('.tools input').value = ''")
    browser.run(
        "(choice => { choice.value = 'adaptive'; choice.dispatchEvent(new Event('input', {bubbles: true})) })"
        "(document.querySelector('.tools select'))"
    )
    seen["filtered"] = browser.run(SHOWN)
    return seen


def open_parts(browser: Browser) -> dict:
    """Open a figure, close it, follow the contents, and the link of a run to its part."""
    state = "[document.querySelector('dialog').open, document.querySelector('dialog img')?.width]"
    width = browser.run("document.querySelector('figure img').width")
    browser.click("document.querySelector('figure button')")
    opened, wide = browser.run(state)
    browser.picture("figure.png")
    browser.click("document.querySelector('dialog')")
    seen: dict = {"figure": [opened, wide > width, browser.run(state)[0]]}
    browser.click("document.querySelector('nav a[href=\"#explained_variance\"]')")
    seen["contents"] = browser.run(
        "document.getElementById('explained_variance').getBoundingClientRect().top"
    )
    closed = browser.run("document.querySelector('details').open")
    browser.click("document.querySelector('table a[href=\"#run-0\"]')")
    seen["run"] = [closed, browser.run("document.querySelector('details').open")]
    browser.picture("run.png")
    return seen


def texts(selector: str) -> str:
    """A script for the text of every element that a selector finds."""
    return f"Array.from(document.querySelectorAll('{selector}')).map(one => one.textContent)"


FEATURES = "#features tbody tr:not(.more) th"
ANSWERS = "#questions tbody tr"


def look_inside(browser: Browser) -> dict:
    """Sort, open, follow and search features; filter and search questions; choose another run."""

    def write(element: str, keys: str):
        browser.click(f"document.getElementById('{element}')")
        browser.write(keys)

    def choose_next(element: str):
        browser.run(f"document.getElementById('{element}').focus()")
        browser.press(Qt.Key.Key_Down)

    seen: dict = {"features": [browser.run(texts(FEATURES))]}
    for _ in range(2):
        browser.click("document.querySelectorAll('#features thead button')[2]")
        seen["features"].append(browser.run(texts(FEATURES)))
    browser.click("document.querySelector('#features [data-feature]')")
    seen["opened"] = browser.run(texts("#features .more .context"))
    tokens = "Array.from(document.querySelectorAll('#features .more .context [title]'))"
    seen["shades"] = browser.run(f"{tokens}.map(token => token.style.background)")
    browser.click("document.querySelector('#features .more button.link')")
    seen["neighbour"] = browser.run(texts("#features .more .context"))
    browser.picture("features.png")
    write("feature-search", "bold")
    seen["found"] = browser.run(texts(FEATURES))
    seen["answers"] = [browser.run(texts(ANSWERS))]
    choose_next("question-kind")
    seen["answers"].append(browser.run(texts(ANSWERS)))
    choose_next("question-format")
    seen["answers"].append(browser.run(texts(ANSWERS)))
    choose_next("question-subject")
    seen["answers"].append(browser.run(texts(ANSWERS)))
    write("question-search", "nothing of the kind")
    seen["answers"].append(browser.run(texts(ANSWERS)))
    seen["prompts"] = browser.run(texts("#prompts tbody td, #prompts tbody th"))
    choose_next("inside-run")
    browser.pause(0.5)
    seen["other_run"] = browser.run(texts(FEATURES))
    browser.picture("inside.png")
    return seen


def use(browser: Browser, path: Path) -> dict:
    """Look at the page, sort, search and open, make the window a phone's, print, and turn scripts off."""
    seen = {
        "opened": browser.open(path),
        "title": browser.page.title(),
        "messages": browser.page.messages,
        "blocked": browser.interceptor.blocked,
    }
    browser.pause(0.3)
    seen["agent"] = browser.run("navigator.userAgent")
    seen["images"] = browser.run(
        "Array.from(document.images).map(i => [i.alt, i.complete && i.naturalWidth > 0])"
    )
    browser.picture("wide.png")
    if browser.run("Boolean(document.querySelector('figure button'))"):
        seen |= sort(browser) | open_parts(browser) | search(browser)
        browser.open(path)
    has_inside = browser.run("Boolean(document.getElementById('inside-run'))")
    if has_inside:
        seen["inside"] = look_inside(browser)
    browser.resize(390, 844)
    if has_inside:
        browser.click("document.querySelector('#features [data-feature]')")
        frames = "Array.from(document.querySelectorAll('#inside .frame'))"
        seen["beyond_phone"] = browser.run(f"{frames}.map(frame => frame.scrollWidth - frame.clientWidth)")
    seen["phone_widths"] = browser.run("[document.documentElement.scrollWidth, window.innerWidth]")
    browser.picture("phone.png")
    pdf = bytes(browser.wait(lambda done: browser.page.printToPdf(done), 60) or b"")
    seen["pdf_bytes"] = len(pdf) if pdf.startswith(b"%PDF") else 0
    if len(sys.argv) > 2:
        (Path(sys.argv[2]) / "print.pdf").write_bytes(pdf)
    browser.resize(1280, 900)
    browser.open(path, javascript=False)
    seen["text_without_scripts"] = browser.wait(browser.page.toPlainText)
    browser.picture("without_scripts.png")
    return seen


if __name__ == "__main__":
    print(json.dumps(use(Browser(QApplication([])), Path(sys.argv[1]))), flush=True)
    os._exit(0)  # Qt's own order of destruction may complain
