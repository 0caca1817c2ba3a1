"""How the built-in text tower reads a sentence: at its end token, or as the mean of all states up to it."""

import pytest
import torch

from clipkit.models import EncoderConfig, build_model
from clipkit.models.builtin import TextTransformer

TEXTS = ["a", "two dogs on a long road", "nobody", "the sun and the moon and the stars", "red", "a b c"]


def text_tower(pooling: str, **options: object) -> tuple[TextTransformer, torch.Tensor]:
    """A tower with fixed weights, and the untrimmed ids of the texts."""
    tower = {"name": "transformer", "width": 16, "layers": 2, "heads": 2, "pooling": pooling, **options}
    tokenizer = {"name": "clip", "context_length": 16}
    encoder = build_model(EncoderConfig(modality="text", tower=tower, tokenizer=tokenizer), seed=0).eval()
    assert isinstance(encoder.tower, TextTransformer)
    assert encoder.tokenizer is not None
    return encoder.tower, encoder.tokenizer.encode(TEXTS)


@pytest.mark.parametrize("pooling", ["end", "mean"])
@torch.no_grad()
def test_the_features_are_the_state_at_the_end_or_the_mean_up_to_it(pooling: str) -> None:
    tower, ids_NL = text_tower(pooling)
    for row_L, found_D in zip(ids_NL, tower(ids_NL), strict=True):
        length = row_L.tolist().index(tower.eos_id) + 1
        x_1LD = tower.token_embedding(row_L[None, :length]) + tower.position_embedding[:length]
        for block in tower.blocks:
            x_1LD = block(x_1LD)
        states_LD = tower.norm(x_1LD)[0]
        expected_D = states_LD.mean(dim=0) if pooling == "mean" else states_LD[-1]
        torch.testing.assert_close(found_D, expected_D)


@pytest.mark.parametrize("pooling", ["end", "mean"])
@torch.no_grad()
def test_padding_and_the_other_sentences_change_nothing(pooling: str) -> None:
    tower, ids_NL = text_tower(pooling)
    alone_ND = torch.cat([tower(row_L[None, : row_L.tolist().index(tower.eos_id) + 1]) for row_L in ids_NL])
    torch.testing.assert_close(tower(ids_NL), alone_ND)


def test_the_way_of_pooling_changes_no_weights_and_is_the_end_by_default() -> None:
    towers = [text_tower(pooling)[0] for pooling in ("end", "mean")]
    first, second = (tower.state_dict() for tower in towers)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    config = EncoderConfig(modality="text", tower={"name": "transformer"})
    assert build_model(config, seed=0).config.tower["pooling"] == "end"
