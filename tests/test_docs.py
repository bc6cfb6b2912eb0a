"""README and pages are true: their commands run in order, their links lead somewhere, their errors exist.

A page is any ``onnx_mdp/docs/*.md``. Its commands are the lines of ``sh`` and ``console`` blocks, and
indented lines that begin with ``onnx-mdp``. They run in an empty folder, where the files of `MAKERS` and
`SOURCES` appear when a command names them. A comment such as ``# exit code 4`` states another code than 0. A
block in another language whose first line is a comment that names a file (``# onnx-mdp.yaml``) is that file.
"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import typer
from command_line import Outcome, call, patiently
from PIL import Image
from zoo import text_model

from onnx_mdp.cli.app import app
from onnx_mdp.model_io import content_hash, load_model
from onnx_mdp.rules import RULES, SINCE
from onnx_mdp.shapes_data import CLASSES, shapes
from onnx_mdp.torch_backend import has_torch

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "onnx_mdp" / "docs"
DEMO = ROOT / "onnx_mdp" / "demo_model" / "shapes_resnet.onnx"
README = "README.md"
PAGES = {path.name: path for path in (ROOT / README, *sorted(DOCS.glob("*.md")))}
EXAMPLES = sorted(path.name for path in (DOCS / "examples").glob("*.py"))
PYTHON_IN_SECONDS = {"new-rule.md"}
MOST_LINES = {README: 200, "results-equal-latency.md": 180}


# Commands whose options are checked, and which are not run here, each with the reason.
NOT_RUN = {
    r"pip install|python3 -m venv|\. \.venv|pytest": "makes an environment and runs all tests: .ci/run does",
    r"docker": "needs Docker, which tests do without: tests/test_model_gate.py reads the files",
    r"polygraphy": "needs TensorRT: tests/test_serving_tools.py runs it on the CPU",
    r"onnx-mdp export mlflow": "needs MLflow: tests/test_serving_tools.py has it",
    r"onnx-mdp demo$": "takes its time: tests/test_cli.py runs it",
    r"ray start|onnx-mdp fleet": "needs a cluster: tests/test_fleet.py has one",
    r"onnx-mdp export olive|olive run": "needs Olive: tests/test_olive.py runs it where it is",
    r"torchrun": "starts processes of its own: tests/test_finetuning.py does",
    r".* --ep (?!cpu\b)": "needs a provider that the CPU flavour of ONNX Runtime has not",
}
PLACEHOLDER = "…"
SHELLS = {"console": "sh", "": "text"}


@dataclass(frozen=True)
class Step:
    """What a page tells its reader: a line of commands (``sh``), a script (``python``), or a file."""

    line: int
    language: str
    text: str


def blocks(page: str) -> Iterator[Step]:
    """What is fenced, and what is indented and begins with a command."""
    text = PAGES[page].read_text(encoding="utf-8")
    pattern = r"^```(?P<language>\w*)\n(?P<fenced>.*?)^```|^(?P<indented>(?: {4}[^\n]*\n)+)"
    for found in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        kind = "indented" if found["indented"] else "fenced"
        line = text.count("\n", 0, found.start(kind)) + 1
        if kind == "fenced":
            yield Step(line, SHELLS.get(found["language"], found["language"]), found["fenced"])
        elif found["indented"].startswith("    onnx-mdp "):
            yield Step(line, "sh", found["indented"])


def steps(page: str) -> Iterator[Step]:
    """The steps of a page in order; a command that goes on behind a backslash is one."""
    for block in blocks(page):
        if block.language != "sh":
            yield block
            continue
        for found in re.finditer(r"(?:[^\n]*\\\n)*[^\n]+", block.text):
            command = re.sub(r"\s*\\\n\s*", " ", found[0]).strip()
            if not command.startswith("#"):
                yield Step(block.line + block.text.count("\n", 0, found.start()), "sh", command)


def commands(page: str) -> list[Step]:
    return [step for step in steps(page) if step.language == "sh"]


def parts(command: str) -> list[list[str]]:
    """The words of each command of a line ``a && b``, without comment."""
    words, found = shlex.split(command, comments=True), [list[str]()]
    for word in words:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return found


def why_not_run(words: list[str]) -> str | None:
    text = " ".join(words)
    if "finetune" in text and not has_torch():
        return "needs torch"
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, text)), None)


def pages_with(language: str, quick: set[str]) -> list[Any]:
    """The pages that have such steps, all but ``quick`` ones among the slow tests."""
    found = [page for page in PAGES if any(step.language == language for step in steps(page))]
    return [pytest.param(page, marks=() if page in quick else pytest.mark.slow) for page in found]


# Files ---------------------------------------------------------------------------------------------------


def make_images(folder: Path) -> None:
    """Twenty pictures in a folder for each class."""
    pictures, labels = shapes(20, seed=0)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        file = folder / CLASSES[label].replace(" ", "_") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        levels = np.rint((picture.transpose(1, 2, 0) * 0.25 + 0.5) * 255).clip(0, 255)
        Image.fromarray(levels.astype(np.uint8)).save(file)


# It carries 64 features of each position from frame to frame.
TRACKER = """
(float[1,3,64,64] image, float[1,64,64,64] memory) => (float[1,4,64,64] boxes, float[1,64,64,64] memory_out)
<float[64,3,3,3] a, float[64,64,3,3] r, float[4,64,1,1] c> {
    t = Conv<pads=[1,1,1,1]>(image, a)
    g = Conv<pads=[1,1,1,1]>(memory, r)
    s = Add(t, g)
    memory_out = Tanh(s)
    boxes = Conv(memory_out, c)
}"""


def make_tracker(file: Path) -> None:
    onnx.save(text_model(TRACKER), file)


def make_archive(file: Path) -> None:
    images, labels = shapes(200, seed=1)
    np.savez(file, image=images, labels=labels)


def make_calibration(file: Path) -> None:
    np.savez(file, image=shapes(64, seed=2)[0])


def make_model(file: Path) -> None:
    shutil.copy(DEMO, file)


MAKERS: Mapping[str, Callable[[Path], None]] = {
    "images": make_images,
    "train.npz": make_archive,
    "calibration.npz": make_calibration,
    "tracker.onnx": make_tracker,
    "model.onnx": make_model,
    "a.onnx": make_model,
    "b.onnx": make_model,
}
# What other files come from, by commands over those above.
PRUNE = "onnx-mdp prune model.onnx --target-ratio 0.7 --data calibration.npz -o slim.onnx --overwrite"
SOURCES = {
    "slim.onnx": PRUNE,
    "slim.plan.json": PRUNE,
    "table.json": "onnx-mdp profile model.onnx -o table.json",
}


class Reader:
    """Somebody who follows a page in a folder of their own; the store of latencies is that of the shelf."""

    def __init__(
        self,
        folder: Path,
        shelf: Path,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Nothing is in the folder yet."""
        self.folder, self.shelf = folder, shelf
        self.capfd, self.monkeypatch = capfd, monkeypatch
        self.written = set[str]()
        monkeypatch.setenv("ONNX_MDP_STORE", str(shelf / "latency.sqlite"))
        monkeypatch.setenv("COLUMNS", "110")

    def run(self, words: list[str], folder: Path) -> Outcome:
        """What one command did; behind ``>`` stands the file that its output goes to."""
        if ">" in words:
            done = self.run(words[: words.index(">")], folder)
            (folder / words[-1]).write_text(done.out, encoding="utf-8")
            return done
        self.monkeypatch.chdir(folder)
        if words[0] == "onnx-mdp" and not re.search("repair|finetune", " ".join(words)):
            return call(self.capfd, self.monkeypatch, *words[1:])
        starts = {"python": [], "onnx-mdp": ["-m", "onnx_mdp"]}
        assert words[0] in starts, f"`{' '.join(words)}` is neither onnx-mdp nor python: add it to NOT_RUN"
        python = [sys.executable, *starts[words[0]], *words[1:]]
        # Linear algebra waits busily for its second thread: beside other work, that takes six times as long.
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            self.monkeypatch.setenv(variable, "1")
        ran = subprocess.run(python, capture_output=True, text=True, timeout=600, check=False)
        return Outcome(ran.returncode, ran.stdout, ran.stderr)

    def writes(self, outputs: list[str]) -> None:
        """A command or script makes these files, and what lies beside them."""
        self.written.update(outputs)
        self.written.update(str(Path(output).with_suffix(".plan.json")) for output in outputs)

    def supply(self, text: str) -> None:
        """Put what a command or script names, and neither it nor an earlier one writes, into the folder."""
        self.writes(re.findall(r'save\w*\(.*"([^"]+)"\)', text))
        for name in (*MAKERS, *SOURCES):
            if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", text) and name not in self.written:
                self.fetch(name)

    def fetch(self, name: str) -> None:
        held, target = self.shelf / name, self.folder / name
        if not held.exists():
            if name in MAKERS:
                MAKERS[name](held)
            else:
                for needed in ("model.onnx", "calibration.npz"):
                    if not (self.shelf / needed).exists():
                        MAKERS[needed](self.shelf / needed)
                done = self.run(shlex.split(SOURCES[name]), self.shelf)
                assert done.code == 0, f"{SOURCES[name]}\n{done.err}"
        if not target.exists():
            (shutil.copytree if held.is_dir() else shutil.copy)(held, target)

    def follow(self, step: Step, page: str) -> None:
        """Do what one step says, and say which one it was if it cannot be done."""
        stated = re.search(r"#.*exit code (\d+)", step.text)
        folder = self.folder
        for words in parts(step.text):
            if words[0] == "cd":
                folder /= words[1]
            elif why_not_run(words) is None:
                outputs = [value for option, value in itertools.pairwise(words) if option == "-o"]
                for old in (old for output in outputs for old in folder.glob(f"{Path(output).stem}.*")):
                    if old.name not in words:  # it is of an alternative that the page showed before
                        old.unlink()
                self.writes(outputs)
                self.supply(" ".join(words))
                wanted = int(stated[1]) if stated else 0
                done = patiently(partial(self.run, words, folder))
                where = f"{page}:{step.line}: `{' '.join(words)}`"
                assert done.code == wanted, (
                    f"{where} ended with {done.code}, not {wanted}:\n{done.out}{done.err}"
                )


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def reader(
    tmp_path: Path, shelf: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Reader:
    return Reader(tmp_path, shelf, capfd, monkeypatch)


# Commands and scripts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("sh", {README}))
def test_the_commands_of_a_page_run(page: str, reader: Reader) -> None:
    for step in steps(page):
        name = re.match(r"# ([\w./-]+\.\w+)\s*$", step.text.partition("\n")[0])
        if name:
            (reader.folder / name[1]).write_text(step.text, encoding="utf-8")
        elif step.language == "sh":
            reader.follow(step, page)


def test_what_is_not_run_is_on_a_page_and_where_it_is_tested_exists() -> None:
    texts = [" ".join(words) for page in PAGES for step in commands(page) for words in parts(step.text)]
    for pattern, why in NOT_RUN.items():
        assert any(re.match(pattern, text) for text in texts), pattern
        assert all((ROOT / name).is_file() for name in re.findall(r"tests/[\w.]+", why)), why


def test_a_command_that_fails_is_named_with_its_page(reader: Reader) -> None:
    wrong = Step(7, "sh", "onnx-mdp analyze nothing.onnx  # a slip")
    with pytest.raises(
        AssertionError, match=r"page.md:7: `onnx-mdp analyze nothing.onnx` ended with 2, not 0"
    ):
        reader.follow(wrong, "page.md")
    reader.follow(Step(8, "sh", f"{wrong.text}, exit code 2"), "page.md")
    with pytest.raises(AssertionError, match="neither onnx-mdp nor python"):
        reader.follow(Step(9, "sh", "make all"), "page.md")


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page: str) -> None:
    for step in commands(page):
        for words in parts(step.text):
            at = 1 + next(
                (i for i, word in enumerate(words) if re.fullmatch("onnx[-_]mdp", word)), len(words)
            )
            command = typer.main.get_command(app)
            while hasattr(command, "commands") and at < len(words) and words[at] in command.commands:
                command, at = command.commands[words[at]], at + 1
            known = {"--help", *(name for option in command.params for name in option.opts)}
            used = {word.partition("=")[0] for word in words[at:] if re.match(r"--?[a-z]", word)}
            assert not used - known, f"{page}:{step.line}: {sorted(used - known)} in `{step.text}`"
            assert at >= len(words) or not hasattr(command, "commands"), f"{page}:{step.line}: `{step.text}`"


@pytest.mark.parametrize("page", PAGES)
def test_benchmarks_and_their_options_exist(page: str) -> None:
    """They take hours, so what is checked is that the script and each option is there."""
    text = " ".join(PAGES[page].read_text(encoding="utf-8").split())
    for package, module, rest in re.findall(r"python -m (benchmarks|models)\.(\w+)([^`]*)`", text):
        source = (ROOT / package / f"{module}.py").read_text(encoding="utf-8")
        shared = (ROOT / "benchmarks" / "harness.py").read_text(encoding="utf-8")
        for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest):
            assert f'"{option}"' in source + shared, f"{page}: {package}.{module} has no {option}"


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("page", pages_with("python", PYTHON_IN_SECONDS))
def test_the_python_of_a_page_runs(page: str, reader: Reader) -> None:
    """Blocks of a page share names; a file that one writes differs from those that it reads."""
    import torch

    from onnx_mdp.training.kernels import KERNELS

    images, labels = torch.randn(2, 3, 64, 64), torch.arange(2)
    known = {"batches": [(images, labels)] * 2, "feeds": [{"image": images.numpy()}]}
    reader.monkeypatch.chdir(reader.folder)
    with patch.dict(RULES), patch.dict(SINCE), patch.dict(KERNELS):
        for step in (step for step in steps(page) if step.language == "python"):
            reader.supply(step.text)
            reader.monkeypatch.chdir(reader.folder)
            read = {content_hash(load_model(file)) for file in reader.folder.glob("*.onnx")}
            old = set(reader.folder.glob("*.onnx"))
            exec(compile("\n" * (step.line - 1) + step.text, str(PAGES[page]), "exec"), known)
            for file in set(reader.folder.glob("*.onnx")) - old:
                assert content_hash(load_model(file)) not in read, f"{page}:{step.line}: {file.name}"
                file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, reader: Reader) -> None:
    source = (DOCS / "examples" / name).read_text(encoding="utf-8")
    if "torch" in source and not has_torch():
        pytest.skip("needs torch")
    reader.supply(source)
    done = patiently(lambda: reader.run(["python", str(DOCS / "examples" / name)], reader.folder))
    assert done.code == 0, f"examples/{name}\n{done.out}{done.err}"


# Words ---------------------------------------------------------------------------------------------------


def prose(page: str) -> str:
    """The page without its blocks."""
    return re.sub(r"^```.*?^```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(file: Path) -> set[str]:
    """What forges call the headings of a page."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(page: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [link for link in found if not link.startswith("http")]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page: str) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = PAGES[page].parent / name if name else PAGES[page]
        assert target.exists(), f"{page} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page} links to {link}"


def test_every_page_is_linked_and_short() -> None:
    linked = {Path(link.partition("#")[0]).name for page in PAGES for link in links(page)}
    assert set(PAGES) - linked <= {README}
    for page, file in PAGES.items():
        assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES.get(page, 150), page


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    named = re.findall(r"`((?:benchmarks|models|tests|onnx_mdp)/[\w./]+)`", prose(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def sentences() -> list[str]:
    """The texts of the source, what is filled in at run time as ``…``."""
    found = []
    for file in sorted((ROOT / "onnx_mdp").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                pieces = [p.value if isinstance(p, ast.Constant) else PLACEHOLDER for p in node.values]
                found.append("".join(map(str, pieces)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_sentences_of_troubleshooting_are_those_of_the_source() -> None:
    rows = re.findall(
        r"^\| `(.*?)` \|", PAGES["troubleshooting.md"].read_text(encoding="utf-8"), re.MULTILINE
    )
    said = sentences()
    assert len(rows) > 30
    for row in rows:
        pieces = (re.escape(piece.strip()) for piece in row.split(PLACEHOLDER))
        pattern = re.compile(".*".join(pieces), re.DOTALL)
        assert any(map(pattern.search, said)), f"nothing says `{row}` any more: write what it says now"
