"""Orderings: put named things in order from shuffled pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from random import Random
from typing import ClassVar

from openmimo.tasks.problem import NAMES, Problem, Task, below, draw


class Ordering(Task):
    """Four (level 1) to eight names. Each neighbouring pair is stated once, so the order is unique.

    From level 2 on some pairs are stated the other way round, from level 3 on true pairs are added that follow from
    the others. The worked answer lists the smaller names of all pairs, then says of each larger one whether it is among
    them: the one that is not comes first, and the answer follows the pairs down from it.
    """

    name: ClassVar[str] = "order"
    domain: ClassVar[str] = "logic"

    def generate(self, rng: Random, level: int) -> Problem:
        chain = draw(rng, NAMES, level + 3)
        ranks = [(i, i + 1) for i in range(len(chain) - 1)]
        while len(ranks) < len(chain) - 1 + max(0, level - 2):
            upper = below(rng, len(chain) - 2)
            extra = (upper, upper + 2 + below(rng, len(chain) - upper - 2))
            if extra not in ranks:
                ranks.append(extra)
        # Pairs in their true order would let "as they appear" be right in a third of the problems, not a fifth.
        in_order = ranks = sorted(ranks)
        while ranks == in_order:
            ranks = draw(rng, in_order, len(in_order))
        pairs = [
            f"{chain[low]} < {chain[high]}" if level > 1 and rng.random() < 0.5 else f"{chain[high]} > {chain[low]}"
            for high, low in ranks
        ]
        smaller = list(dict.fromkeys(chain[low] for _, low in ranks))
        larger = list(dict.fromkeys(chain[high] for high, _ in ranks))
        work = f"right {' '.join(smaller)}; left {' '.join(f'{n} yes' if n in smaller else f'{n} no' for n in larger)}"
        return self.problem(f"order: {'; '.join(pairs)}", [work], " > ".join(chain), level=level, key=" ".join(chain))

    def guesses(self, problem: Problem) -> Sequence[str]:
        """All fixed orders of the names as they appear in the prompt."""
        words = problem.prompt.replace(";", " ").replace(":", " ").split()
        seen = list(dict.fromkeys(word for word in words if word in NAMES))
        return [" > ".join(order) for order in permutations(seen)] if len(seen) <= 4 else [" > ".join(seen)]
