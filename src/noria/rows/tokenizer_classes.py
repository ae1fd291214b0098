"""The classes of transformers 5 that a directory's tokenizer may be, and how each makes its pipeline.

Most take tokenizer.json as it is. Some take only its vocabulary, merges and post-processor, and rebuild the rest, or read
vocab.json and merges.txt. Of the others Noria does not have the rules. Knows no special tokens but the classes' own.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import PreTokenizer
from tokenizers.processors import PostProcessor

from noria.errors import InputError

AS_IS = "TokenizersBackend"
# What AutoTokenizer takes where the settings name no class, or another than this for a model of this type.
_OF_MODEL = {
    model_type: name
    for name, model_types in {
        AS_IS: "beam ernie4_5_moe glm4 glm4_moe glm4_moe_lite glm4v_moe granite granitemoe kimi_k25 mimo_v2_flash minimax_m2"
        " ministral3 mistral mistral3 mixtral nemotron olmo2 olmo3 phi3 phimoe stablelm",
        "CohereTokenizer": "cohere cohere2",
        "GemmaTokenizer": "gemma2 gemma3 gemma3_text",
        "GPT2Tokenizer": "gpt2 opt phi starcoder2",
        "GPTNeoXTokenizer": "gpt_neox olmoe",
        "Qwen2Tokenizer": "qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_vl qwen3_vl_moe",
    }.items()
    for model_type in model_types.split()
}
# Models whose published settings name a wrong class.
_OVERRULED = ("ernie4_5_moe", "minimax_m2", "nemotron", "phi3", "phimoe", "qwen2")
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Vocabulary = dict[str, int]
Merges = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class TokenizerClass:
    """`build` makes a pipeline of vocabulary, merges and settings, with unk_token as a text (None: tokenizer.json is one).

    `named` are the special tokens that stand for those of which the settings say nothing, `extra` the names of those that
    stand for extra_special_tokens too; `defaults` are other settings of its own.
    """

    build: Callable[[Vocabulary, Merges, Mapping[str, Any]], Backend] | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    adds_all: bool = False  # its special tokens are added anew, without any flags
    keeps_post_processor: bool = True  # of tokenizer.json


def class_of(files: Mapping[str, bytes], settings: Mapping[str, Any], config: Mapping[str, Any]) -> TokenizerClass:
    """The class that AutoTokenizer makes of these files, by tokenizer_config.json's keys and the model's config.json.

    Raises InputError for one whose rules Noria does not have.
    """
    name = _class_name(files, settings, config)
    if name.removesuffix("Tokenizer") not in _OTHERS:
        return CLASSES.get(name, CLASSES[AS_IS])
    raise InputError(
        f"tokenizer_class is {name!r}, whose rules this version of Noria does not have: set tokenizer_class to"
        ' "PreTrainedTokenizerFast" in tokenizer_config.json to take tokenizer.json as it is'
    )


def _class_name(files: Mapping[str, bytes], settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    named = settings.get("tokenizer_class")
    wanted = _plain(named or config.get("tokenizer_class"))
    usual, own_code = _OF_MODEL.get(str(model_type)), _own_code(settings)
    if own_code and model_type not in _OVERRULED:
        known = usual or _plain(named) in CLASSES or _plain(named).removesuffix("Tokenizer") in _OTHERS
        if not known:
            raise InputError(
                f"auto_map: the tokenizer has its own code ({str(own_code)[:80]}), which Noria does not run"
            )
    elif not own_code:
        if (
            wanted == "LlamaTokenizer"
            and model_type not in _OVERRULED
            and b'"ByteLevel"' in files.get("tokenizer.json", b"")
        ):
            return AS_IS  # of the kind of Llama 3, under the old name
        if wanted and usual and wanted != usual:
            if usual == AS_IS:
                return AS_IS
            return usual if model_type in _OVERRULED else wanted
    return wanted or usual or AS_IS


def _plain(name: Any) -> str:
    """A class without the word for those that are made in Rust, as all are now."""
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def _own_code(settings: Mapping[str, Any]) -> Any:
    auto_map = settings.get("auto_map")
    return auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map


def vocabulary(files: Mapping[str, bytes], tree: Mapping[str, Any]) -> tuple[Vocabulary, Merges]:
    """Those of tokenizer.json, whose tree is given, else those of vocab.json and merges.txt."""
    if "tokenizer.json" not in files:
        lines = files["merges.txt"].decode().split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return json.loads(files["vocab.json"].decode("utf-8-sig")), [(left, right) for left, right in pairs]
    model = tree["model"]
    tokens = model["vocab"]
    if isinstance(tokens, list):
        tokens = {token[0] if isinstance(token, list) else token: place for place, token in enumerate(tokens)}
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or ())
    return tokens, [(left, right) for left, right in merges]


def post_processor(content: bytes, tree: Mapping[str, Any]) -> PostProcessor | None:
    """That of a tokenizer.json, read without its vocabulary where there may be none."""
    if tree["model"].get("type") in (None, "Unigram"):
        return Backend.from_str(content.decode()).post_processor
    model = {**tree["model"], "vocab": {}} | ({"merges": []} if tree["model"]["type"] == "BPE" else {})
    return Backend.from_str(json.dumps({**tree, "model": model, "added_tokens": []})).post_processor


def _sentencepiece(model: models.Model, scheme: str, strip: bool) -> Backend:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return backend


def _llama(vocab: Vocabulary, merges: Merges, keys: Mapping[str, Any]) -> Backend:
    """`legacy` puts a space before every piece of text between special tokens, else only the first has one."""
    spaced = keys.get("add_prefix_space") is not False
    scheme = "never" if not spaced else "always" if keys.get("legacy", False) else "first"
    return _sentencepiece(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True), scheme, spaced)


def _code_llama(vocab: Vocabulary, merges: Merges, keys: Mapping[str, Any]) -> Backend:
    scheme = "never" if keys.get("add_prefix_space") is False else "first"
    model = models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=keys["unk_token"])
    return _sentencepiece(model, scheme, strip=True)


def _byte_level(vocab: Vocabulary, merges: Merges, pre_tokenizer: PreTokenizer) -> Backend:
    backend = Backend(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    return backend


def _gpt2(vocab: Vocabulary, merges: Merges, keys: Mapping[str, Any]) -> Backend:
    return _byte_level(vocab, merges, pre_tokenizers.ByteLevel(add_prefix_space=keys.get("add_prefix_space", False)))


def _gpt_neox(vocab: Vocabulary, merges: Merges, keys: Mapping[str, Any]) -> Backend:
    backend = _gpt2(vocab, merges, keys)
    backend.normalizer = normalizers.NFC()
    return backend


def _codegen(vocab: Vocabulary, merges: Merges, keys: Mapping[str, Any]) -> Backend:
    backend = _gpt2(vocab, merges, keys)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _cohere(vocab: Vocabulary, merges: Merges, keys: Mapping[str, Any]) -> Backend:
    """Each digit is a word."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=bool(keys.get("add_prefix_space")))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = _byte_level(vocab, merges, pre_tokenizers.Sequence([digits, letters]))
    backend.normalizer = normalizers.NFC()
    return backend


def _gemma(vocab: Vocabulary, merges: Merges, keys: Mapping[str, Any]) -> Backend:
    """Nothing is put before a text."""
    model = models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=keys["unk_token"])
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _qwen2(vocab: Vocabulary, merges: Merges, keys: Mapping[str, Any]) -> Backend:
    spaced = bool(keys.get("add_prefix_space"))
    words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False)
    backend = _byte_level(vocab, merges, pre_tokenizers.Sequence([words, letters]))
    backend.normalizer = normalizers.NFC()
    return backend


_END = "<|endoftext|>"
_LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_GEMMA = {
    "unk_token": "<unk>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_COHERE = {"unk_token": "<UNK>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"}
_COHERE |= {"cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>"}
_INFILLING = {"prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>", "eot_token": "▁<EOT>"}
_INFILLING |= {"fill_token": "<FILL_ME>"}
CLASSES = {
    AS_IS: TokenizerClass(),
    "CodeGenTokenizer": TokenizerClass(_codegen, {"unk_token": _END, "bos_token": _END, "eos_token": _END}),
    "CohereTokenizer": TokenizerClass(_cohere, _COHERE),
    "GemmaTokenizer": TokenizerClass(_gemma, _GEMMA),
    "LlamaTokenizer": TokenizerClass(_llama, _LLAMA),
    "CodeLlamaTokenizer": TokenizerClass(_code_llama, _LLAMA | _INFILLING, tuple(_INFILLING), {"add_bos_token": True}),
    "GPT2Tokenizer": TokenizerClass(_gpt2, {"unk_token": _END, "bos_token": _END, "eos_token": _END}),
    "Qwen2Tokenizer": TokenizerClass(_qwen2, {"unk_token": _END, "eos_token": _END, "pad_token": _END}, adds_all=True),
    "GPTNeoXTokenizer": TokenizerClass(
        _gpt_neox,
        {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": "<|padding|>"},
        keeps_post_processor=False,
    ),
}
# Classes of transformers that build pipelines of other kinds, without the word Tokenizer at their end.
_OTHERS = frozenset(
    (
        "Albert Bart Barthez Bartpho Bert BertGeneration BertJapanese Bertweet BigBird BioGpt Blenderbot "
        "BlenderbotSmall ByT5 CLIP CTRL Camembert Canine Clvp Cpm CpmAnt DPRContextEncoder "
        "DPRQuestionEncoder DPRReader Deberta DebertaV2 Dia DistilBert Esm Esmc FSMT FastSpeech2Conformer Flaubert "
        "Funnel GPTNeoXJapanese GPTSw3 Herbert LED Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke Lxmert M2M100 "
        "MBart MBart50 MLuke MPNet Marian MarkupLM Mgpstr MobileBert Mvp MyT5 Nllb Nougat OpenAIGPT PLBart Pegasus "
        "Perceiver Phobert Pop2Piano ProphetNet Qwen3_5 Rag Reformer RemBert RoCBert RoFormer Roberta SeamlessM4T "
        "Siglip Siglip2 Speech2Text SpeechT5 Splinter SqueezeBert T5 Tapas Tipsv2 Udop VideoPrism Vits Wav2Vec2CTC "
        "Wav2Vec2PhonemeCTC Whisper XGLM XLM XLMRoberta XLNet"
    ).split()
)
