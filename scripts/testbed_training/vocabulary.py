"""The tokenizer: a fixed list of words, digits one by one, letters and bytes for all the rest."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vllm_kvpress.testbed.language import split_tokens, vocabulary

__all__ = ["CHAT_TEMPLATE", "END", "PAD", "START", "encode", "token_ids", "write_tokenizer"]

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
PAD, START, END, UNKNOWN = range(4)
_SPACE = "▁"
_SIGNS = "0123456789.,?:;=!'\"()-/abcdefghijklmnopqrstuvwxyz"
# Unigram prefers the best sum: a word of the list, then letters, and bytes for what is left.
_WORD_SCORE, _SPACE_SCORE, _SIGN_SCORE, _BYTE_SCORE = -4.0, -5.0, -12.0, -30.0

# A message stands after a space, so that its first word is a word and not letters.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ' ' + (m['content'] | trim) }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% elif m['role'] == 'user' %}{{ ' answer:' }}{% endif %}{% endfor %}"
)


def _scored_tokens() -> list[tuple[str, float]]:
    specials = [(token, 0.0) for token in SPECIALS]
    byte_tokens = [(f"<0x{byte:02X}>", _BYTE_SCORE) for byte in range(256)]
    signs = [(sign, _SIGN_SCORE) for sign in _SIGNS]
    words = [(_SPACE + word, _WORD_SCORE) for word in vocabulary()]
    return [*specials, *byte_tokens, (_SPACE, _SPACE_SCORE), *signs, *words]


def token_ids() -> dict[str, int]:
    """Return the id of every token."""
    return {token: index for index, (token, _) in enumerate(_scored_tokens())}


def encode(text: str, ids: dict[str, int]) -> list[int]:
    """Return the ids of a text of the testbed's language, as the tokenizer does, but no specials.

    Args:
        text: Whole sentences; the first word counts as one that stands after a space.
        ids: What `token_ids` returns.
    """
    return [ids[_name(piece)] for piece in split_tokens(text)]


def _name(piece: str) -> str:
    bare = piece.strip()
    return _SPACE + bare if not bare or bare.isalpha() else bare


def build_tokenizer() -> Tokenizer:
    """Return the tokenizer as `tokenizers` has it."""
    tokenizer = Tokenizer(models.Unigram(_scored_tokens(), unk_id=UNKNOWN, byte_fallback=True))
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Pattern(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split(Pattern(r"[^\p{L}\p{N}\u2581]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", START)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    return tokenizer


def write_tokenizer(folder: Path, max_positions: int) -> None:
    """Write the tokenizer's files, which transformers and vLLM load without further code."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "backend": "tokenizers",
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": max_positions,
        "pad_token": "<pad>",
        "padding_side": "left",
        # The name that every release knows; release 5 alone would write its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
