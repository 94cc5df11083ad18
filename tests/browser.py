"""A headless Chromium for the tests that look at a page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
INSTALLED = bool(CHROMIUM and CHROMEDRIVER)
MISSING = "chromium and chromedriver are not both installed: the page is not looked at"

_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@dataclass
class Browser:
    """One headless Chromium; `show` a page, then ask what happened."""

    driver: webdriver.Chrome

    def show(self, page: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a local page at a viewport width in CSS pixels, and wait until every chart is drawn."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(page.resolve().as_uri())
        drawn = "return document.querySelectorAll('.chart:not(.js-plotly-plot)').length === 0"
        WebDriverWait(self.driver, 60).until(lambda driver: driver.execute_script(drawn))

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.driver.execute_script(f"return {script}")

    def errors(self) -> list[str]:
        """Severe console messages since the page was shown."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """Every address asked for since the page was shown; data:, blob: and the browser's own left out."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = (m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent")
        return [url for url in urls if not url.startswith(("data:", "blob:", "chrome:"))]

    def picture(self, path: Path) -> None:
        """Save the whole page as a PNG."""
        height = self.ask("document.documentElement.scrollHeight")
        width = self.ask("window.innerWidth")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.save_screenshot(str(path))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in an empty folder; it ends with the block."""
    options = Options()
    options.binary_location = CHROMIUM or ""
    for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=CHROMEDRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
