"""Rows and pages as a state machine against a plain model of who holds what."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from openmimo.engine.blocks import BlockManager, PageTable
from openmimo.engine.runner import PAGE_TOKENS

NUM_PAGES = 12


class PageMachine(RuleBasedStateMachine):
    """Tables grow, fork, write and end in any order. Content is modelled, so a lost copy is seen.

    Catches pages leaked, freed while held, handed out twice or written while shared, and wrong byte counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(num_rows=4, num_pages=NUM_PAGES, row_bytes=100, page_bytes=7)
        self.tables: list[PageTable] = []
        self.lengths: list[int] = []
        self.texts: list[list[int]] = []
        self.content = [[-1] * PAGE_TOKENS for _ in range(NUM_PAGES)]
        self.rows: list[int] = []
        self.stamp = 0

    def copy_page(self, source: int, target: int) -> None:
        self.content[target] = list(self.content[source])

    @rule()
    def begin(self) -> None:
        if len(self.tables) < 5:
            self.tables.append(PageTable(self.blocks))
            self.texts.append([])

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), count=st.integers(1, 150))
    def write(self, which: int, count: int) -> None:
        place = which % len(self.tables)
        table, text = self.tables[place], self.texts[place]
        start, free = len(text), len(self.blocks.free_pages)
        needed = table.pages_missing(start + count) + table.is_shared(start)
        if needed > free:
            assert table.pages_missing(start + count) <= free or not table.grow(start + count)
            return
        if table.is_shared(start):
            table.make_own(start, self.copy_page)
        assert table.grow(start + count)
        assert len(self.blocks.free_pages) == free - needed
        for position in range(start, start + count):
            self.stamp += 1
            text.append(self.stamp)
            self.content[table.ids[position // PAGE_TOKENS]][position % PAGE_TOKENS] = self.stamp

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        place = which % len(self.tables)
        twin = PageTable(self.blocks)
        twin.adopt(self.tables[place].pages[: -(-len(self.texts[place]) // PAGE_TOKENS)])
        self.tables.append(twin)
        self.texts.append(list(self.texts[place]))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        place = which % len(self.tables)
        self.tables.pop(place).release()
        self.texts.pop(place)

    @rule()
    def turn_rows(self) -> None:
        if self.blocks.free_rows and len(self.rows) < 3:
            self.rows.append(self.blocks.take_row())
        elif self.rows:
            self.blocks.give_row(self.rows.pop(0))

    @invariant()
    def holders_are_counted(self) -> None:
        held = Counter(page for table in self.tables for page in table.pages)
        assert [held[page] for page in range(NUM_PAGES)] == self.blocks.holders
        assert sorted([*held, *self.blocks.free_pages]) == list(range(NUM_PAGES))
        assert sorted(self.rows + self.blocks.free_rows) == list(range(4))
        assert self.blocks.used_bytes == 100 * len(self.rows) + 7 * len(held)

    @invariant()
    def nobody_lost_text(self) -> None:
        for table, text in zip(self.tables, self.texts, strict=True):
            pages = [self.content[page] for page in table.pages]
            assert [pages[p // PAGE_TOKENS][p % PAGE_TOKENS] for p in range(len(text))] == text


TestPages = PageMachine.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_mistakes_are_caught_at_once() -> None:
    """Catches a manager that lets a double release pass and hands a page to two sequences later."""
    blocks = BlockManager(num_rows=1, num_pages=2, row_bytes=1, page_bytes=1)
    page, row = blocks.take_page(), blocks.take_row()
    blocks.give_pages([page])
    blocks.give_row(row)
    with pytest.raises(AssertionError, match="given back twice"):
        blocks.give_pages([page])
    with pytest.raises(AssertionError, match="given back twice"):
        blocks.give_row(row)
    with pytest.raises(AssertionError, match="is free"):
        blocks.share_pages([page])


def test_freed_pages_are_used_again_in_order() -> None:
    """Catches pages that come back as they were freed: a later prompt lies backwards, and steps take twice as long."""
    blocks = BlockManager(num_rows=1, num_pages=8, row_bytes=1, page_bytes=1)
    pages = [blocks.take_page() for _ in range(8)]
    for page in (5, 2, 7, 3):
        blocks.give_pages([page])
    assert pages == list(range(8))
    assert [blocks.take_page() for _ in range(4)] == [2, 3, 5, 7]
