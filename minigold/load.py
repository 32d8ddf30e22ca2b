# SPDX-License-Identifier: Apache-2.0
"""The name of a model in, everything that is needed to talk to it out.

A name is a Hugging Face folder, or a hub name that `huggingface_hub` fetches if it is installed.
This file finds the tokenizer, the chat template and the ids that end an answer; `weights.py` reads
the weights and `chat.py` renders the template.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tokenizers import Tokenizer

from minigold.carry import Reading
from minigold.chat import render
from minigold.data import own_file, read_object, short
from minigold.events import Side
from minigold.lora import SETTINGS, load_adapter, read_settings
from minigold.model import Decoder
from minigold.teacher import Score, score
from minigold.weights import load_decoder, read_config

if TYPE_CHECKING:
    from minigold.hf import HFDecoder

__all__ = [
    "LanguageModel",
    "Speaker",
    "load",
    "load_speaker",
    "no_panic",
    "read_tokenizer",
    "resolve",
]

logger = logging.getLogger("minigold")

PATTERNS = ("*.json", "*.safetensors", "chat_template.jinja")
UNREAD = ("*/*", "consolidated*")  # folders, and the weights once more in another form
LARGEST = 2**27  # bytes of a tokenizer.json; real ones have up to 35 million
MOST_IDS = 2**21  # of a tokenizer; real ones have up to a million
RISKY = re.compile(r'charsmap|subword_prefix"\s*:\s*"[^"]|\\u00[4-7]')  # the last hides a name
MARK = "minigold"  # an answer that no template changes; what follows it ends the turn


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A tokenizer, template and stops: all of a model but its weights.

    Args:
        name: as the caller gave it.
        folder: where its files lie.
        template: the chat template, or None for a base model.
        bos_token, eos_token: their text for the template; "" where there is none.
        eos_ids: every id that ends an answer.
        end_id: the one of them that the template ends a turn with.
        context: tokens the model was made for.
        n_tokens: ids that both the tokenizer and the head know are below it.
        base: name and folder of the model that an adapter changes; None for a whole model.
    """

    name: str
    folder: Path
    tokenizer: Tokenizer
    template: str | None
    bos_token: str
    eos_token: str
    eos_ids: tuple[int, ...]
    end_id: int
    context: int
    n_tokens: int
    base: tuple[str, Path] | None = None


@dataclass(frozen=True)
class LanguageModel(Speaker):
    """A speaker and its decoder. As a teacher it is in process, and nothing of it is hidden."""

    decoder: Decoder | HFDecoder
    tier: ClassVar[str] = "dense"

    def read(
        self, readings: Sequence[Reading], *, side: Side, micro_batch: int, temperature: float
    ) -> list[Score]:
        """See `teacher.score`."""
        return score(
            self.decoder, readings, end_ids=side.end_ids, side=side, micro_batch=micro_batch,
            temperature=temperature, other_paths=True,
        )  # fmt: skip

    @property
    def facts(self) -> dict[str, Any]:
        """What of a teacher the numbers of a run follow from, beside its name."""
        return {
            "teacher_dtype": str(self.decoder.dtype).removeprefix("torch."),
            "teacher_weights_sha256": _fingerprint(self.decoder),
        }


def load(
    name: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Reads a folder or hub name: of a model, or of an adapter, whose base is then read too.

    A tokenizer with more ids than the embedding has rows is warned about (logger `minigold`);
    the ids beyond are not used.

    Args:
        device: `meta` reads all but the weights.

    Raises:
        FileNotFoundError: no such folder or hub name, or a file is missing in it.
        ValueError: a file that cannot be read or used, no id that ends an answer, a device that is not
            there or another kind of numbers.
    """
    _check_place(device, dtype)
    place = folder = resolve(name)
    base = _base_of(folder) if (folder / SETTINGS).is_file() else None
    if base and not (folder / "tokenizer.json").is_file():
        folder = base[1]  # an adapter without a tokenizer is one for that of its base
    whole = base[1] if base else folder
    _, shape = read_config(whole)
    speaker = load_speaker(name, folder, rows=shape.vocab_size, context=shape.context, base=base)
    decoder = load_decoder(whole, device=device, dtype=dtype)
    if base:
        load_adapter(decoder, place)
    decoder.n_tokens = speaker.n_tokens  # the head gives no logits for rows of padding
    return LanguageModel(**vars(speaker), decoder=decoder)


def _check_place(device: torch.device | str, dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"expected dtype torch.float32, torch.bfloat16 or another, got {dtype!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = " ".join(str(error).split())[:80]
        raise ValueError(f"expected a device of this machine, got {device} ({reason})") from error


def _fingerprint(decoder: torch.nn.Module) -> str:
    """Of 16 values or so of each parameter: tells checkpoints apart, and does not read them whole."""
    found = hashlib.sha256()
    for name, parameter in decoder.named_parameters():
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // 16)]
        found.update(name.encode() + some.double().cpu().numpy().tobytes())
    return found.hexdigest()


def load_speaker(
    name: str | Path,
    folder: Path,
    *,
    rows: int,
    context: int,
    base: tuple[str, Path] | None = None,
) -> Speaker:
    """All of a model but its weights.

    Args:
        rows: of its embedding.
        context: tokens that it can read.
        base: of an adapter; its stop ids count too.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    settings = _json(folder, "tokenizer_config.json")
    specials = dict(settings)
    if "added_tokens_decoder" not in settings:  # older folders: the map wins, as in `transformers`
        specials |= _json(folder, "special_tokens_map.json")
    template = _template(folder, settings)
    bos_token, eos_token = (_text(specials.get(key)) for key in ("bos_token", "eos_token"))
    n_tokens = _n_tokens(str(name), tokenizer, rows)
    stops = _stops((folder, base[1]) if base else (folder,), n_tokens)
    eos = tokenizer.token_to_id(eos_token) if eos_token else None
    turn = _turn_end(tokenizer, template, bos_token=bos_token, eos_token=eos_token)
    known = [i for i in (turn, eos, *stops) if i is not None and i < n_tokens]
    if not known:
        raise ValueError(
            f"expected an id that ends an answer in {folder}, got none below {n_tokens}; "
            "set eos_token_id in generation_config.json"
        )
    end_id = known[0]
    return Speaker(
        name=str(name),
        folder=folder,
        tokenizer=tokenizer,
        template=template,
        bos_token=bos_token,
        eos_token=eos_token,
        eos_ids=tuple(dict.fromkeys([*stops, end_id])),
        end_id=end_id,
        context=context,
        n_tokens=n_tokens,
        base=base,
    )


def _base_of(folder: Path) -> tuple[str, Path]:
    """Name and folder of the model that an adapter changes."""
    name = read_settings(folder)[1]
    remedy = f"correct base_model_name_or_path in {folder / SETTINGS}"
    try:
        found = resolve(name)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"the base of the adapter {folder}: {error}; {remedy}") from error
    if (found / SETTINGS).is_file():
        raise ValueError(
            f"expected a whole model as the base of the adapter {folder}, got the adapter {name}; {remedy}"
        )
    return name, found


def resolve(name: str | Path, *, weights: bool = True) -> Path:
    """The folder of a model, fetched from the hub if it is no folder here.

    Args:
        weights: whether to fetch them too; without them, what a tokenizer needs.

    Raises:
        FileNotFoundError: it is no folder and cannot be fetched.
        ValueError: it is a file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"expected a model folder, got the file {path}; give the folder it is in")
    hub_name = str(name)
    if hub_name.startswith((".", "/", "~")) or hub_name.count("/") > 1 or "\\" in hub_name:
        raise FileNotFoundError(f"expected a model folder, found no folder {path}; check the path")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"expected a model folder, found no folder {path}; "
            "to fetch it as a hub name, run: pip install huggingface_hub"
        ) from error
    try:
        wanted = [pattern for pattern in PATTERNS if weights or "safetensors" not in pattern]
        return Path(snapshot_download(hub_name, allow_patterns=wanted, ignore_patterns=[*UNREAD]))
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"expected a model folder or hub name, found no folder {path}, and the hub did not "
            f"give it ({reason[0]}); check the name and the network, or download the folder"
        ) from error


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, without truncation and padding.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no tokenizer.
    """
    if not path.is_file():
        folder = path.parent
        raise FileNotFoundError(
            f"expected {path.name} in {folder}, found none; convert the tokenizer once with "
            f"transformers: AutoTokenizer.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r})"
        )
    size = own_file(path.parent, path.name).stat().st_size
    if size > LARGEST:
        raise ValueError(
            f"expected a tokenizer of at most {LARGEST:,} bytes in {path}, got {size:,}; "
            "download it again"
        )
    text = _read_text(path)
    _check_parts(text, path)
    with no_panic(path):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.decode(tokenizer.encode("A b.\n").ids)  # what panics, panics here
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= MOST_IDS:
        raise ValueError(f"expected ids below {MOST_IDS:,} in {path}, got {highest:,}")
    return tokenizer


def _check_parts(text: str, path: Path) -> None:
    """Refuses what makes `tokenizers` end the process: a size or a prefix that it takes on trust."""
    if not RISKY.search(text):
        return
    wrong: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        for key, value in pairs:
            if key == "precompiled_charsmap" and isinstance(value, str):
                data = base64.b64decode(value)  # begins with the size of a table in it
                if int.from_bytes(data[:4], "little") > len(data):
                    wrong.append(f"{key} that is shorter than it says")
            if key == "continuing_subword_prefix" and isinstance(value, str):
                merges = next((x for k, x in pairs if k == "merges" and isinstance(x, list)), [])
                seconds = [
                    m.partition(" ")[2] if isinstance(m, str) else str(m[-1]) for m in merges
                ]
                if not all(second.startswith(value) for second in seconds):
                    wrong.append(f"{key} {short(value)} that merges do not have")

    try:
        json.loads(text, object_pairs_hook=look)
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        wrong.append(str(error)[:200])
    if wrong:
        raise ValueError(f"expected a tokenizer in {path}, got {wrong[0]}; download it again")


@contextmanager
def no_panic(where: Path | str) -> Iterator[None]:
    """What goes wrong in `tokenizers`, as a ValueError: bare Exceptions, and panics of its Rust."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"expected a tokenizer in {where}, got {str(error)[:200]}; download it again"
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 in {path}, got {error}; save it as UTF-8") from error


def _json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a file; empty if there is no such file."""
    path = own_file(folder, name)
    return read_object(path) if path.is_file() else {}


def _text(token: Any) -> str:
    """A special token's text; it is stored as text, as an object with `content`, or as null."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = own_file(folder, "chat_template.jinja")
    if path.is_file():
        return _read_text(path)
    template = settings.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if template is None or isinstance(template, str):
        return template
    raise ValueError(
        f"expected chat_template in {folder / 'tokenizer_config.json'} to be text or a list of named "
        f"ones, got {short(template)}; correct it, or write chat_template.jinja"
    )


def _n_tokens(name: str, tokenizer: Tokenizer, rows: int) -> int:
    ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if ids > rows:
        logger.warning(
            "%s: the tokenizer has %d ids, the embedding %d rows; ids from %d on are not used",
            name, ids, rows, rows,
        )  # fmt: skip
    return min(ids, rows)


def _stops(folders: tuple[Path, ...], n_tokens: int) -> list[int]:
    """`eos_token_id` of generation_config.json, else of config.json: one id or several.

    The first folder that has one counts.
    """
    folder, value = folders[0], None
    for name in ("generation_config.json", "config.json"):
        for one in (_json(place, name) for place in folders):
            if value is None:
                value = one.get("eos_token_id")
            if value is None and isinstance(one.get("text_config"), dict):
                value = one["text_config"].get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in values):
        raise ValueError(
            f"expected eos_token_id in {folder} to be a token id or a list of them, got {short(value)}; "
            "correct it in generation_config.json"
        )
    for i in values:
        if not 0 <= i < n_tokens:
            logger.warning(
                "%s: eos_token_id %d is not below %d; it is not used", folder, i, n_tokens
            )
    return [i for i in values if 0 <= i < n_tokens]


def _turn_end(
    tokenizer: Tokenizer, template: str | None, *, bos_token: str, eos_token: str
) -> int | None:
    """The first added token that the template writes after an answer."""
    if template is None:
        return None
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}]
    try:
        text = render(
            template, talk, bos_token=bos_token, eos_token=eos_token, add_generation_prompt=False
        )
    except ValueError:  # a template for other roles; it says so again when it is used
        return None
    tail = text[text.rfind(MARK) + len(MARK) :] if MARK in text else ""
    added = tokenizer.get_added_tokens_decoder()
    ids = tokenizer.encode(tail, add_special_tokens=False).ids
    return next((i for i in ids if i in added), None)
