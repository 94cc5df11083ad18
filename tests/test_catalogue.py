"""The catalogue against the reading list's size, the registry, and the marks of the tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import saccade as sc
from saccade.mechanism import names
from saccade.systems import catalogue

ENTRIES = catalogue.load()
WORKING = [e for e in ENTRIES if e.state == "works"]


def marked(folder: Path) -> set[str]:
    """The refs that test files claim by @pytest.mark.system("Sxxx") or pytestmark."""
    found: set[str] = set()
    for file in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func) == "pytest.mark.system"
            ):
                found |= {str(ast.literal_eval(a)) for a in node.args}
    return found


def test_all_301_rows_once() -> None:
    assert [e.ref for e in ENTRIES] == [f"S{n:03d}" for n in range(1, 302)]
    assert len({e.slug for e in ENTRIES}) == 301


def test_rows_are_filled_in() -> None:
    for e in ENTRIES:
        assert e.state in ("planned", "works"), e.ref
        assert all((e.slug, e.title, e.name, e.kind, e.family, e.about)), e.ref
        assert e.slug == e.slug.lower(), e.ref
        assert " " not in e.slug, e.ref
        assert e.about.endswith("."), e.ref
        assert "\n" not in e.about, e.ref


def test_an_entry_works_exactly_when_a_test_is_marked_with_its_ref() -> None:
    marks = marked(Path(__file__).parent / "systems")
    assert marks == {e.ref for e in WORKING}


def test_working_entries_and_no_others_say_where() -> None:
    for e in WORKING:
        assert e.where, e.ref
    for e in ENTRIES:
        assert e.state == "works" or not e.where, f"{e.ref} is planned, yet says where"


@pytest.mark.parametrize("entry", WORKING, ids=[e.ref for e in WORKING])
def test_where_can_be_called(entry: catalogue.Entry) -> None:
    if entry.where.startswith("sc."):
        assert callable(catalogue.public(entry.where))
        return
    m = sc.mechanism(entry.where)
    assert sc.mechanism(str(m)) == m


def test_every_constructor_with_a_ref_stands_in_the_catalogue() -> None:
    refs = {e.ref: e for e in ENTRIES}
    for name, maker in names().items():
        ref = getattr(maker, "ref", None)
        if ref is not None:
            assert ref in refs, f"{name} claims {ref}"
            assert refs[ref].where.split("(")[0].strip() == name or name in refs[ref].where, (
                f"{ref} is {name}"
            )


def test_every_constructor_of_a_system_is_found_by_its_ref() -> None:
    by_ref = catalogue.by_ref()
    assert by_ref["S211"] == "moba"
    assert set(by_ref) <= {e.ref for e in ENTRIES}
    for ref, name in by_ref.items():
        assert sc.mechanism(name) == names()[name](), ref


def test_search() -> None:
    assert [e.slug for e in catalogue.search("moba")][:1] == ["moba"]
    assert catalogue.search("MIXTURE block ATTENTION")
    assert all(e.family == "linear" for e in catalogue.search(family="linear"))
    assert all(e.state == "works" for e in catalogue.search(state="works"))
    assert len(catalogue.search()) == 301
    assert catalogue.search("no such words anywhere") == []


def test_get() -> None:
    assert catalogue.get("moba").ref == catalogue.get("S211").ref == catalogue.get("s211").ref == "S211"
    with pytest.raises(sc.MechanismError, match=r"no system is called 'mobba'; nearest: .*moba"):
        catalogue.get("mobba")
    with pytest.raises(sc.MechanismError, match="try `saccade systems WORDS`"):
        catalogue.get("xxxxxxxx")
