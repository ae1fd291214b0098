"""Makes tokenizers.json with the libraries of those who publish such tokenizers:

    pip install tiktoken==0.14.0 sentencepiece==0.2.3 mistral-common==1.13.1 && python make.py

Of each case the file of its tokenizer (trained here on a few lines), the settings beside it, and for each of `texts` the token ids
that the maker's own library gives it, and what it decodes these to. null: a text that the library reads otherwise than a
tokenizer.json, because it has special tokens, which it never finds in a text.
"""

import base64
import io
import json
import random
import tempfile
import unicodedata
from pathlib import Path

import sentencepiece
import tiktoken
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tiktoken._educational import bpe_train

HERE = Path(__file__).parent
CORPUS = [
    "In the beginning God created the heaven and the earth.",
    "the cat sat on the mat, and the dog sat on the log; it isn't 1234 or 5678!",
    "Größe, naïve café: 東京 и Москва 🎉",
    "你好世界。今天天气很好。中文abc混合文字",
    "    return x if x else y\n\n\tdef f(x):\n        return x ** 2",
    "DON'T WE'LL I've SHOUTED NiceCamelCase snake_case",
] * 20
# Between bars: spaces count.
PARTS = (
    "the| cat|Dog| 東京|中|文字|好abc|abc好|12| 4567|é|e\u0301|🎉|👩\u200d👧| |  |\n|\n\n|\r\n|\t|'s|'LL|?!|--|▁|<s>|</s>|<#im_end#>"
    "|[INST]|Москва|한국|कि|İ|_|</|0x|\u0301|\u3007|々|ﬁ|㎏|\u3000|\u00a0|<0x41>|<sep>|x ** 2|\0"
)
WHOLE = [
    "",
    " ",
    "   a",
    "a   ",
    "a" * 40,
    " " * 40,
    "-=" * 20,
    "1234567890",
    "٣٤٥ Ⅷ ½",
    "ǅ ǲ",
    "العربية עברית",
    "\n" * 9,
    "the " * 9,
]
KIMI = [
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    *(r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
]
LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{LETTERS[0]}*{LETTERS[1]}+|[^\r\n\p{{L}}\p{{N}}]?{LETTERS[0]}+{LETTERS[1]}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_texts(number):
    draw = random.Random(0)
    texts, parts = list(WHOLE), [part.replace("#", "|") for part in PARTS.split("|")]
    while len(texts) < number:
        if draw.random() < 0.8:
            texts.append("".join(draw.choices(parts, k=draw.randint(1, 7))))
        else:
            codes = [draw.randrange(0x20, 0x3000) for _ in range(5)] + [draw.randrange(0x10000, 0x20000)]
            texts.append("".join(chr(code) for code in codes if unicodedata.category(chr(code)) not in ("Cn", "Co")))
    return texts


def ranks_of(pattern, count):
    """Trained by tiktoken's own teaching code, which knows no possessive patterns and no intersections of sets."""
    plain = r"\p{Han}+|[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+" if "&&" in pattern else pattern
    return bpe_train("\n".join(CORPUS[:6]), count, plain)


def kimi(texts):
    pattern = "|".join(KIMI)
    ranks = ranks_of(pattern, 380)
    special = {"[BOS]": 380, "[EOS]": 381, "<|im_end|>": 382, "<think>": 383, "[PAD]": 390}
    decoder = {str(place): {"content": text, "special": text != "<think>"} for text, place in special.items()}
    reserved = {f"<|reserved_token_{place}|>": place for place in range(384, 390)}
    encoding = tiktoken.Encoding("kimi", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special | reserved)
    settings = {
        "added_tokens_decoder": decoder,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
    }
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    ids = [encoding.encode(text, allowed_special="all") for text in texts]
    return case("tiktoken.model", lines, settings, ids, list(map(encoding.decode, ids)))


def tekken(texts, special):
    ranks = ranks_of(TEKKEN, 390)
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    config = {
        "pattern": TEKKEN,
        "num_vocab_tokens": 390,
        "default_vocab_size": 430,
        "default_num_special_tokens": 50,
        "version": "v13" if special else "v3",
    }
    tree = {"config": config, "vocab": vocab}
    if special:
        tree |= {
            "version": 1,
            "type": "Tekken",
            "special_tokens": [
                {"rank": place, "token_str": text, "is_control": True} for place, text in enumerate(special)
            ],
        }
    content = json.dumps(tree).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tekken.json"
        path.write_bytes(content)
        read = Tekkenizer.from_file(path)
    known = list(read._special_tokens_reverse_vocab)
    ids = [None if any(one in text for one in known) else read.encode(text, bos=True, eos=False) for text in texts]
    return case("tekken.json", content, {}, ids, [None if one is None else read.decode(one) for one in ids])


def pieces(texts, **settings):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, minloglevel=2, hard_vocab_limit=False, **settings
    )
    read = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    known = [read.id_to_piece(place) for place in range(len(read)) if read.is_control(place) or read.is_unknown(place)]
    ids = [None if any(one in text for one in known) else read.encode(text) for text in texts]
    return case(
        "tokenizer.model", written.getvalue(), {}, ids, [None if one is None else read.decode(one) for one in ids]
    )


def case(name, content, settings, ids, decoded):
    return {
        "name": name,
        "content": base64.b64encode(content).decode(),
        "settings": settings,
        "ids": ids,
        "decoded": decoded,
    }


def main():
    texts = make_texts(130)
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    own = ["\n\n", "  ", "<sep>", "x ** 2"]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[THINK]", "[/THINK]", "<pad>"]
    cases = {
        "Kimi": kimi(texts),
        "tekken, special tokens left out": tekken(texts, None),
        "tekken": tekken(texts, special),
        "Llama": pieces(
            texts,
            model_type="bpe",
            vocab_size=480,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.98,
            **plain,
        ),
        "Gemma": pieces(
            texts,
            model_type="bpe",
            vocab_size=480,
            byte_fallback=True,
            add_dummy_prefix=False,
            user_defined_symbols=own,
            character_coverage=0.98,
            **plain,
        ),
        "BPE, spaces removed": pieces(
            texts, model_type="bpe", vocab_size=220, user_defined_symbols=["<sep>"], normalization_rule_name="identity"
        ),
        "Unigram": pieces(
            texts, model_type="unigram", vocab_size=480, byte_fallback=True, character_coverage=0.98, **plain
        ),
        "Unigram, spaces removed": pieces(
            texts, model_type="unigram", vocab_size=220, normalization_rule_name="identity"
        ),
    }
    (HERE / "tokenizers.json").write_text(
        json.dumps({"texts": texts, "cases": cases}, ensure_ascii=True, separators=(",", ":"))
    )


if __name__ == "__main__":
    main()
