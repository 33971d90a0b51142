"""The documentation names what there is: sections, files, modules, options; its examples run."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image

from mosa_fast.data.image_file import read_image
from mosa_fast.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "configs/*.md", "mosa_fast/assets/*.md", "benchmarks/results/*.md")
    for path in ROOT.glob(pattern)
)
SOURCES = sorted(
    path
    for folder in ("mosa_fast", "kernels", "csrc", "configs", "benchmarks", "docs", "tests", ".ci", ".github")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix in (".py", ".h", ".cu", ".cpp", ".yaml", ".yml", ".sh", "")
)
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What sources write: docs/method.md, Placements, Merge. The sections end with the sentence, a bracket or the like.
CITATION = re.compile(r"docs/(\w+\.md), ([^.;:)\"`|]+)")
COMMENT_GOES_ON = re.compile(r"\s*\n\s*(?:#|//)\s*")
MODULE = re.compile(r"(?:python|torchrun .*) -m ((?:mosa_fast|benchmarks)(?:\.\w+)*)")
# What these do not know goes to the training.
HAND_ON = ("mosa_fast.train", "mosa_fast.sweep", "mosa_fast.data.check", "mosa_fast.info")
OPTION = re.compile(r"(?<![\w-])--([a-z][\w.]*)")


def headings(text):
    return re.findall(r"^#+ (.+?)\s*$", FENCE.sub("", text), re.MULTILINE)


def anchor(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def wrong_citations(text):
    """Citations in a source that name no page, or no section of it."""
    wrong = []
    text = COMMENT_GOES_ON.sub(" ", text)
    for match in CITATION.finditer(text):
        page, cited = match.groups()
        before = text[: match.start()].rpartition("\n")[2]
        cited = cited.split("\n")[0] if "#" in before or "//" in before else " ".join(cited.split())
        path = ROOT / "docs" / page
        known = headings(path.read_text()) if path.is_file() else []
        wrong += [f"docs/{page}, {section}" for section in cited.strip().split(", ") if section not in known]
    return wrong


def wrong_links(page, text):
    """Relative links in a page to files or anchors that there are not."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if re.match(r"\w+:", target):
            continue
        name, _, section = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (section and section not in map(anchor, headings(path.read_text()))):
            wrong.append(target)
    return wrong


def commands(text):
    """(module, options) of every command that a page shows, in a block or in backquotes."""
    shown = [code for language, code in FENCE.findall(text) if language != "python"]
    shown += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for code in shown:
        for line in code.replace("\\\n", " ").splitlines():
            found = MODULE.search(line)
            if found:
                rest = line[found.end() :].split("  #")[0]
                yield found[1], OPTION.findall(rest)


def options_of(module, command):
    """The options that a command line takes, by its own help."""
    is_package = importlib.util.find_spec(module).submodule_search_locations is not None
    program = importlib.import_module(f"{module}.__main__" if is_package else module)
    code, out, _ = command(program.main, "--help")
    assert code == 0
    return set(OPTION.findall(out))


def test_sections_that_sources_cite_exist():
    wrong = {str(path.relative_to(ROOT)): wrong_citations(path.read_text()) for path in SOURCES}
    assert {path: citations for path, citations in wrong.items() if citations} == {}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    assert wrong_links(ROOT / name, (ROOT / name).read_text()) == []


def test_commands_name_modules_and_options_that_exist(command):
    shown = {}
    for path in PAGES:
        for module, options in commands(path.read_text()):
            shown.setdefault(module, set()).update(options)
    assert {"mosa_fast.train", "mosa_fast.sweep", "mosa_fast.data.split", "benchmarks"} <= shown.keys()
    assert [module for module in shown if importlib.util.find_spec(module) is None] == []
    for_training = options_of("mosa_fast.train", command)
    wrong = {}
    for module, options in shown.items():
        options -= for_training if module in HAND_ON else set()
        if options:
            wrong[module] = options - options_of(module, command)
    assert {module: options for module, options in wrong.items() if options} == {}


def test_every_file_of_a_run_is_explained():
    folder, page = RunFolder("run"), (ROOT / "docs" / "training.md").read_text()
    files = [getattr(folder, name) for name, value in vars(RunFolder).items() if isinstance(value, property)]
    files = [path.name for path in files if isinstance(path, Path)]
    assert len(files) > 5
    assert [name for name in files if not re.search(rf"`{name}/?`", page)] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("docs/") and name != "docs/use.md"])
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for language, code in FENCE.findall((ROOT / name).read_text()):
        if language == "python":
            exec(code, {})


def test_a_page_of_use_runs_from_top_to_bottom(tmp_path, monkeypatch, digits_run, command):
    """Code and commands alike, where there are a run and an image of the names that the page says."""
    pytest.importorskip("accelerate")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/digits").symlink_to(digits_run.path)
    for path in (Path("image.png"), Path("images/deep/a.png")):
        path.parent.mkdir(parents=True, exist_ok=True)
        photo = Image.effect_noise((40, 30), 64)
        exif = photo.getexif()
        exif[ExifTags.Base.Orientation] = 6  # a phone that was held upright
        photo.save(path, exif=exif)
    scope, answers = {}, []
    for language, code in FENCE.findall((ROOT / "docs/use.md").read_text()):
        if language == "python":
            exec(code, scope)
            if "Image.open" in code:
                answers.append(torch.as_tensor(scope["logits"]).detach())
            continue
        assert language == "bash"
        for line in code.splitlines():
            before, _, words = line.partition("python -m ")
            if before:  # a pipe
                environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
                subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True, env=environment)
                continue
            module, *arguments = shlex.split(words, comments=True)
            code, _, error = command(importlib.import_module(module).main, *arguments)
            assert (code, error) == (0, ""), line
    # What timm and onnxruntime say of an image is what the exported program says of what this package reads.
    expected = scope["model"](scope["transform"](read_image("image.png"))[None])
    assert len(answers) == 2
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-4)


def test_mistakes_would_be_seen(tmp_path):
    # Put together here, so that this file cites nothing that there is not.
    cite = "docs/{}.md, {}".format
    assert wrong_citations(f'"""Text ({cite("method", "Words, Owner")}\n    maps; paper)."""') == []
    assert wrong_citations(f"# {cite('method', 'Owner')}\n# maps, Merge.") == []
    assert wrong_citations(f"EPS = 1  # {cite('method', 'Merge')}\nOTHER = 2") == []
    assert wrong_citations(cite("method", "Marge")) == [cite("method", "Marge")]
    assert wrong_citations(cite("nothing", "Merge")) == [cite("nothing", "Merge")]
    page = tmp_path / "page.md"
    page.write_text("# A `head`-ing, of two\n[a](#a-head-ing-of-two) [b](page.md) [c](page.md#no) [d](none.md)")
    assert wrong_links(page, page.read_text()) == ["page.md#no", "none.md"]
    text = "`python -m mosa_fast.none --a`\n```bash\ntorchrun --x 2 \\\n -m mosa_fast.train --optim.lr 1  # --no\n```\n"
    assert sorted(commands(text)) == [("mosa_fast.none", ["a"]), ("mosa_fast.train", ["optim.lr"])]
