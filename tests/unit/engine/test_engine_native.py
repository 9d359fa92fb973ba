"""The C++ runtime beside the PyTorch model: logits, routes, drafts, and results that depend on nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from openmimo.checkpoint import save_model
from openmimo.config.model import ModelConfig
from openmimo.engine.native_runner import KERNELS_VARIABLE, WEIGHTS, NativeRunner
from openmimo.engine.runner import StepInput
from openmimo.errors import RequestError

native = pytest.importorskip("openmimo._native", reason="this installation has no C++ runtime")

from native_cases import feed, ints, make_runner, random_model, shapes  # noqa: E402

TOKENS = 230
SHAPES = shapes()


def some_tokens(config: ModelConfig, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(config.vocab_size, size=TOKENS).astype(np.int32)


@pytest.mark.parametrize("kernels", native.available_kernels())
@pytest.mark.parametrize("name", list(SHAPES))
def test_fp32_logits_and_routes_are_the_models(name: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches any wrong arithmetic, layout or mask, in every instruction set; the oracle is the PyTorch model."""
    monkeypatch.setenv(KERNELS_VARIABLE, kernels)
    config = SHAPES[name]
    model, tokens = random_model(config), some_tokens(config)
    runner = make_runner(model)
    assert runner.kernels == kernels
    logits, routes = feed(runner, tokens, [TOKENS])
    with torch.no_grad():
        output = model(torch.from_numpy(tokens).long()[None])
        expected = output.logits[0].numpy()
    assert np.abs(logits - expected).max() <= 1e-5
    if config.num_moe_layers:
        assert (routes == output.routed_experts[0].numpy()).all()


# Weights, activations.
FORMATS = [(weights, "auto") for weights in WEIGHTS] + [("int8", "int8"), ("int8_block", "int8")]


@pytest.mark.parametrize(("weights", "activations"), FORMATS)
@pytest.mark.parametrize("name", list(SHAPES))
def test_pieces_threads_and_rejected_tokens_change_no_bit(name: str, weights: str, activations: str) -> None:
    """Catches sums whose order depends on the step, rings that lose keys, and traces of tokens that were not kept."""
    config = SHAPES[name]
    model, tokens = random_model(config), some_tokens(config)
    runner = make_runner(model, weights, activations=activations)
    logits, routes = feed(runner, tokens, [TOKENS])
    singles = [1] * TOKENS
    for pieces, row, garbage in (
        (singles, 1, 0),
        (singles, 2, 3),
        ([100, 4, 4, 1, 64, TOKENS - 173], 3, 0),
        ([63, 2, 3, 2, TOKENS - 70], 0, 2),
    ):
        again, routes_again = feed(runner, tokens, pieces, row=row, garbage=garbage)
        assert (again == logits).all()
        assert (routes_again == routes).all()
    alone, _ = feed(make_runner(model, weights, threads=1, activations=activations), tokens, [TOKENS])
    assert (alone == logits).all()


@pytest.mark.parametrize("kernels", native.available_kernels())
@pytest.mark.parametrize("weights", ["int8", "int8_block", "fp8", "int4"])
def test_narrow_weights_are_the_rounded_ones(weights: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches wrong scales, grids and decoding: the same rounding done in numpy, run as bf16 weights, must agree."""
    monkeypatch.setenv(KERNELS_VARIABLE, kernels)
    config = SHAPES["odd sizes"]
    model, tokens = random_model(config), some_tokens(config)
    narrow, _ = feed(make_runner(model, weights), tokens, [TOKENS])
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim >= 2 and "embed" not in name and "mlp.gate.weight" not in name:
                for matrix in tensor if tensor.ndim == 3 else (tensor,):
                    matrix.copy_(torch.from_numpy(rounded(matrix.numpy(), weights)))
    # The rounded values need more than bf16 after scaling, so the twin computes in fp32: only activations differ.
    twin, _ = feed(make_runner(model), tokens, [TOKENS])
    exact, _ = feed(make_runner(random_model(config)), tokens, [TOKENS])
    # Rounding activations to bf16 alone costs 1e-4 to 5e-4 here, depending on the model's seed.
    assert kl(twin, narrow) < 0.02 * kl(exact, narrow) + 5e-4


def kl(expected: np.ndarray, got: np.ndarray) -> float:
    """Mean over tokens of the divergence between the distributions of two sets of logits."""
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (expected, got))
    return float((p.exp() * (p - q)).sum(-1).mean())


def rounded(matrix: np.ndarray, weights: str) -> np.ndarray:
    """A weight as its narrow format holds it."""
    out, (rows, columns) = np.zeros_like(matrix), matrix.shape
    if weights == "int8":
        scale = np.abs(matrix).max(1, keepdims=True) / 127
        return np.round(matrix / scale) * scale
    if weights == "int8_block":
        for c in range(0, columns, 32):
            most = torch.from_numpy(np.abs(matrix[:, c : c + 32]).max(1, keepdims=True))
            scale = (most / 127).bfloat16().float().numpy()
            out[:, c : c + 32] = np.clip(np.round(matrix[:, c : c + 32] / scale), -127, 127) * scale
        return out
    if weights == "fp8":
        for r in range(0, rows, 128):
            for c in range(0, columns, 128):
                block = matrix[r : r + 128, c : c + 128]
                scale = np.abs(block).max() / 448
                codes = torch.from_numpy(block / scale).to(torch.float8_e4m3fn)
                out[r : r + 128, c : c + 128] = codes.float().numpy() * scale
        return out
    for r in range(rows):
        for c in range(0, columns, 32):
            group = matrix[r, c : c + 32]
            extreme = group[np.abs(group).argmax()]
            choices = []
            for candidate in (extreme / -8, abs(extreme) / 7, extreme / -7.2):
                scale = torch.tensor(candidate).bfloat16().float().item()
                choices.append(np.clip(np.round(group / scale), -8, 7) * scale)
            out[r, c : c + 32] = min(choices, key=lambda choice: float(((choice - group) ** 2).sum()))
    return out


def test_other_sequences_in_the_step_change_no_bit() -> None:
    """Catches tokens of one sequence leaking into another, and shapes of products that depend on the batch."""
    config = SHAPES["nano"]
    model, tokens, other = random_model(config), some_tokens(config), some_tokens(config, seed=1)
    runner = make_runner(model, "bf16")
    alone, _ = feed(runner, tokens, [TOKENS], row=0)
    pages = [np.arange(row * 8, row * 8 + 8, dtype=np.int32) for row in range(3)]
    starts, together = [0, 0, 0], []
    for count in (40, 1, 1, 4, 80, TOKENS - 126):
        counts = [17 if starts[1] < 150 else 1, count, 2]
        pieces = [other[a : a + n] for a, n in zip(starts, counts, strict=True)]
        pieces[1] = tokens[starts[1] : starts[1] + count]
        out = runner.forward(
            StepInput(
                token_ids_N=np.concatenate(pieces),
                rows_S=ints(2, 1, 0),
                starts_S=ints(*starts),
                counts_S=ints(*counts),
                page_tables=tuple(pages),
                logits_M=np.arange(counts[0], counts[0] + count, dtype=np.int32),
            )
        )
        together.append(out.logits_MV)
        runner.commit(ints(2, 1, 0), ints(*counts))
        starts = [start + n for start, n in zip(starts, counts, strict=True)]
    assert (np.concatenate(together) == alone).all()


def test_heads_cost_nothing_until_drafts_are_wanted() -> None:
    """Catches hidden states kept for rows that never draft, and a row that stays tracked in its next sequence."""
    config = next(config for config in SHAPES.values() if config.num_mtp_heads)
    runner, tokens, window = make_runner(random_model(config)), some_tokens(config), np.ones((1, 2), np.int32)
    for tracked in (False, True, False):
        for start, count in ((0, 40), (40, 1)):
            runner.forward(
                StepInput(
                    token_ids_N=tokens[start : start + count],
                    rows_S=ints(1),
                    starts_S=ints(start),
                    counts_S=ints(count),
                    page_tables=(np.arange(8, dtype=np.int32),),
                    logits_M=ints(),
                )
            )
            if tracked and start == 0:
                runner.prefill_heads(ints(1), ints(0), ints(count), (tokens[1:count],))
            runner.commit(ints(1), ints(count))
        if tracked:
            assert runner.draft(ints(1), ints(41), window).shape == (1, config.num_mtp_heads)
        else:
            with pytest.raises(ValueError, match="row 1 is not tracked"):
                runner.draft(ints(1), ints(41), window)


@pytest.mark.parametrize("name", list(SHAPES))
def test_drafts_are_those_of_a_pass_over_the_whole_text(name: str) -> None:
    """Catches heads that see a wrong hidden state, token or position, share weights, or keep provisional keys."""
    config = SHAPES[name]
    model, tokens = random_model(config), some_tokens(config)
    with torch.no_grad():  # what heads attend to decides their drafts
        for parameter_name, parameter in model.named_parameters():
            if "mtp" in parameter_name and "self_attn" in parameter_name and parameter.ndim == 2:
                parameter *= 8
    runner, pages, length = make_runner(model), np.arange(8, dtype=np.int32), 0
    drafted = ((90, 90), (1, 4), (2, 4), (4, 4), (1, 1), (1, 1), (30, 30), (3, 4), (1, 4))
    # Longer without drafts than any window here, with the row stored and taken up again on the way.
    silent = ((1, 1),) * 12 + ((2, 4),) * 2 + ((30, 30),) + ((1, 1),) * 2
    steps = [(*step, True) for step in drafted] + [(*step, False) for step in silent] + [(1, 1, True), (2, 4, True)]
    for number, (kept, fed, drafts_now) in enumerate(steps):
        step = np.concatenate((tokens[length : length + kept], np.full(fed - kept, 1, np.int32)))
        runner.forward(
            StepInput(
                token_ids_N=step,
                rows_S=ints(1),
                starts_S=ints(length),
                counts_S=ints(fed),
                page_tables=(pages,),
                logits_M=ints(),
            )
        )
        if length == 0:
            runner.prefill_heads(ints(1), ints(0), ints(fed), (tokens[1:fed],))
        runner.commit(ints(1), ints(kept))
        length += kept
        if number == len(steps) - 4:
            state = runner.read_row(1)
            runner.copy_row(0, 1)
            runner.write_row(1, state)
        if not drafts_now:
            continue
        window = np.zeros((1, 2 * config.num_mtp_heads), np.int32)
        window[0, -1] = tokens[length]
        drafts = runner.draft(ints(1), ints(length), window)[0].tolist()
        text = tokens[: length + 1].tolist()
        for head, draft in enumerate(drafts):
            with torch.no_grad():
                output = model(torch.tensor([text + drafts[:head] + [0]]))
                assert draft == int(output.mtp_logits(head)[0, length - 1].argmax())


def test_rows_are_copied_read_and_written_whole() -> None:
    """Catches a ring or a hidden state that a snapshot forgets: the copy goes on as the original does."""
    config = SHAPES["nano"]
    model, tokens = random_model(config), some_tokens(config)
    runner = make_runner(model, "bf16")
    whole, _ = feed(runner, tokens, [TOKENS], row=0)
    feed(runner, tokens[:100], [100], row=0)
    runner.copy_row(0, 2)
    state = runner.read_row(0)
    feed(runner, tokens[::-1].copy(), [TOKENS], row=0)  # the original is overwritten
    runner.write_row(1, state)
    for row in (1, 2):
        feed(runner, tokens[:100], [100], row=3)
        for page in range(2):  # pages of the first 100 positions
            runner.copy_page(24 + page, 8 * row + page)
        step = StepInput(
            token_ids_N=tokens[100:],
            rows_S=ints(row),
            starts_S=ints(100),
            counts_S=ints(TOKENS - 100),
            page_tables=(np.arange(8 * row, 8 * row + 8, dtype=np.int32),),
            logits_M=np.arange(TOKENS - 100, dtype=np.int32),
        )
        assert (runner.forward(step).logits_MV == whole[100:]).all()


def test_cache_bytes_follow_the_formula() -> None:
    """Catches rings or pages larger than what they hold: window plus drafts per sliding layer and head, 64 per page."""
    config = SHAPES["nano"].replace(vocab_size=64)
    runner = make_runner(random_model(config), "bf16")
    local, whole = config.sliding_attention, config.global_attention
    assert local.window_keys is not None
    num_sliding = sum(kind is not whole and kind.value == "sliding" for kind in config.layer_kinds)
    per_token = 2 * local.num_kv_heads * (local.qk_head_dim + local.v_head_dim)
    slots = local.window_keys + config.num_mtp_heads
    assert runner.row_bytes == pytest.approx((num_sliding + config.num_mtp_heads) * slots * per_token, rel=0.02)
    per_token = 2 * whole.num_kv_heads * (whole.qk_head_dim + whole.v_head_dim)
    assert runner.page_bytes == (config.num_layers - num_sliding) * 64 * per_token


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids_N": ints(1, 5000)}, "token id 5000"),
        ({"rows_S": ints(9)}, "row 9"),
        ({"counts_S": ints(3)}, "do not add up"),
        ({"starts_S": ints(700)}, "pages, too few"),
        ({"page_tables": (ints(99),)}, "page 99"),
        ({"logits_M": ints(2)}, "wanted place 2"),
        ({"token_ids_N": np.zeros(600, np.int32), "counts_S": ints(600)}, "at most 512 tokens"),
    ],
)
def test_bad_steps_are_refused_with_a_reason(change: dict[str, object], message: str) -> None:
    """Catches sizes that C++ would trust: each would read or write outside its memory."""
    fields: dict[str, object] = {
        "token_ids_N": ints(1, 2),
        "rows_S": ints(0),
        "starts_S": ints(0),
        "counts_S": ints(2),
        "page_tables": (np.arange(10, dtype=np.int32),),
        "logits_M": ints(1),
    }
    runner = make_runner(random_model(SHAPES["nano"]), "bf16")
    with pytest.raises(RequestError, match=message):
        runner.forward(StepInput(**(fields | change)))  # type: ignore[arg-type]


def test_unknown_formats_and_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a silent fallback to another format or instruction set."""
    model = random_model(SHAPES["nano"])
    with pytest.raises(RequestError, match="int8"):
        make_runner(model, "int9")
    with pytest.raises(RequestError, match=r"activations='int4' is no format.*int8"):
        make_runner(model, "int8", activations="int4")
    with pytest.raises(RequestError, match='activations="int8" needs weights="int8" or "int8_block"'):
        make_runner(model, "fp8", activations="int8")
    monkeypatch.setenv(KERNELS_VARIABLE, "avx9")
    with pytest.raises(RequestError, match="available: scalar"):
        make_runner(model)


def test_packed_files_are_shared_checked_and_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a packed file that belongs to other weights, is damaged, or half written, being taken for good."""
    monkeypatch.setenv("OPENMIMO_CACHE", str(tmp_path / "cache"))
    config = SHAPES["nano"]
    folder = tmp_path / "model"
    tokens = some_tokens(config)
    expected = {}
    for seed in (0, 1):
        model = random_model(config, seed).to(torch.bfloat16)
        for module in model.routers():
            module.float()
        save_model(model, folder, dtype="bfloat16")
        expected[seed], _ = feed(make_runner(model, "int8"), tokens, [TOKENS])

        def packed_logits() -> np.ndarray:
            runner = NativeRunner(folder, weights="int8", num_rows=1, num_pages=8, threads=2, packed_file_bytes=0)
            return feed(runner, tokens, [TOKENS])[0]

        assert (packed_logits() == expected[seed]).all()
        (file,) = [each for each in (tmp_path / "cache").rglob("*.packed") if each.stat().st_mtime > 0]
        before = file.stat().st_ino
        assert (packed_logits() == expected[seed]).all()
        assert file.stat().st_ino == before  # taken as it is
        damaged = bytearray(file.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        file.write_bytes(damaged)
        assert (packed_logits() == expected[seed]).all()
        assert file.stat().st_ino != before  # made anew
        file.write_bytes(damaged[: len(damaged) // 3])
        assert (packed_logits() == expected[seed]).all()
        file.unlink()
    assert (expected[0] != expected[1]).any()


def test_weights_move_in_place(tmp_path: Path) -> None:
    """Catches weights that `load_weights` leaves as they were: the runner must become the other model's."""
    config = SHAPES["odd sizes"]
    tokens, first, second = some_tokens(config), random_model(config, 0), random_model(config, 1)
    runner = make_runner(first, "bf16")
    feed(runner, tokens, [TOKENS])
    runner.load_weights(second)
    moved, _ = feed(runner, tokens, [TOKENS])
    assert (moved == feed(make_runner(second, "bf16"), tokens, [TOKENS])[0]).all()
