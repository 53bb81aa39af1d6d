"""What the tests in a browser share: Chromium, what a page says in its console, and whether an image shows anything."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# A function of JavaScript, of an <img>: whether it cannot be loaded, has no width, or is of one colour.
IS_BLANK = """async image => {
    const canvas = new OffscreenCanvas(100, 100).getContext('2d');
    try {
        await image.decode();
        canvas.drawImage(image, 0, 0, 100, 100);
    } catch {
        return true;
    }
    const pixels = new Uint32Array(canvas.getImageData(0, 0, 100, 100).data.buffer);
    return !image.getBoundingClientRect().width || pixels.every(p => p === pixels[0]);
}"""


@contextmanager
def console_errors(page) -> Iterator[list[str]]:
    """What the page has said in the browser's console, as errors, or thrown."""
    said = []

    def note(message) -> None:
        if message.type == "error":
            said.append(message.text)

    def note_thrown(error) -> None:
        said.append(str(error))

    page.on("console", note)
    page.on("pageerror", note_thrown)
    yield said
    page.remove_listener("console", note)
    page.remove_listener("pageerror", note_thrown)
