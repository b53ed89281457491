import sys
from types import ModuleType

import pytest

from tests.checked import checked

imported_class = checked("engines.imported").imported_class


def test_a_class_of_an_imported_module_is_found() -> None:
    assert imported_class("types", "ModuleType") is ModuleType


def test_a_module_that_is_not_imported_has_no_class() -> None:
    assert imported_class("no_such_module", "Anything") is None


def test_a_module_that_another_thread_is_importing_has_no_class_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "half_imported", ModuleType("half_imported"))
    assert imported_class("half_imported", "Anything") is None
