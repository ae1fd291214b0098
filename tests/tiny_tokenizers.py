"""Tiny tokenizers of every kind that published models have, trained here on a few lines."""

import json

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

CORPUS = [
    "In the beginning God created the heaven and the earth.",
    "the cat sat on the mat, and the dog sat on the log; it isn't 1234 or 5678!",
    "Größe, naïve café: 東京 и Москва 🎉",
    "    return x if x else y\n\n\tdef f(x):",
] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


def bos_first(backend: Backend) -> Backend:
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", bos)])
    return backend


def _sentencepiece() -> Backend:
    """BPE with byte fallback, its characters few, so that others become bytes; nothing said of spaces yet."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL + BYTES, show_progress=False, limit_alphabet=40
    )
    backend.train_from_iterator(CORPUS, trainer)
    tree = json.loads(backend.to_str())
    # The bytes are plain words of the vocabulary in real files, not special tokens.
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in BYTES]
    backend = Backend.from_str(json.dumps(tree))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return bos_first(backend)


def llama_legacy() -> Backend:
    """Llama 1, and Llama 2 as it was published: a normalizer puts the space before the text."""
    backend = _sentencepiece()
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def llama() -> Backend:
    """Llama 2 without `legacy`, Mistral: only the first word has a space put before it."""
    return _sentencepiece()


def llama_no_prefix() -> Backend:
    """With add_prefix_space off: nothing is put before the text, nothing is taken from it."""
    backend = _sentencepiece()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _byte_level(pre_tokenizer, specials=SPECIAL) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def gpt2() -> Backend:
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3() -> Backend:
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return bos_first(_byte_level(pre_tokenizers.Sequence(steps)))


def qwen2() -> Backend:
    split = pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated")
    steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    backend = _byte_level(pre_tokenizers.Sequence(steps))
    backend.normalizer = normalizers.NFC()
    return backend


def unigram() -> Backend:
    """T5's: a space before every piece of text between special tokens."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, shrinking_factor=0.5
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    end = backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", end)])
    return backend


def wordpiece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return bos_first(backend)


KINDS = {
    "llama, legacy": llama_legacy,
    "llama": llama,
    "llama without a prefix space": llama_no_prefix,
    "gpt2": gpt2,
    "llama3": llama3,
    "qwen2": qwen2,
    "unigram": unigram,
    "wordpiece": wordpiece,
}
SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}


def files_of(backend: Backend, **settings) -> dict[str, bytes]:
    """The files of a directory with this tokenizer."""
    tree = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(SETTINGS | settings)}
    return {name: text.encode() for name, text in tree.items()}
