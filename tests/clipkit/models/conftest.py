"""Small tokenizers in transformers' real formats: CLIP's vocabulary and merges, SigLIP's unigram pieces."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def clip_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's byte-pair encoding with letters, a few merges and the two special tokens."""
    folder = tmp_path_factory.mktemp("clip_tokenizer")
    letters = list("abcdefghijklmnopqrstuvwxyz!")
    merges = [("a", "t</w>"), ("c", "at</w>"), ("d", "o"), ("do", "g"), ("o", "f</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A unigram tokenizer in SigLIP's manner: lower case, no start token, end token also used as padding."""
    folder = tmp_path_factory.mktemp("siglip_tokenizer")
    letters = list("abcdefghijklmnopqrstuvwxyz!")
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁cat", -3.0), ("▁a", -2.5)]
    backend = Tokenizer(models.Unigram([*pieces, *((letter, -4.0) for letter in letters)], unk_id=0))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        model_input_names=["input_ids"],
    )
    tokenizer.save_pretrained(folder)
    return folder
