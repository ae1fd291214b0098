"""sentencepiece's tokenizer.model as a pipeline: what SentencePieceProcessor.encode makes of each text between special tokens.

Control pieces are special tokens, as transformers has it, which sentencepiece never finds in a text. Of a Unigram model a
text that spells a piece of a byte (`<0x41>`) becomes that byte, which the library here cannot tell apart.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.normalizers import Normalizer

from noria.checkpoint.hugging_face import Directory
from noria.checkpoint.vocabularies._made import Made, add_special, begin_and_end, numbered
from noria.checkpoint.vocabularies._pieces import BPE, CONTROL, NORMAL, SPACE, USER_DEFINED, PieceModel, read, renamed
from noria.tools.text import plural

NAMES = ("tokenizer.model",)


def has(content: bytes) -> bool:
    return content[:1] == b"\n"  # of protobuf's first field: a piece


def made(directory: Directory, name: str, settings: Mapping[str, Any]) -> Made:
    """Raises InputError for a damaged file, and for models of other kinds than BPE and Unigram."""
    where = str(directory.path / name)
    model = read(where, directory.content(name) or b"")
    given = dict(numbered(where, settings.get("added_tokens_decoder") or {}))
    model = renamed(model, {place: token.content for place, token in given.items()})
    backend = _bpe(model) if model.kind == BPE else _unigram(model)
    _add_rules(backend, model, legacy=settings.get("legacy") is not False)
    control = model.of_kind(CONTROL).items()
    add_special(where, backend, {place: AddedToken(one.text, normalized=False, special=True) for place, one in control})
    ids = {"bos_token": model.begin, "eos_token": model.end, "unk_token": model.unknown}
    named = {key: model.named(place) for key, place in ids.items()}
    settings = {**{key: text for key, text in named.items() if text is not None}, **settings}
    begin = _text(settings.get("bos_token")) if settings.get("add_bos_token") is True else None
    end = _text(settings.get("eos_token")) if settings.get("add_eos_token") is True else None
    begin_and_end(backend, begin, end)
    words = f"{plural(len(model.pieces), 'piece')} of sentencepiece ({'BPE' if model.kind == BPE else 'Unigram'})"
    return Made(backend.to_str().encode(), settings, words)


def _text(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _bpe(model: PieceModel) -> Backend:
    """Neighbours that make the piece of the highest score are joined, again and again; only normal pieces are."""
    vocabulary = {piece.text: place for place, piece in enumerate(model.pieces)}
    kept_whole = bool(model.of_kind(USER_DEFINED))  # pieces that no joining makes
    return Backend(
        models.BPE(
            vocab=vocabulary,
            merges=list(_merges(model)),
            unk_token=model.named(model.unknown),
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=kept_whole,
        )
    )


def _merges(model: PieceModel) -> Iterator[tuple[str, str]]:
    normal = model.of_kind(NORMAL)
    places = {piece.text: place for place, piece in normal.items()}
    for _, piece in sorted(normal.items(), key=lambda item: (-item[1].score, item[0])):
        whole = piece.text
        pairs = ((whole[:end], whole[end:]) for end in range(1, len(whole)))
        found = [pair for pair in pairs if pair[0] in places and pair[1] in places]
        yield from sorted(found, key=lambda pair: (places[pair[0]], places[pair[1]]))


def _unigram(model: PieceModel) -> Backend:
    scores = [(piece.text, piece.score) for piece in model.pieces]
    return Backend(models.Unigram(scores, unk_id=model.unknown, byte_fallback=model.byte_fallback))


def _add_rules(backend: Backend, model: PieceModel, legacy: bool) -> None:
    """How text becomes what is cut into pieces, and back.

    legacy: the space that is put before a text is put before each between special tokens, else before the first alone.
    """
    steps: list[Normalizer] = [normalizers.Replace(" ", SPACE)]
    if model.spaces_removed:  # at the end also what is spelled as a piece spells them
        first = [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        steps = [*first, *steps, normalizers.Replace(Regex(f"{SPACE}+\\z"), "")]
    backend.normalizer = normalizers.Sequence(
        [*steps, normalizers.Prepend(SPACE)] if model.prefix and legacy else steps
    )
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if model.prefix and not legacy:
        cuts.append(pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False))
    if own := sorted((piece.text for piece in model.of_kind(USER_DEFINED).values()), key=len, reverse=True):
        cuts.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, own))), "isolated"))
    if cuts:
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if model.prefix else back)
