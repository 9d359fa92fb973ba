"""Knights and knaves: knights only say what is true, knaves only what is false; who is what?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import ClassVar

from openmimo.tasks.problem import NAMES, Problem, Task, below, draw, pick

ROLES = ("knave", "knight")
Roles = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a speaker says: a role of somebody, or that the speaker's role and another's are the same or differ."""

    speaker: str
    kind: str
    about: str
    explicit: bool = False

    def __str__(self) -> str:
        if self.kind in ROLES:
            return f"{self.about} {self.kind}"
        return f"{self.about} {self.kind}" if self.explicit else self.kind

    def holds(self, roles: Roles) -> bool:
        """Whether the claim is true when 1 means knight in `roles`."""
        about = roles[self.about]
        if self.kind in ROLES:
            return ROLES[about] == self.kind
        return (about == roles[self.speaker]) == (self.kind == "same")

    def fits(self, roles: Roles) -> bool:
        """Whether the speaker could have said it: knights say what holds, knaves what does not."""
        return self.holds(roles) == bool(roles[self.speaker])


KINDS = ("knight", "knave", "same", "differ")


def solutions(people: Sequence[str], claims: Sequence[Claim]) -> list[dict[str, int]]:
    """All assignments of roles that fit every claim, knights first."""
    worlds: list[dict[str, int]] = [
        dict(zip(people, roles, strict=True)) for roles in product((1, 0), repeat=len(people))
    ]
    return [world for world in worlds if all(claim.fits(world) for claim in claims)]


def _pairs_by_roles() -> dict[tuple[int, int], list[tuple[str, str]]]:
    """The kinds said by two people, where exactly one solution fits, grouped by that solution."""
    groups: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for first, second in product(KINDS, repeat=2):
        found = solutions("AB", (Claim("A", first, "B"), Claim("B", second, "A")))
        if len(found) == 1:
            groups.setdefault((found[0]["A"], found[0]["B"]), []).append((first, second))
    return groups


class Knights(Task):
    """Two people (level 1) to four; everybody says one thing (two from level 3 on); exactly one answer fits.

    Level 1 assumes that the first is a knight; the first claim then fixes the other's role, and the second claim fits
    or not; if not, the first is a knave. Higher levels try the assignments, knights first, up to the fitting one.
    """

    name: ClassVar[str] = "knights"
    domain: ClassVar[str] = "logic"

    def __init__(self) -> None:
        self._pairs = _pairs_by_roles()
        self._roles = tuple(self._pairs)

    def generate(self, rng: Random, level: int) -> Problem:
        people = draw(rng, NAMES, (2, 3, 3, 4, 4)[level - 1])
        if level == 1:
            # The four outcomes are equally likely, so that no constant does well.
            first, second = pick(rng, self._pairs[pick(rng, self._roles)])
            claims = [Claim(people[0], first, people[1]), Claim(people[1], second, people[0])]
            work, roles = assume_first(claims)
        else:
            claims = self._draw_claims(rng, people, 1 if level in (2, 4) else 2)
            work, roles = try_all(people, claims)
        prompt = "; ".join(f"{claim.speaker} says {claim}" for claim in claims)
        answer = ", ".join(f"{person} {ROLES[roles[person]]}" for person in people)
        key = ";".join(sorted(f"{claim.speaker} {claim.kind} {claim.about}" for claim in claims))
        return self.problem(f"roles: {prompt}", work, answer, level=level, key=key)

    @staticmethod
    def _draw_claims(rng: Random, people: Sequence[str], per_person: int) -> list[Claim]:
        target = {person: below(rng, 2) for person in people}
        while True:
            claims: list[Claim] = []
            for speaker in people:
                others = [person for person in people if person != speaker]
                for about in draw(rng, others, per_person):
                    fitting = [c for kind in KINDS if (c := Claim(speaker, kind, about, True)).fits(target)]
                    claims.append(pick(rng, fitting))
            if len(solutions(people, claims)) == 1:
                return claims

    def guesses(self, problem: Problem) -> Sequence[str]:
        """All fixed roles in the order of the people."""
        people = [part.split()[0] for part in problem.answer.split(", ")]
        return [
            ", ".join(f"{person} {ROLES[role]}" for person, role in zip(people, roles, strict=True))
            for roles in product((1, 0), repeat=len(people))
        ]


def assume_first(claims: Sequence[Claim]) -> tuple[list[str], dict[str, int]]:
    """The worked answer for two people who speak about each other, and their roles."""
    first, second = claims
    work: list[str] = []
    for role in (1, 0):
        roles = {first.speaker: role, second.speaker: 1}
        if not first.fits(roles):
            roles[second.speaker] = 0
        fits = second.fits(roles)
        work.append(f"if {_said(first, roles)}, {_said(second, roles)} {_verdict(fits)}")
        if fits:
            return work, roles
    raise AssertionError("a claim pair without a solution was drawn")


def try_all(people: Sequence[str], claims: Sequence[Claim]) -> tuple[list[str], dict[str, int]]:
    """Assignments from all knights on; each stops at its first misfit, and the search at the first that fits."""
    work: list[str] = []
    for bits in product((1, 0), repeat=len(people)):
        roles: dict[str, int] = dict(zip(people, bits, strict=True))
        line = "if " + ", ".join(f"{person} {ROLES[role]}" for person, role in roles.items()) + ":"
        heard: list[str] = []
        for claim in claims:
            fits = claim.fits(roles)
            heard.append(f"{_said(claim, roles)} {_verdict(fits)}")
            if not fits:
                break
        work.append(f"{line} {'; '.join(heard)}")
        if all(claim.fits(roles) for claim in claims):
            return work, roles
    raise AssertionError("claims without a solution were drawn")


def _said(claim: Claim, roles: Roles) -> str:
    truth = "true" if claim.holds(roles) else "false"
    return f"{claim.speaker} {ROLES[roles[claim.speaker]]} says {claim} {truth}"


def _verdict(fits: bool) -> str:
    return "ok" if fits else "bad"
