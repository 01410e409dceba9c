"""scripts/mutants.py: its list is of today's sources, and it tells what tests notice from what they do not."""

import ast
import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))
from mutants import MUTANTS, Mutant, passes, planted


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 80


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_has_its_place(mutant):
    """The text is there once; what replaces it is other Python; the tests exist."""
    source = (REPOSITORY / mutant.file).read_text()
    assert source.count(mutant.old) == 1
    assert ast.dump(ast.parse(source.replace(mutant.old, mutant.new))) != ast.dump(ast.parse(source))
    assert (REPOSITORY / mutant.tests.split()[0]).is_file()


def test_a_planted_mistake_is_noticed_and_taken_out_again(tmp_path):
    (tmp_path / "double.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_double.py").write_text("from double import double\n\n\ndef test():\n    assert double(2) == 4\n")
    noticed = Mutant("noticed", "double.py", "2 * x", "3 * x", "test_double.py")
    unnoticed = noticed._replace(new="x ** 2")
    for mutant, passed in ((noticed, False), (unnoticed, True), (None, True)):
        with planted(mutant, tmp_path):
            assert passes(tmp_path, "test_double.py") == passed
    with pytest.raises(ValueError, match="noticed: its text stands 0 times"), planted(noticed._replace(old="4"), tmp_path):
        pass
    with pytest.raises(RuntimeError, match="did not run"):  # which would count as survival, or as death
        passes(tmp_path, "test_double.py -k nothing")
