"""The shape of the repository: imports point one way, importing is cheap, files are clean."""

import ast
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "labkit"

# A part may import the parts on the lines above its own. Parts on one line are neighbours that do
# not know each other.
ORDER = """
errors paths quiet usage
chat_templates files machine stepplan
curves weights
checkpoints
world
data
pretrain
models
adapters quantization soft_prompts
memory
training
scale
statistics
metrics
evaluation
calculator preferences retrieval
badcases card
filters
base_model
statements
claims
report recipe
byte_figures drawings forgetting
widgets
exercises
lessons
notebooks
bench doctor
cli
""".strip().splitlines()
RANK = {part: rank for rank, line in enumerate(ORDER) for part in line.split()}


def part_of(path: Path) -> str:
    """The part of labkit that a file belongs to: labkit/world/text.py -> world."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(source: str, package: str) -> set[str]:
    """Parts of labkit that a module imports anywhere, inside functions too.

    `package` is the dotted name of the package that holds the module, for relative imports.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, base]).rstrip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("labkit.")}


def wrong_way(part: str, imported: str) -> bool:
    """Whether an import points at a neighbour or upwards."""
    return imported != part and RANK[imported] >= RANK[part]


def test_structure_reads_every_form_of_import():
    source = (
        "import labkit.claims\n"
        "from labkit import data, models\n"
        "from labkit.world.text import words\n"
        "def late():\n    from .normalise import normalise\n    from ..report import style\n"
    )
    expected = {"claims", "data", "models", "world", "notebooks", "report"}
    assert imported_parts(source, "labkit.notebooks") == expected


def test_structure_notices_an_import_upwards():
    assert wrong_way("data", "models")
    assert wrong_way("bench", "doctor")
    assert not wrong_way("models", "data")
    assert not wrong_way("data", "data")


def test_structure_gives_every_part_a_place():
    parts = {part_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert parts <= set(RANK), f"give {sorted(parts - set(RANK))} a line in ORDER of {__file__}"


def test_structure_imports_point_one_way():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = part_of(path)
        if part not in RANK:
            continue
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for imported in imported_parts(path.read_text(encoding="utf-8"), package) & set(RANK):
            if wrong_way(part, imported):
                found.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert not found, "\n".join(found)


def in_fresh_process(code: str) -> str:
    """What a new Python prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_structure_import_labkit_takes_under_300_ms():
    code = "from time import perf_counter as t; start = t(); import labkit; print(t() - start)"
    assert statistics.median(float(in_fresh_process(code)) for _ in range(3)) < 0.3


def test_structure_import_labkit_leaves_heavy_packages_alone():
    code = "import labkit, sys; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    heavy = {"torch", "transformers", "datasets", "pandas", "numpy", "matplotlib", "IPython"}
    assert not heavy & set(in_fresh_process(code).split())


def test_structure_parts_load_on_first_use():
    code = (
        "import labkit, sys; before = 'labkit.paths' in sys.modules; labkit.paths.root();"
        "print(before, 'labkit.paths' in sys.modules, 'world' in dir(labkit))"
    )
    assert in_fresh_process(code).split() == ["False", "True", "True"]


def test_structure_unknown_part_is_named():
    import labkit

    with pytest.raises(AttributeError, match="labkit has no part 'modles'; its parts are adapters"):
        labkit.modles  # noqa: B018


def committed_files() -> list[Path]:
    """Files that git tracks or would track; every file where there is no git."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [ROOT / name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    own = (".venv", ".labkit", "workbook", "__pycache__", ".git", ".egg-info", "_cache")
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(part.endswith(own) for part in path.relative_to(ROOT).parts)
    ]


# Written in pieces, so that this file does not hold what it looks for. /home/ada is the invented
# user of the tests.
HOSTS = ["py" + "pi", "python" + "hosted", "download.py" + "torch", "arti" + "factory"]
UNWANTED = re.compile(
    r"https?://[\w.-]*(" + "|".join(HOSTS) + r")"
    r"|(?<![\w.~-])/(root|work|home/(?!ada/)[a-z][\w-]*|Users/[a-z]\w*)/|py" + "env/"
)


def unwanted_text(text: str) -> list[str]:
    """Package hosts and paths of one machine in a text."""
    return [match.group(0) for match in UNWANTED.finditer(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see https://files.py" + "thonhosted.org/x", True),
        ("--index-url=http://my-arti" + "factory.local/simple", True),
        ("open('/ro" + "ot/data')", True),
        ("File /ho" + "me/grace/lab.py", True),
        ("File /home/ada/lab.py", False),
        ("see https://huggingface.co/docs", False),
        ("notebooks/work/one", False),
        ("~/home/x", False),
    ],
)
def test_structure_knows_unwanted_text(text: str, found: bool):
    assert bool(unwanted_text(text)) == found


def test_structure_files_name_no_package_host_and_no_path_of_one_machine():
    found = {}
    for path in committed_files():
        content = path.read_bytes()
        if b"\0" in content[:8192]:  # weights and images
            continue
        hits = unwanted_text(content.decode("utf-8", errors="replace"))
        if hits:
            found[str(path.relative_to(ROOT))] = hits[:3]
    assert not found


def tool(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, encoding="utf-8"
    )


def test_structure_ruff_finds_nothing():
    checked = tool("ruff", "check", "--no-cache", ".")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_structure_ruff_would_format_nothing():
    checked = tool("ruff", "format", "--no-cache", "--check", ".")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_structure_types_of_labkit_hold():
    started = tool("pyright", "--version")
    if started.returncode:
        pytest.skip(f"pyright's Node.js does not start here: {started.stderr.strip()[-200:]}")
    checked = tool("pyright", "--pythonpath", sys.executable, "labkit")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_structure_every_pin_is_exact_and_plain():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    pin = re.compile(r"[A-Za-z0-9._-]+==[0-9][\w.]*( ; [a-z_]+ (==|<) \"[\w.]+\")?")
    assert [line for line in pins if not pin.fullmatch(line)] == []
    names = [re.split("==", line)[0].lower().replace("_", "-") for line in pins]
    assert len(names) == len(set(names))


def test_structure_every_dependency_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert "labkit[scale]" in extras["test"]  # the suite measures with them
    needed = project["dependencies"] + extras["scale"] + extras["test"]
    needed.remove("labkit[scale]")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    for requirement in needed:
        name = re.match(r"[\w.-]+", requirement).group(0)
        assert re.search(rf"^{re.escape(name)}==", pinned, re.MULTILINE), f"{name} is not pinned"


def test_structure_readme_names_every_notebook():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    notebooks = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks, "notebooks/ holds no notebook"
    assert [name for name in notebooks if name not in readme] == []


def test_structure_ci_runs_what_a_developer_types():
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands[-1] == "exec python3 lab.py test"
