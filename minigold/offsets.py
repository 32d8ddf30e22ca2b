# SPDX-License-Identifier: Apache-2.0
"""Token ids or text in, the bytes of the text that each token stands for out.

Where it stands: first in the flow; everything that compares two tokenizers starts here. What
enters: a `tokenizers.Tokenizer` and sampled ids (the student) or a text (the teacher). What leaves:
spans, int64 `[n, 3]`: start and end of each token in bytes of the text's UTF-8, half-open, and a
flaw code; or a whole `Vocabulary` as plain data. What it does not do: chat templates, BOS, prompts
(the text is the continuation of something), probabilities. The caller's tokenizer is never changed.
"""

import json
import re
import secrets
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

__all__ = [
    "BROKEN", "CHANGED", "CUT", "EXACT", "FLAWS", "LOST", "SPECIAL", "UNKNOWN", "Vocabulary",
    "encode_continuation", "first_pieces", "spans_of_ids", "spans_of_text", "text_of_ids",
    "vocabulary",
]  # fmt: skip

Int64 = NDArray[np.int64]

EXACT, BROKEN, SPECIAL, UNKNOWN, LOST, CHANGED, CUT = range(7)
FLAWS = (
    "exact", "broken bytes", "special token", "unknown token", "lost bytes", "changed text", "cut",
)  # fmt: skip

_SPACE = 0x20
_HIDDEN = secrets.token_hex(32)  # names of special tokens begin with it, and no text has it
_BATCH = 16384  # strings encoded at a time: bounds the memory of their encodings
_WINDOW = 512  # bytes decoded at a time: an error holds a copy of all that it was given
_SUPPORTED = ("ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece")


@dataclass(frozen=True)
class Vocabulary:
    """What each token id stands for, as plain data; the index is the id.

    `token_bytes[i]`: the bytes id i stands for in running text, b"" if it stands for no text.
    `roles[i]`: "text", "special", "unknown" (the unknown token), "end" (ends a turn) or "none" (no
    such token). `first_pieces`: for byte strings of another vocabulary, and for what is left of them
    after such a piece, the token (as bytes) that this tokenizer starts them with.
    """

    token_bytes: tuple[bytes, ...]
    roles: tuple[str, ...]
    first_pieces: Mapping[bytes, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class _Table:
    """A tokenizer prepared once: what each id stands for, and a copy that encodes continuations."""

    token_bytes: tuple[bytes, ...]
    roles: tuple[str, ...]
    lengths: Int64
    flaws: Int64
    unknown_decoder: str  # the step that leaves the bytes of an id in running text open, or ""
    implied_space: bool  # WordPiece: a word's leading space is implied, not read from the text
    next_id: int  # of the next token that is added
    added: frozenset[int]
    forgetful: bool  # of characters that its normalizer deletes at the start, see `_remembered`
    encoder: Tokenizer
    lossy: bool  # pieces without a token vanish, and offsets after one are off inside its word
    missing: NDArray[np.bool_]  # [256], bytes that have no token


def vocabulary(
    tokenizer: Tokenizer, *, end_ids: Sequence[int] = (), size: int | None = None
) -> Vocabulary:
    """The bytes and the role of every id; `first_pieces` stay empty.

    With a decoder that is not supported, an id's bytes are what it decodes to when it stands alone.

    Args:
        tokenizer: of any family.
        end_ids: ids that end a turn; they get the role "end" and stand for no text.
        size: number of ids (rows of the model); default: those of the tokenizer. Larger: the rest
            has the role "none".

    Raises:
        ValueError: an end id outside `0 .. size - 1`, a size below 1.
    """
    table = _table(tokenizer)
    size = len(table.roles) if size is None else size
    if size < 1:
        raise ValueError(f"size: expected at least 1 id, got {size}; give the model's rows")
    holes = max(size - len(table.roles), 0)
    token_bytes = list(table.token_bytes[:size]) + [b""] * holes
    roles = list(table.roles[:size]) + ["none"] * holes
    for end_id in end_ids:
        if not 0 <= end_id < size:
            raise ValueError(
                f"end_ids: expected ids in 0..{size - 1}, got {end_id}; give the end-of-turn ids "
                "that the model has a row for"
            )
        token_bytes[end_id], roles[end_id] = b"", "end"
    return Vocabulary(tuple(token_bytes), tuple(roles))


def first_pieces(tokenizer: Tokenizer, strings: Iterable[bytes]) -> dict[bytes, bytes]:
    """The first token, as bytes, that the tokenizer gives for each string as a continuation.

    Left out: strings that are not UTF-8 on their own, and those whose first token is no exact
    beginning of the string (unknown, special, normalized to something else).
    """
    table = _table(tokenizer)
    texts = {s: text for s in strings if (text := s.decode("utf-8", "ignore")).encode() == s}
    pieces: dict[bytes, bytes] = {}
    keys = list(texts)
    for at in range(0, len(keys), _BATCH):
        batch = keys[at : at + _BATCH]
        encodings = _encoded(table, [texts[key] for key in batch])
        for key, encoding in zip(batch, encodings, strict=True):
            piece = table.token_bytes[encoding.ids[0]] if encoding.ids else b""
            if piece and key.startswith(piece):
                pieces[key] = piece
    return pieces


def text_of_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text that ids stand for, mid-text: no BOS, no special tokens, bad UTF-8 as U+FFFD.

    Raises:
        ValueError: as `spans_of_ids`.
    """
    table = _table(tokenizer)
    return _joined(table, _checked_ids(table, ids)).decode("utf-8", errors="replace")


def spans_of_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> Int64:
    """Spans `[S, 3]` of sampled ids in the UTF-8 bytes of `text_of_ids(tokenizer, ids)`.

    Each token has its own bytes, however the text would be encoded again. Tokens with bytes in one
    sequence that UTF-8 decoding replaces share the three bytes of its U+FFFD and are BROKEN.
    Special and unknown tokens are zero-width.

    Raises:
        ValueError: ids that are no whole numbers or that the tokenizer does not have; a tokenizer
            whose decoder is not supported, so that the bytes of its ids are not known.
    """
    table = _table(tokenizer)
    ids_S = _checked_ids(table, ids)
    end = np.cumsum(table.lengths[ids_S])
    start, flaw = end - table.lengths[ids_S], table.flaws[ids_S]
    broken = _replaced(_joined(table, ids_S))
    if len(broken):
        touched = (start < end) & (_count(broken[:, 0], end, "left") > _count(broken[:, 1], start))
        start, end = _in_text(broken, start, up=False), _in_text(broken, end, up=touched)
        flaw = np.where(touched, BROKEN, flaw)
    return np.stack((start, end, flaw), axis=1)


def encode_continuation(tokenizer: Tokenizer, text: str) -> tuple[list[int], Int64]:
    """Ids of a text as the continuation of other text, and their spans `[T, 3]` in its UTF-8.

    No BOS and no dummy space before it; what looks like a special token stays text. Where the
    tokens' bytes are the text's, spans are exact, also inside a character. Tokens of one place in
    the text that a normalizer changed share its range and are CHANGED. Text without a token is a
    gap between spans; a token that reaches over one is LOST.

    Raises:
        TypeError: a text that is no str.
        ValueError: a text with lone surrogates, or a tokenizer that cannot encode a continuation.
    """
    table, data = _table(tokenizer), _utf8(text)
    if not table.forgetful:
        return _encoded_with_spans(table, text, data)
    ids: list[int] = []
    spans, at = [], _bytes_before(text)
    for start, stop in _remembered(table, text):
        part_ids, part = _encoded_with_spans(table, text[start:stop], data[at[start] : at[stop]])
        ids += part_ids
        spans.append(part + np.array([at[start], at[start], 0]))
    return ids, np.concatenate(spans)


def spans_of_text(tokenizer: Tokenizer, text: str) -> Int64:
    """The spans `[T, 3]` of `encode_continuation` alone."""
    return encode_continuation(tokenizer, text)[1]


# -- from ids ------------------------------------------------------------------------------------


def _checked_ids(table: _Table, ids: Sequence[int]) -> Int64:
    if table.unknown_decoder:
        raise ValueError(
            f"decoder: expected one made of {', '.join(_SUPPORTED)} (Replace of a string, Strip of "
            f"one leading space), got {table.unknown_decoder}; what a sampled id stands for is not "
            "known, so this tokenizer can read text (a teacher) but not write it (a student)"
        )
    given = np.asarray(ids)
    if given.size == 0:
        return np.zeros(0, dtype=np.int64)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ValueError(
            f"ids: expected a flat list of integers, got {given.dtype} of shape {given.shape}; "
            "give one row of token ids"
        )
    if given.min() < 0 or given.max() >= len(table.roles):
        raise ValueError(
            f"ids: expected ids in 0..{len(table.roles) - 1}, got {int(given.min())} to "
            f"{int(given.max())}; is this the tokenizer of the model that made them?"
        )
    return given.astype(np.int64)


def _joined(table: _Table, ids: Int64) -> bytes:
    return b"".join([table.token_bytes[i] for i in ids.tolist()])


def _replaced(data: bytes) -> Int64:
    """Byte ranges `[n, 2]` of data that `decode(errors="replace")` turns into one U+FFFD each."""
    ranges, at = [], 0
    while at < len(data):
        window = data[at : at + _WINDOW]
        try:
            window.decode("utf-8")
            at += len(window)
        except UnicodeDecodeError as error:
            if error.start > 0 and error.end == len(window) == _WINDOW:  # perhaps cut by the window
                at += error.start
                continue
            ranges.append((at + error.start, at + error.end))
            at += error.end
    return np.array(ranges, dtype=np.int64).reshape(-1, 2)


def _count(sorted_values: Int64, values: Int64, side: Any = "right") -> Int64:
    """How many of the sorted values are <= (side "right") or < (side "left") each value."""
    return np.searchsorted(sorted_values, values, side=side)


def _in_text(broken: Int64, at: Int64, *, up: NDArray[np.bool_] | bool) -> Int64:
    """Byte offsets of raw bytes as offsets in the decoded text.

    An offset inside a replaced range goes to the start of its U+FFFD, or to the end where `up`.
    """
    shift = np.concatenate(([0], np.cumsum(3 - (broken[:, 1] - broken[:, 0]))))
    passed = _count(broken[:, 1], at)
    inside = _count(broken[:, 0], at, "left") > passed
    range_start = broken[np.minimum(passed, len(broken) - 1), 0]
    text_at = np.where(inside, range_start, at) + shift[passed]
    return np.asarray(text_at + np.where(inside & up, 3, 0), dtype=np.int64)


# -- from text -----------------------------------------------------------------------------------


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(
            f"text: expected str, got {type(text).__name__}; decode bytes as UTF-8 first"
        )
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: expected text that UTF-8 can write, got a lone surrogate at character "
            f"{error.start}; decode its source with errors='replace'"
        ) from error


def _encoded(table: _Table, texts: list[str]) -> list[Encoding]:
    try:
        return table.encoder.encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ValueError(
            f"tokenizer: expected one that encodes any text, got {error}; repair its unknown token"
        ) from error


def _encoded_with_spans(table: _Table, text: str, data: bytes) -> tuple[list[int], Int64]:
    """Ids and spans of a text with these bytes, by the offsets of `tokenizers`."""
    (encoding,) = _encoded(table, [text])
    pieces = [table.token_bytes[i] for i in encoding.ids]
    flaws = table.flaws[np.asarray(encoding.ids, dtype=np.int64)]
    whole = None if flaws.any() else _fit(pieces, data, 0, len(data), table.missing)
    if whole is not None:
        return encoding.ids, whole
    spans, reached = np.zeros((len(flaws), 3), dtype=np.int64), 0
    for i, j, first, *ends in _groups(encoding, text, table.lossy):
        start, own = _read_space(table, pieces[i:j], data, first, reached)
        spans[i:j], reached = _spans_of_group(table, own, flaws[i:j], data, start, ends), ends[-1]
    return encoding.ids, spans


def _remembered(table: _Table, text: str) -> list[tuple[int, int]]:
    """The parts of a text (in characters) between what its normalizer deletes at their starts.

    In `tokenizers` a Precompiled normalizer (T5, XLM-R) deletes characters, and where they begin the
    text, or what follows an added token, later offsets do not count them. White space is no such
    character, since what becomes of it depends on what follows.
    """
    (encoding,), normalize = _encoded(table, [text]), table.encoder.normalizer.normalize_str
    is_added = (i in table.added for i in encoding.ids)
    begins = [0, *(end for (_, end), yes in zip(encoding.offsets, is_added, strict=True) if yes)]
    cuts = []
    for begin in begins:
        at = begin
        while at < len(text) and not (normalize(text[at]) or _is_space(text[at])):
            at += 1
        if at > begin or begin == 0:
            cuts.append((begin, at))
    stops = [*(begin for begin, _ in cuts[1:]), len(text)]
    return [(at, stop) for (_, at), stop in zip(cuts, stops, strict=True)]


def _is_space(character: str) -> bool:
    """Unicode's white space; Python counts four separators of ASCII as well."""
    return character.isspace() and not "\x1c" <= character <= "\x1f"


def _spans_of_group(
    table: _Table, pieces: list[bytes], flaws: Int64, data: bytes, start: int, ends: list[int]
) -> Int64:
    """Exact spans up to the first of the ends that fits, else one span that all tokens share."""
    if len(pieces) == 1 and pieces[0] == data[start : ends[0]] != b"":  # most are, and it is fast
        return np.array([[start, ends[0], EXACT]])
    tries = [] if flaws.any() else ends
    fits = (_fit(pieces, data, start, end, table.missing) for end in tries)
    fit = next((fit for fit in fits if fit is not None), None)
    if fit is not None:
        return fit
    shared = np.full((len(pieces), 2), (start, ends[-1]))
    return np.column_stack((shared, np.where(flaws == EXACT, CHANGED, flaws)))


def _fit(
    pieces: Sequence[bytes], data: bytes, start: int, end: int, missing: NDArray[np.bool_]
) -> Int64 | None:
    """Exact spans if the pieces spell `data[start:end]` without its missing bytes, else None."""
    if not all(pieces):
        return None
    joined, given = b"".join(pieces), data[start:end]
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    ends = np.cumsum(lengths)
    if joined == given:
        return np.stack((ends - lengths + start, ends + start, np.zeros_like(ends)), axis=1)
    bytes_given = np.frombuffer(given, dtype=np.uint8)
    kept = np.flatnonzero(~missing[bytes_given])
    if bytes_given[kept].tobytes() != joined:
        return None
    first, last = kept[ends - lengths] + start, kept[ends - 1] + start + 1
    return np.stack((first, last, np.where(last - first > lengths, LOST, EXACT)), axis=1)


def _groups(encoding: Encoding, text: str, lossy: bool) -> list[tuple[int, ...]]:
    """Token ranges that do not overlap in the text, with their bytes: (i, j, start, end, ...).

    Marks that a normalizer drew into the letter before them, whose range leaves them out, are put
    back. A lossy tokenizer's offsets are trusted only where a word starts: a word may end where
    they say, or as late as where the next one starts.
    """
    if not encoding.ids:
        return []
    starts, ends = np.minimum(np.asarray(encoding.offsets, dtype=np.int64).T, len(text))
    if lossy:
        words = np.asarray([-1 if w is None else w for w in encoding.word_ids])
        cut = np.flatnonzero(words[1:] != words[:-1]) + 1
    else:
        following = np.minimum.accumulate(starts[::-1])[::-1]
        cut = np.flatnonzero(np.maximum.accumulate(ends)[:-1] <= following[1:]) + 1
    first = np.concatenate(([0], cut))
    group_start = np.minimum.reduceat(starts, first)
    limit = np.append(group_start[1:], len(text))
    group_end = np.maximum.reduceat(ends, first)
    group_ends = [group_end, limit] if lossy else [_with_marks(text, group_end, limit)]
    at = _bytes_before(text)
    columns = [
        first,
        np.append(cut, len(starts)),
        at[group_start],
        *(at[end] for end in group_ends),
    ]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _with_marks(text: str, ends: Int64, limits: Int64) -> Int64:
    """Each end moved over the combining characters between it and its limit (in characters)."""
    moved = ends.copy()
    for k in np.flatnonzero(ends < limits).tolist():
        while moved[k] < limits[k] and _combines(text[moved[k]]):
            moved[k] += 1
    return moved


def _combines(character: str) -> bool:
    """Whether normalizers may draw it into the one before: marks, Hangul jamo, half-width kana."""
    jamo_or_kana = "\u1160" <= character <= "\u11ff" or character in "\uff9e\uff9f"
    return jamo_or_kana or unicodedata.category(character).startswith("M")


def _bytes_before(text: str) -> Int64:
    """Bytes of UTF-8 before each character and at the end, `[characters + 1]`."""
    code = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    return np.concatenate(([0], np.cumsum(sizes)))


def _read_space(
    table: _Table, pieces: list[bytes], data: bytes, start: int, reached: int
) -> tuple[int, list[bytes]]:
    """A word's implied space as the text has it: in its span, or not in its bytes either."""
    if not (table.implied_space and pieces[0][:1] in (b" ", b"")):  # b"": an unknown word
        return start, pieces
    if start > reached and data[start - 1] == _SPACE:
        return start - 1, pieces
    return start, [pieces[0][1:], *pieces[1:]]


# -- a tokenizer, prepared once ------------------------------------------------------------------


def _table(tokenizer: Tokenizer) -> _Table:
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"tokenizer: expected a tokenizers.Tokenizer, got {type(tokenizer).__name__}; of a "
            "transformers tokenizer give .backend_tokenizer"
        )
    table = _table_of(tokenizer)
    if tokenizer.id_to_token(table.next_id) is not None:  # tokens were added since
        _table_of.cache_clear()
        table = _table_of(tokenizer)
    return table


@lru_cache(maxsize=16)
def _table_of(tokenizer: Tokenizer) -> _Table:
    """The table of a tokenizer, made once: of later changes only new tokens are seen."""
    config = json.loads(tokenizer.to_str())
    steps, unknown_decoder = _decoder_steps(config["decoder"])
    kinds = [step["type"] for step in steps]
    _normalize_added(tokenizer, config)
    added = {token["id"]: token["content"] for token in config["added_tokens"]}
    pieces = {i: piece for piece, i in tokenizer.get_vocab(with_added_tokens=True).items()} | added
    n_ids = max(pieces, default=-1) + 1
    roles = _roles(tokenizer, config, pieces, n_ids)
    suffix = config["model"].get("end_of_word_suffix") or ""
    if unknown_decoder:
        alone = tokenizer.decode_batch([[i] for i in range(n_ids)], skip_special_tokens=False)
        spelled = [text.encode("utf-8") for text in alone]
    else:
        literal = added if "ByteLevel" in kinds else {}  # not written in the byte-level alphabet
        spelled = [
            literal[i].encode("utf-8")
            if i in literal
            else _spell(pieces.get(i, "").removesuffix(suffix), steps)
            for i in range(n_ids)
        ]
    spelled = [x if role == "text" else b"" for x, role in zip(spelled, roles, strict=True)]
    codes = {"text": EXACT, "special": SPECIAL, "unknown": UNKNOWN, "none": UNKNOWN}
    lossy, missing = _without_token(config["model"], byte_level="ByteLevel" in kinds)
    return _Table(
        token_bytes=tuple(spelled),
        roles=tuple(roles),
        lengths=np.fromiter(map(len, spelled), np.int64, n_ids),
        flaws=np.fromiter((codes[role] for role in roles), np.int64, n_ids),
        unknown_decoder=unknown_decoder or (suffix and f"words that end in {suffix}"),
        implied_space="WordPiece" in kinds,
        next_id=n_ids if (size := tokenizer.get_vocab_size()) in pieces else size,
        added=frozenset(added),
        forgetful='"Precompiled"' in json.dumps(config["normalizer"]),
        encoder=_encoder(config),
        lossy=lossy,
        missing=missing,
    )


def _normalize_added(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Added tokens as they are looked for, in place: `normalized` ones (the default) normalized.

    With Llama 2's Prepend such a token begins with `▁`, and is found where a space stands before it.
    """
    if config["normalizer"] is not None:
        for token in config["added_tokens"]:
            if token["normalized"] and not token["special"]:
                token["content"] = tokenizer.normalizer.normalize_str(token["content"])


def _roles(
    tokenizer: Tokenizer, config: dict[str, Any], pieces: Mapping[int, str], n_ids: int
) -> list[str]:
    roles = ["text" if i in pieces else "none" for i in range(n_ids)]
    for token in config["added_tokens"]:
        roles[token["id"]] = "special" if token["special"] else "text"
    model = config["model"]
    unknown = model.get("unk_id")  # Unigram's; the others have a string
    if model.get("unk_token") is not None:
        unknown = tokenizer.token_to_id(model["unk_token"])
    if unknown is not None:
        roles[unknown] = "unknown"
    return roles


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write the 256 bytes with."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
_TO_LATIN_1 = str.maketrans({char: chr(byte) for char, byte in _BYTE_OF.items()})
_BYTE_LEVEL = re.compile(f"[{re.escape(''.join(_BYTE_OF))}]*")


def _decoder_steps(decoder: dict[str, Any] | None) -> tuple[list[dict[str, Any]], str]:
    """The decoder's steps, and the first of them that is not supported ("" if all are)."""
    outer = decoder or {"type": "none"}
    steps = outer["decoders"] if outer["type"] == "Sequence" else [outer]
    before: set[str] = set()
    for step in steps:
        kind = step["type"]
        allowed = kind in _SUPPORTED and (kind == "Fuse" or "ByteLevel" not in before)
        if kind == "Strip":  # of the whole text, which is one piece then
            allowed = (step["content"], step["stop"]) == (" ", 0) and step["start"] <= 1
            allowed &= "Fuse" in before
        elif kind == "Replace":
            allowed &= "String" in step["pattern"]
        if not allowed:
            return steps, json.dumps(step)
        before.add(kind)
    return steps, ""


def _spell(piece: str, steps: Sequence[dict[str, Any]]) -> bytes:
    """The bytes that a piece of the vocabulary stands for in running text."""
    for step in steps:
        kind = step["type"]
        if kind == "Replace":
            piece = piece.replace(step["pattern"]["String"], step["content"])
        elif kind == "Metaspace":
            piece = piece.replace(step["replacement"], " ")
        elif kind == "WordPiece":
            prefix = step["prefix"]
            piece = piece[len(prefix) :] if piece.startswith(prefix) else " " + piece
        elif kind == "ByteFallback" and re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        elif kind == "ByteLevel" and _BYTE_LEVEL.fullmatch(piece):
            return piece.translate(_TO_LATIN_1).encode("latin-1")
    return piece.encode("utf-8")


def _without_token(model: dict[str, Any], *, byte_level: bool) -> tuple[bool, NDArray[np.bool_]]:
    """Whether pieces without a token vanish, and the bytes `[256]` that have none."""
    missing = np.zeros(256, dtype=np.bool_)
    if byte_level:
        missing[[byte for char, byte in _BYTE_OF.items() if char not in model["vocab"]]] = True
        whole = not missing.any()
    else:
        whole = model.get("byte_fallback", False) and all(
            f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)
        )
    lossy = model["type"] == "BPE" and model["unk_token"] is None and not whole
    return lossy, missing & lossy


def _encoder(config: dict[str, Any]) -> Tokenizer:
    """Encodes text as the continuation of other text, with only text in it. Edits `config`."""
    config.update(truncation=None, padding=None, post_processor=None)
    _split_as_before(config)
    config["normalizer"] = _without_prefix(config["normalizer"])
    config["pre_tokenizer"] = _without_prefix(config["pre_tokenizer"])
    if "dropout" in config["model"]:
        config["model"]["dropout"] = None
    _hide_specials(config)
    encoder = Tokenizer.from_str(json.dumps(config))
    encoder.encode_special_tokens = True
    return encoder


def _split_as_before(config: dict[str, Any]) -> None:
    """Write, in place, T5's way to split (white space goes, then every word gets a space) anew.

    White space becomes one space, none at the end: Metaspace alone then cuts the same words, and
    can be told to put no space before the first.
    """
    parts = (config["pre_tokenizer"] or {}).get("pretokenizers", [])
    if [part["type"] for part in parts] != ["WhitespaceSplit", "Metaspace"]:
        return
    one_space = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    none_last = {"type": "Replace", "pattern": {"Regex": r" \z"}, "content": ""}
    before = [config["normalizer"]] if config["normalizer"] else []
    config["normalizer"] = {"type": "Sequence", "normalizers": [*before, one_space, none_last]}
    config["pre_tokenizer"] = parts[1] | {"split": True}


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that neither puts a space before the text nor takes it away."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Strip":
        return {**step, "strip_left": False}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    if step["type"] != "Sequence":
        return step
    key = "normalizers" if "normalizers" in step else "pretokenizers"
    for inner in step[key][1:]:
        if inner.get("prepend_scheme") == "always" or inner.get("add_prefix_space"):
            raise ValueError(
                f"pre_tokenizer: expected {inner['type']} to come first, or to put no space before "
                f"text, got {' + '.join(part['type'] for part in step[key])}, which puts a space "
                "before every piece; text cannot be encoded as a continuation, use another tokenizer"
            )
    edited = [_without_prefix(inner) for inner in step[key]]
    return {**step, key: [inner for inner in edited if inner is not None]}


def _hide_specials(config: dict[str, Any]) -> None:
    """Rename, in place, the special tokens in the model's vocabulary, so that no text gives them."""
    model = config["model"]
    keep = model.get("unk_token")
    renamed = {
        token["content"]: f"{_HIDDEN}{token['id']}"
        for token in config["added_tokens"]
        if token["special"] and token["content"] != keep
    }
    if isinstance(model["vocab"], dict):
        renamed = {old: new for old, new in renamed.items() if old in model["vocab"]}
        model["vocab"] = {renamed.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        pieces = {piece for piece, _score in model["vocab"]}
        renamed = {old: new for old, new in renamed.items() if old in pieces}
        model["vocab"] = [(renamed.get(piece, piece), score) for piece, score in model["vocab"]]
    if renamed and "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if renamed.keys().isdisjoint((left, right, left + right.removeprefix(prefix)))
        ]
    for token in config["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
