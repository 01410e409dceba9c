"""scripts/mutants.py: its list is of today's sources."""

import ast
import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))
from mutants import MUTANTS


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 80


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_has_its_place(mutant):
    """The text is there once; what replaces it is other Python; the tests exist."""
    source = (REPOSITORY / mutant.file).read_text()
    assert source.count(mutant.old) == 1
    assert ast.dump(ast.parse(source.replace(mutant.old, mutant.new))) != ast.dump(ast.parse(source))
    assert (REPOSITORY / mutant.tests.split()[0]).is_file()
