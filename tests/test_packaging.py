"""The package as other people get it: imported lazily, installed from a wheel, far from any checkout."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest

import dalm_utils
from dalm_utils.config import PROJECT
from dalm_utils.hubs import BASES, SHIPPED
from tests.helpers import tiny_base, tiny_config


def python(*arguments, executable=sys.executable, **options) -> subprocess.CompletedProcess:
    return subprocess.run([executable, *arguments], capture_output=True, text=True, timeout=300, **options)


# -------------------------------------------------------------------------------------------------------- the import
def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, dalm_utils; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    result = python("-c", code, cwd=PROJECT)
    assert result.stdout == "[]\n", result


def test_every_public_name_is_found_and_known_to_type_checkers():
    branches = [node for node in ast.walk(ast.parse(Path(dalm_utils.__file__).read_text())) if isinstance(node, ast.If)]
    (block,) = (node for node in branches if ast.unparse(node.test) == "TYPE_CHECKING")
    home = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert sorted(home) == sorted(dalm_utils.__all__) and set(home) <= set(dir(dalm_utils))
    for name, module in home.items():
        assert getattr(dalm_utils, name) is getattr(getattr(dalm_utils, module), name)
    with pytest.raises(AttributeError, match="module 'dalm_utils' has no attribute 'trane'"):
        _ = dalm_utils.trane


@pytest.mark.slow
def test_the_first_name_used_imports_the_modules_behind_all_of_them():
    """Else a notebook would meet a later version of the code in the middle of a run, if it was edited meanwhile."""
    code = "import sys, dalm_utils; dalm_utils.anneal_ratio; before = set(sys.modules)\n"
    code += "[getattr(dalm_utils, name) for name in dalm_utils.__all__]; print(set(sys.modules) - before)"
    result = python("-c", code, cwd=PROJECT)
    assert result.stdout == "set()\n", result


@pytest.mark.slow
@pytest.mark.parametrize("given, expected", [(None, "1000"), ("77", "77")])
def test_openmp_spins_briefly_unless_the_environment_says_otherwise(given, expected):
    """libgomp prints the setting that it has read, when torch loads it."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"GOMP_SPINCOUNT": given} if given else {})
    result = python("-c", "import dalm_utils, torch", cwd=PROJECT, env=environment)
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)
    if result.returncode == 0 and not found:
        pytest.skip("this torch does not use libgomp")
    assert set(found) == {expected}, result.stderr


def test_a_checkout_has_the_bases_that_ship():
    assert Path(__file__).resolve().parents[1] == PROJECT
    assert sorted(path.name for path in BASES.iterdir()) == sorted(SHIPPED)


# ---------------------------------------------------------------------------------------------------------- the wheel
@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what belongs to the package, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    shutil.copytree(PROJECT / "dalm_utils", source / "dalm_utils", ignore=shutil.ignore_patterns("__pycache__"))
    command = ["-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", source / "dist"]
    result = python(*command, source)
    assert result.returncode == 0, result.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs the Python of a new environment, from a folder outside the checkout, with the wheel and its dependencies.

    The dependencies are those of the interpreter that runs the tests; its .pth files, and with them an editable
    install of this checkout, do not apply. Returns the function that runs it, its site-packages and its folder.
    """
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "venv", with_pip=False)
    result = python("-m", "pip", "--python", place / "venv", "install", "--no-deps", "--no-index", wheel)
    assert result.returncode == 0, result.stderr
    packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(place / "venv")}))
    dependencies = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    home = place / "home"
    home.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "GOMP_SPINCOUNT") if name in os.environ}

    def run(*arguments):
        environment = {**kept, "HOME": str(home)}
        return python(*arguments, executable=place / "venv" / "bin" / "python", cwd=home, env=environment)

    before = _files(packages)
    yield run, packages, home
    assert _files(packages) == before, "something was written into site-packages"


def _files(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_the_wheel_holds_the_modules_and_states_lower_bounds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    modules = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "dalm_utils").rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == modules
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert len(required) >= 10 and not [requirement for requirement in required if "==" in requirement.split(";")[0]]


@pytest.mark.slow
def test_the_installed_package_is_imported_and_explains_itself_at_once(installed):
    run, packages, _ = installed
    result = run("-c", "import dalm_utils; print(dalm_utils.__file__)")
    assert result.stdout.strip() == str(packages / "dalm_utils" / "__init__.py"), result
    begun = time.perf_counter()
    result = run("-X", "importtime", "-m", "dalm_utils", "--help")
    print(f"python -m dalm_utils --help: {time.perf_counter() - begun:.2f} s")
    assert result.returncode == 0 and "usage: python -m dalm_utils" in result.stdout
    imported = re.findall(r"^import time:.*\| +(\S+)$", result.stderr, re.MULTILINE)
    assert "argparse" in imported and not {"torch", "transformers", "accelerate", "matplotlib"} & set(imported)


@pytest.mark.slow
def test_the_installed_package_samples_from_a_local_model(installed, tmp_path):
    run, _, _ = installed
    shutil.copytree(BASES / "tiny-diffugpt", tmp_path / "model")
    asked = ["--prompt", "Return the", "--length", "8", "--steps", "4", "--json"]
    result = run("-m", "dalm_utils", "sample", tmp_path / "model", *asked)
    assert result.returncode == 0, result.stderr
    samples = json.loads(result.stdout)
    assert samples["texts"][0].startswith("Return the") and samples["forward_passes"] == 4


@pytest.mark.slow
def test_the_installed_package_keeps_runs_and_texts_in_the_working_directory(installed, tmp_path):
    run, _, home = installed
    small = tiny_config(tmp_path, base=tiny_base(tmp_path))
    names = ("base", "text", "length", "batch", "eval_blocks", "device", "precision")
    settings = [f"{name}={getattr(small, name)}" for name in names]
    result = run("-m", "dalm_utils", "train", "gpt2", "name=installed", "steps=2", *settings)
    assert result.returncode == 0, result.stderr
    assert (home / "checkpoints" / "runs" / "installed" / "step-000002" / "model.safetensors").is_file()
    assert list((home / "data" / "cache").glob("*/train.bin"))


@pytest.mark.slow
def test_without_a_checkout_a_base_that_ships_is_an_error_that_says_where_it_is(installed):
    run, _, _ = installed
    result = run("-m", "dalm_utils", "sample", "tiny-diffugpt")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "ships with the project's repository" in result.stderr
    assert "PATH/TO/CHECKOUT/checkpoints/base/tiny-diffugpt" in result.stderr


# -------------------------------------------------------------------------------------------------- the test command
def test_the_test_command_names_every_test_file_and_no_folder():
    """pytest drops a file from its arguments, without a word, if a folder that contains it is named too."""
    make = ["make", "--dry-run", "--no-print-directory", "test", "PYTEST=echo"]
    recipe = subprocess.run(make, cwd=PROJECT, capture_output=True, text=True)
    command = recipe.stdout.splitlines()[-1]
    assert command.startswith("runs="), recipe
    named = subprocess.run(["bash", "-c", command], cwd=PROJECT, capture_output=True, text=True).stdout.split()
    assert named[0] == "tests/check_notebooks.py"
    assert sorted(named[1:]) == sorted(f"tests/{file.name}" for file in (PROJECT / "tests").glob("test_*.py"))
