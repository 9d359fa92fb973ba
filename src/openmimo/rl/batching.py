"""From trajectories to rows for the model, with the recorded experts beside their tokens.

Suffixes: B rows, T tokens of a row, N answer tokens of a micro-batch, L sparse layers, k chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from openmimo.errors import TrainingError
from openmimo.rl.trajectory import Trajectory

# Rows are a multiple of this long, so that products come in few sizes.
ROW_MULTIPLE = 64
# Lengths of rows, unless an answer needs more: the first where prompts are not shared, else what leaves least empty.
ROW_LENGTHS = (256, 384, 512, 768, 1024)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Packed answers with their prompts. A row's inputs leave out each answer's last token, which nothing follows.

    With `branch_ids_BT` answers to one prompt are branches of one document (see `MiMoModel.forward`).
    `next_ids_BT` is the token after each input; `rows_N` are the flat places of the inputs whose next token was
    sampled, in the order of `order` (indices of the trajectories) and of their tokens. `sequence_N` is the trajectory
    of each, `versions_N` the version of the weights that drew it.
    `routes_BTLk` holds recorded experts where `has_routes_BT` is true; elsewhere its entries mean nothing.
    """

    token_ids_BT: Tensor
    next_ids_BT: Tensor
    document_ids_BT: Tensor
    branch_ids_BT: Tensor | None
    position_ids_BT: Tensor
    rows_N: Tensor
    sequence_N: Tensor
    sampled_logprobs_N: Tensor
    temperature_N: Tensor
    versions_N: Tensor
    routes_BTLk: Tensor | None
    has_routes_BT: Tensor
    order: tuple[int, ...]

    @property
    def targets_N(self) -> Tensor:
        return self.next_ids_BT.flatten()[self.rows_N]

    @property
    def num_tokens(self) -> int:
        """Inputs that are not padding."""
        return int((self.document_ids_BT >= 0).sum())

    @property
    def num_unrouted(self) -> int:
        """Inputs that are not padding and have no recorded experts: the router chooses for them."""
        return int(((self.document_ids_BT >= 0) & ~self.has_routes_BT).sum())

    def places(self, rows: slice = slice(None)) -> dict[str, Tensor | None]:
        """What the model has to know about the places of some rows."""
        branch_ids_BT = None if self.branch_ids_BT is None else self.branch_ids_BT[rows]
        return {
            "position_ids_BT": self.position_ids_BT[rows],
            "document_ids_BT": self.document_ids_BT[rows],
            "branch_ids_BT": branch_ids_BT,
        }

    def to(self, device: torch.device) -> MicroBatch:
        """The micro-batch where the model is."""
        if device.type == "cpu":
            return self
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class _Unit:
    """Answers that share the first `shared` tokens of their prompt; one answer alone shares nothing."""

    indices: tuple[int, ...]
    shared: int

    def size(self, trajectories: Sequence[Trajectory]) -> int:
        """Places that it takes."""
        return self.shared + sum(trajectories[index].num_inputs - self.shared for index in self.indices)


def pack(
    trajectories: Sequence[Trajectory],
    *,
    max_tokens: int,
    num_experts: int = 0,
    chosen: Sequence[int] | None = None,
    share_prompts: bool = False,
    num_heads: int = 3,
) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens` places that hold every trajectory, or the `chosen`, once, long ones first.

    Rows are as long as the longest trajectory needs, so one may exceed `max_tokens` alone.
    With `share_prompts` a prompt's tokens are there once for all its answers in a row, where their routes are the same.
    Its last tokens, which predict an answer's first or with which one of `num_heads` MTP heads does, every answer has
    for itself.
    Places without routes name different experts in turn, so that padding loads none of the `num_experts` more.
    Raises: TrainingError when some trajectories have routes and others have none.
    """
    indices = range(len(trajectories)) if chosen is None else chosen
    if not indices:
        raise TrainingError("no trajectories to train on; sample some first")
    with_routes = sum(trajectories[index].routes is not None for index in indices)
    if with_routes not in (0, len(indices)):
        raise TrainingError(
            f"{with_routes} of {len(indices)} trajectories have routes; record them for all or for none"
        )
    longest = max(trajectories[index].num_inputs for index in indices)
    units = list(_share(trajectories, indices, num_heads + 1)) if share_prompts else [_Unit((i,), 0) for i in indices]
    needed = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
    widths = sorted({max(length, needed) for length in (ROW_LENGTHS if share_prompts else ROW_LENGTHS[:1])})
    filled = [(width, _fill_rows(trajectories, units, width)) for width in widths]
    width, rows = min(filled, key=lambda each: each[0] * len(each[1]))
    per_batch = max(1, max_tokens // width)
    return [
        _micro_batch(trajectories, rows[first : first + per_batch], width, num_experts)
        for first in range(0, len(rows), per_batch)
    ]


def _share(trajectories: Sequence[Trajectory], indices: Sequence[int], own: int) -> Iterator[_Unit]:
    """Units of answers with one prompt; each answer keeps the prompt's last `own` tokens for itself."""
    by_prompt: dict[tuple[tuple[int, ...], bytes], list[int]] = {}
    for index in indices:
        one = trajectories[index]
        shared = max(0, len(one.prompt.token_ids) - own)
        routes = b"" if one.routes is None else one.routes[:shared].tobytes()
        by_prompt.setdefault((one.prompt.token_ids[:shared], routes), []).append(index)
    for (token_ids, _), found in by_prompt.items():
        if len(found) > 1 and token_ids:
            yield _Unit(tuple(found), len(token_ids))
        else:
            yield from (_Unit((index,), 0) for index in found)


def _fill_rows(trajectories: Sequence[Trajectory], units: Sequence[_Unit], width: int) -> list[list[_Unit]]:
    """Each unit into the first row with room for it, the longest first; what a row has no room for is divided."""
    rows: list[list[_Unit]] = []
    room: list[int] = []
    waiting = sorted(units, key=lambda unit: (-unit.size(trajectories), unit.indices), reverse=True)
    while waiting:
        unit = waiting.pop()
        size = unit.size(trajectories)
        place = next((row for row, free in enumerate(room) if free >= size), None)
        if place is None and len(unit.indices) > 1:
            # Two answers at least, or the prompt is only repeated.
            place = next((row for row, free in enumerate(room) if _fitting(trajectories, unit, free) > 1), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(width)
        fitting = _fitting(trajectories, unit, room[place])
        if fitting < len(unit.indices):
            waiting.append(replace(unit, indices=unit.indices[fitting:]))
            unit = replace(unit, indices=unit.indices[:fitting])
        rows[place].append(unit)
        room[place] -= unit.size(trajectories)
    return rows


def _fitting(trajectories: Sequence[Trajectory], unit: _Unit, room: int) -> int:
    """How many of the unit's answers, from the first on, there is room for."""
    room -= unit.shared
    for number, index in enumerate(unit.indices):
        room -= trajectories[index].num_inputs - unit.shared
        if room < 0:
            return number
    return len(unit.indices)


def _micro_batch(
    trajectories: Sequence[Trajectory], rows: Sequence[Sequence[_Unit]], width: int, num_experts: int
) -> MicroBatch:
    shape = (len(rows), width)
    ids, following = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    documents, positions = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    branches = np.zeros(shape, np.int32)
    has_routes, routes = np.zeros(shape, np.bool_), None
    first_routes = trajectories[rows[0][0].indices[0]].routes
    if first_routes is not None:
        routes = np.zeros((*shape, *first_routes.shape[1:]), np.uint16)
    places: list[np.ndarray] = []
    order: list[int] = []
    for row, units in enumerate(rows):
        start = 0
        for document, unit in enumerate(units):
            for branch, index in enumerate(unit.indices):
                one = trajectories[index]
                text = np.array(one.prompt.token_ids + one.token_ids, np.int64)
                begin = unit.shared if branch else 0  # the first answer brings the shared tokens along
                end = start + len(text) - 1 - begin
                ids[row, start:end], following[row, start:end] = text[begin:-1], text[begin + 1 :]
                documents[row, start:end], positions[row, start:end] = document, np.arange(begin, len(text) - 1)
                if unit.shared:
                    branches[row, start + unit.shared - begin : end] = branch + 1
                if routes is not None and one.routes is not None:
                    routes[row, start:end], has_routes[row, start:end] = one.routes[begin:], True
                places.append(row * width + np.arange(end - len(one.token_ids), end))
                order.append(index)
                start = end
        positions[row, start:] = np.arange(width - start)  # padding counts up like any document
    if routes is not None:
        _route_in_turn(routes, ~has_routes, num_experts)
    sizes = [len(trajectories[index].token_ids) for index in order]
    temperatures = np.array([trajectories[index].prompt.temperature for index in order], np.float32)
    return MicroBatch(
        token_ids_BT=torch.from_numpy(ids),
        next_ids_BT=torch.from_numpy(following),
        document_ids_BT=torch.from_numpy(documents),
        branch_ids_BT=torch.from_numpy(branches) if branches.any() else None,
        position_ids_BT=torch.from_numpy(positions),
        rows_N=torch.from_numpy(np.concatenate(places)),
        sequence_N=torch.from_numpy(np.repeat(np.array(order), sizes)),
        sampled_logprobs_N=torch.from_numpy(np.concatenate([trajectories[index].logprobs_R for index in order])),
        temperature_N=torch.from_numpy(np.repeat(temperatures, sizes)),
        versions_N=torch.from_numpy(np.concatenate([trajectories[index].versions_R for index in order])),
        routes_BTLk=None if routes is None else torch.from_numpy(routes.astype(np.int64)),
        has_routes_BT=torch.from_numpy(has_routes),
        order=tuple(order),
    )


def _route_in_turn(routes: np.ndarray, idle: np.ndarray, num_experts: int) -> None:
    """Give the idle places the experts in turn, so that none gets more of them than another."""
    choices = routes.shape[-1]
    first = np.arange(int(idle.sum()))[:, None, None] * choices + np.arange(choices)
    routes[idle] = first % max(1, num_experts)
