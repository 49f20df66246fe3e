"""The whole cascade in a minute: the tiny page made smaller still, trained once for all tests here; and a browser."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from safetensors.torch import save_file

from experiments import build
from experiments.config import Config, load
from experiments.demo import train_all

MICRO = """
extends: tiny
runs: {runs}
clip:
  model:
    {{embedding_width: 16, image_size: 16, patch_size: 8, vision_width: 32, vision_layers: 1, text_width: 32,
      text_layers: 1, head_width: 16}}
  trainer: &t
    {{max_steps: 4, batch_size: 2, workers: 0, log_every: 1, sample_every: 100, checkpoint_every: 2, validate_every: 2,
      preview: 1, validate: 2, precision: 32-true}}
prior: {{model: {{width: 32, depth: 1, head_width: 16}}, trainer: *t}}
decoder:
  size: 16
  unet: {{width: 16, multiples: [1, 2], attention: [2], head_width: 16, dropout: 0.1, learned_variance: true}}
  trainer: *t
sr_low: {{size: 32, crop: 16, unet: {{width: 16, multiples: [1, 2]}}, trainer: *t}}
sr_high: {{size: 64, crop: 16, unet: {{width: 16, multiples: [1, 2]}}, trainer: *t}}
decoder_video: {{frames: 9, trainer: *t}}
sr_low_video: {{frames: 4, trainer: *t}}
sr_high_video: {{frames: 2, trainer: *t}}
interpolation: {{frames: 9, trainer: *t}}
cascade:
  prior: {{steps: 2}}
  decoder: {{steps: 2}}
  interpolation: {{steps: 2}}
  sr_low: {{steps: 2}}
  sr_high: {{steps: 2}}
evaluate: {{samples: 3, batch_size: 2}}
"""


def micro(folder: Path) -> Config:
    """The micro page with its run folders in `folder`."""
    page = folder / "micro.yaml"
    page.write_text(MICRO.format(runs=folder / "runs"))
    return load(str(page))


def become_rank(number: int, world: int, port: int) -> None:
    """Make this process one of those that torchrun starts."""
    torchrun = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, GROUP_RANK=0)
    os.environ.update({k: str(v) for k, v in torchrun.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    rank_zero_only.rank = number  # read when Lightning is imported, which a fork server has done already


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A micro cascade with all its stages trained."""
    config = micro(tmp_path_factory.mktemp("cascade"))
    train_all(config)
    return config


@pytest.fixture
def fresh(tmp_path: Path) -> Config:
    """A micro cascade of which nothing is trained."""
    return micro(tmp_path)


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro page whose stages have weights, though nobody trained them: for what films are, not what they show."""
    folder = tmp_path_factory.mktemp("untrained")
    config = micro(folder)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    for stage in build.wanted(config):
        weights = build.network(config, stage).state_dict()
        for key, value in weights.items():
            if "conv_out" in key and value.ndim == 4:  # begins at zero
                weights[key] = torch.randn_like(value) * 0.05
        path = build.run_folder(config, stage)
        path.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in weights.items()}, path / "weights.safetensors")
    torch.set_rng_state(state)
    return folder / "micro.yaml"


class Browser:
    """A headless Chromium that does what a person does, by its DevTools protocol over two pipes (descriptors 3, 4)."""

    def __init__(self, program: str, home: Path):
        self.files = home / "downloads"
        (read, self.out), (self.into, write) = os.pipe(), os.pipe()
        # a shell moves the pipes to 3 and 4, which the parent may use itself
        command = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "-", program, "--headless=new", "--no-sandbox",
                   "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", "--window-size=1280,900",
                   f"--user-data-dir={home / 'profile'}", "about:blank"]  # fmt: skip
        self.process = subprocess.Popen(
            command, pass_fds=(read, write), stderr=subprocess.DEVNULL, env={**os.environ, "HOME": str(home)}
        )
        os.close(read)
        os.close(write)
        self.sent, self.read, self.session, self.events = 0, b"", "", []
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.files))
        page = self.call("Target.getTargets")["targetInfos"][0]["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """One command of the protocol; what happens meanwhile is kept in `events`."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        os.write(
            self.out, json.dumps({**message, **({"sessionId": self.session} if self.session else {})}).encode() + b"\0"
        )
        while True:
            while b"\0" not in self.read:
                self.read += os.read(self.into, 1 << 20)
            text, _, self.read = self.read.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.sent:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait("document.readyState == 'complete'")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; an error in it is one here."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 90) -> Any:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not (found := self.js(expression)):
            assert time.monotonic() < end, (
                f"{expression} is not true after {seconds} s: {self.js('document.body.innerText')}"
            )
            time.sleep(0.03)
        return found

    def click(self, selector: str) -> None:
        """Press the mouse on what a selector finds first, once it can be pressed."""
        self.wait(f"document.querySelector({selector!r})?.disabled !== true && !!document.querySelector({selector!r})")
        self.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        x, y = self.js(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
                       f"(document.querySelector({selector!r}).getBoundingClientRect())")  # fmt: skip
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file in a field."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        assert node, f"there is no {selector}"
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def shot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
        return path

    def asked(self) -> list[str]:
        """Addresses that pages have asked for."""
        self.js("1")
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.out)
        os.close(self.into)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A fresh Chromium; where there is none the test is skipped, with a word."""
    program = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    found = Browser(program, tmp_path)
    yield found
    found.close()
