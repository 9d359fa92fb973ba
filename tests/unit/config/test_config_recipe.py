"""TOML recipes: strict types, dotted paths in every error, overrides, and text that loads back equal."""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import pytest

from openmimo.config.recipe import load_recipe, parse_recipe, to_toml
from openmimo.errors import ConfigError


class Colour(StrEnum):
    RED = "red"
    GREEN = "green"


@dataclass(frozen=True, kw_only=True)
class Leaf:
    size: int
    rate: float = 0.5
    colour: Colour = Colour.RED

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConfigError(f"size={self.size} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Tree:
    name: str
    leaf: Leaf
    leaves: tuple[Leaf, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    limit: int | None = None
    other: Leaf | None = None
    fast: bool = False
    notes: dict[str, str] = field(default_factory=dict)
    spare: Leaf = field(default_factory=lambda: Leaf(size=9))


TEXT = """
name = "oak"
[leaf]
size = 1
[[leaves]]
size = 2
[[leaves]]
size = 3
colour = "green"
"""
OAK = Tree(name="oak", leaf=Leaf(size=1), leaves=(Leaf(size=2), Leaf(size=3, colour=Colour.GREEN)))


def load(tmp_path: Path, text: str = TEXT, *overrides: str) -> Tree:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(path, list(overrides), Tree)


def test_tables_become_dataclasses(tmp_path: Path) -> None:
    assert load(tmp_path) == OAK


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam = 1" + TEXT, "unknown key 'nam'; did you mean 'name'"),
        (TEXT + "sise = 1", r"unknown key 'leaves.1.sise'; did you mean 'size'"),
        ("[leaf]\nsize = 1", "'name' is missing"),
        ("name = 'x'\n[leaf]", "'leaf.size' is missing"),
        (TEXT + "rate = 'x'", r"leaves.1.rate: got 'x' \(string\), expected a number"),
        (TEXT + "rate = true", r"leaves.1.rate: got True \(boolean\), expected a number"),
        (TEXT + "rate = nan", "leaves.1.rate: got nan, expected a finite number"),
        (TEXT.replace("size = 3", "size = 3.0"), r"leaves.1.size: got 3.0 \(number\), expected a whole number"),
        (TEXT.replace("size = 3", "size = true"), "expected a whole number"),
        (TEXT.replace("size = 3", f"size = {2**64}"), "bits"),
        (TEXT.replace("size = 3", "size = -3"), "leaves.1: size=-3 must be 0 or more"),
        (TEXT.replace("green", "gren"), "leaves.1.colour: got 'gren' .*did you mean 'green'"),
        (TEXT.replace("[leaf]", "[[leaf]]"), r"leaf: got .* \(array\), expected a table"),
        ("leaves = 3\n" + TEXT.split("[[")[0], r"leaves: got 3 \(whole number\), expected an array"),
        ("pair = [1]" + TEXT, "pair: got 1 entries, expected 2"),
        ("fast = 1" + TEXT, "fast: got 1 .*expected true or false"),
        ("notes = {a = 1}" + TEXT, "notes.a: got 1 .*expected a string"),
        ("limit = 1979-05-27" + TEXT, r"limit: got .*\(date\), expected a whole number"),
        ("name = ", "not valid TOML"),
        (TEXT + "x = " + "[" * 5000, "not valid TOML"),
        (TEXT + "x = " + "9" * 5000, "not valid TOML"),
    ],
)
def test_mistakes_are_named_by_their_path(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert "recipe.toml" in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read recipe"):
        load_recipe(tmp_path / "none.toml", [], Tree)
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(tmp_path / "bytes.toml", [], Tree)


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("name=ash", {"name": "ash"}),
        ('name="ash"', {"name": "ash"}),
        ("name=12", {"name": "12"}),
        ("name=a=b", {"name": "a=b"}),
        ("fast=true", {"fast": True}),
        ("limit=5", {"limit": 5}),
        ("pair=[3, 4]", {"pair": (3, 4.0)}),
        ("pair.1=7", {"pair": (1, 7.0)}),
        ("leaf.rate=3e-4", {"leaf": Leaf(size=1, rate=3e-4)}),
        ("leaf.colour=green", {"leaf": Leaf(size=1, colour=Colour.GREEN)}),
        ("leaf={size=8}", {"leaf": Leaf(size=8)}),
        ("leaves.0.size=5", {"leaves": (Leaf(size=5), OAK.leaves[1])}),
        ("leaves=[]", {"leaves": ()}),
        ("spare.rate=1", {"spare": Leaf(size=9, rate=1.0)}),
        ("other.size=4", {"other": Leaf(size=4)}),
        ("notes.key=value", {"notes": {"key": "value"}}),
    ],
)
def test_overrides_reach_every_place(tmp_path: Path, override: str, changes: dict[str, object]) -> None:
    """Also into tuples and parts that the file leaves at their defaults."""
    assert load(tmp_path, TEXT, override) == dataclasses.replace(OAK, **changes)  # type: ignore[arg-type]


def test_later_overrides_win(tmp_path: Path) -> None:
    assert load(tmp_path, TEXT, "limit=1", "limit=2").limit == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name", "not of the form"),
        ("=1", "not of the form"),
        ("leaf..size=1", "not of the form"),
        ("leaff.size=1", "unknown key 'leaff'; did you mean 'leaf'"),
        ("leaf.sizes=1", "unknown key 'leaf.sizes'; did you mean 'size'"),
        ("leaves.2.size=1", "must be an index below 2"),
        ("leaves.x.size=1", "must be an index below 2"),
        ("leaves.-1.size=1", "must be an index below 2"),
        ("name.x=1", "has no parts to set"),
        ("limit.x=1", "limit: got .*expected a whole number"),
        ("leaf.size=big", "leaf.size: got 'big'"),
        ("fast=True", "fast: got 'True'"),
        ("limit=1\nname=2", "limit: got"),
        ("name=\udcff", "not valid Unicode"),
    ],
)
def test_bad_overrides_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, TEXT, override)


def test_overrides_do_not_leak_into_defaults(tmp_path: Path) -> None:
    """The default of a nested part is shared by all recipes, so an override must change a copy."""
    load(tmp_path, TEXT, "spare.size=3", "pair.0=8")
    assert load(tmp_path) == OAK


def test_printed_recipes_load_back_equal(tmp_path: Path) -> None:
    """Quotes, control characters, odd keys, tiny and large numbers, nested and empty parts."""
    tree = Tree(
        name='q"\\\n\t\x7f\x01 \U0001f333 é',
        leaf=Leaf(size=0, rate=1e-300, colour=Colour.GREEN),
        leaves=(Leaf(size=2**62), Leaf(size=1, rate=-1e22)),
        pair=(-5, 0.1),
        limit=0,
        other=Leaf(size=3),
        fast=True,
        notes={"a b": "x", "": "y", "k.l": "z", "é\n": "", "plain-1_": "w"},
    )
    for recipe in (OAK, tree, dataclasses.replace(tree, leaves=(), notes={})):
        assert load(tmp_path, to_toml(recipe)) == recipe


def test_printing_refuses_a_none_that_would_be_lost() -> None:
    @dataclass(frozen=True)
    class Odd:
        limit: int | None = 3

    with pytest.raises(ConfigError, match="limit is None"):
        to_toml(Odd(limit=None))
    assert tomllib.loads(to_toml(Odd())) == {"limit": 3}


def test_plain_tables_are_parsed_without_a_file() -> None:
    assert parse_recipe({"name": "x", "leaf": {"size": 1}}, Tree) == Tree(name="x", leaf=Leaf(size=1))
    with pytest.raises(ConfigError, match="flags: 'leaf' is missing"):
        parse_recipe({"name": "x"}, Tree, where="flags")
