"""The peers of `openmimo bench`: that they compute what they are timed for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openmimo.checkpoint.gguf import save_gguf
from openmimo.checkpoint.save import save_model
from openmimo.config.model import preset
from openmimo.errors import RequestError
from openmimo.model.model import MiMoModel, build_model

pytestmark = pytest.mark.parity

PROMPTS = [[5, 9, 200, 31, 77], [8, 8, 300, 2, 64], [40, 1, 2, 3, 900]]
STEPS = [[11, 12, 13], [500, 600, 700]]


@pytest.fixture(scope="module")
def model() -> MiMoModel:
    return build_model(preset("nano").replace(init_std=0.08), seed=3)


def last_logits(model: MiMoModel) -> torch.Tensor:
    """After the prompts and the steps, shape (3, V)."""
    texts_BT = torch.cat((torch.tensor(PROMPTS), torch.tensor(STEPS).T), dim=1)
    with torch.inference_mode():
        return model(texts_BT).logits[:, -1]


def greatest_gap(model: MiMoModel, prompt: list[int], text: tuple[int, ...]) -> float:
    """How far a token of `text` is from the most probable one, in the model's own logits after the text before it."""
    with torch.inference_mode():
        logits_TV = model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
    chosen_T = logits_TV.gather(1, torch.tensor(text)[:, None])[:, 0]
    return float((logits_TV.max(1).values - chosen_T).max())


def test_llama_cpp(model: MiMoModel, tmp_path: Path) -> None:
    """Sequences mixed up, positions that stand still, or a batch whose text is not greedy."""
    pytest.importorskip("llama_cpp")
    from openmimo.evals.llama_peer import LlamaCppPeer

    save_gguf(model, tmp_path / "m.gguf", dtype="float32")
    peer = LlamaCppPeer(tmp_path / "m.gguf", threads=1, with_mtp=True)
    assert peer.prefill(PROMPTS[0]) > 0
    peer.start(PROMPTS, room=2)
    assert "ubatch" in peer.settings
    peer.decode(STEPS)
    context = peer._context
    assert context is not None
    theirs_BV = torch.stack([torch.from_numpy(context.logits(row).copy()) for row in range(3)])
    # The cache is in float16, as in its best settings.
    error = float((theirs_BV - last_logits(model)).abs().max())
    print(f"difference {error:.1e}")
    assert error < 0.02 * last_logits(model).std()
    # Rounding may turn two tokens that are closer than the errors of both; a wrong cache is off by whole logits.
    for num_drafts in (0, 3):
        made = peer.generate(PROMPTS, 8, num_drafts=num_drafts)
        gaps = [greatest_gap(model, prompt, text) for prompt, text in zip(PROMPTS, made.token_ids, strict=True)]
        print(f"{num_drafts} drafts: gaps {gaps}")
        assert [len(text) for text in made.token_ids] == [8, 8, 8]
        assert max(gaps) <= 2 * error
    peer.close()


def test_transformers(model: MiMoModel, tmp_path: Path) -> None:
    """A cache that is thrown away between steps, or a prompt that counts twice."""
    pytest.importorskip("transformers")
    from openmimo.evals.transformers_peer import TransformersPeer

    save_model(model, tmp_path / "m", layout="native", dtype="float32")
    peer = TransformersPeer(tmp_path / "m", dtype="float32")
    assert peer.prefill(PROMPTS[0]) > 0
    peer.start(PROMPTS, room=3)
    peer.decode(STEPS[:1])
    with torch.inference_mode():
        theirs_BV = peer.model(torch.tensor(STEPS[1])[:, None], past_key_values=peer._cache).logits[:, -1]
    assert torch.allclose(theirs_BV, last_logits(model), atol=1e-4)
    with pytest.raises(RequestError, match="draft"):
        peer.generate(PROMPTS, 2, num_drafts=0)
