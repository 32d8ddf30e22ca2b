# SPDX-License-Identifier: Apache-2.0
"""A causal language model of `transformers` and its tokenizer in, a `LanguageModel` out.

So a student or teacher can be of any family, in any precision, or wrapped by `peft`. Nothing of
`transformers` or `peft` is imported: a module is known by its attributes, and what is understood of it
is tried on a few tokens before it is used.

The trunk (`get_decoder`) gives hidden states, the head is the weight of `get_output_embeddings`. While
decoding, rows are padded on the left, as in `generate`: so positions, masks and windows are the module's own.
Letters as in `model.py`.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from minigold.load import LanguageModel, load_speaker
from minigold.model import Head

__all__ = ["HFDecoder", "wrap"]

log = logging.getLogger("minigold")
PROBE = 7  # tokens that a module is tried on
FAR = 1e4  # raw logits up to here, small ones too, show what is done to them
CAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma 2 and 3, RecurrentGemma
SCALES = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon H1
NAMES = ("cache", "past_key_values")  # what `transformers` calls its cache, now and before 5.24
ONE_FILE = 2**50  # bytes: weights go into one file


def wrap(
    module: Any, tokenizer: Any, *, name: str = "", context: int | None = None
) -> LanguageModel:
    """A `*ForCausalLM`, maybe wrapped by `peft`, as a student or teacher.

    As a student its weights that require a gradient are trained, no others. Its mode, device and
    precision stay as they are.

    Args:
        module: its weights are on one device.
        tokenizer: the folder of a tokenizer, a fast one of `transformers`, or a `tokenizers.Tokenizer`,
            which has no chat template.
        name: for messages and the run folder, by default what the module was loaded from.
        context: tokens that it can read, where its configuration does not say.

    Raises:
        FileNotFoundError: no tokenizer.json in the folder.
        ValueError: logits or hidden states that are not understood; see `HFDecoder`, `load`.
    """
    decoder, config = HFDecoder(module), _config(module)
    context = context or getattr(config, "max_position_embeddings", None)
    if not context:
        raise ValueError(
            f"expected max_position_embeddings in the configuration of {type(module).__name__}, got "
            "none; give `context`, the tokens that it can read"
        )
    if isinstance(tokenizer, str | Path):
        folder = Path(tokenizer)
    else:
        folder = Path(tempfile.mkdtemp(prefix="minigold-"))
        weakref.finalize(decoder, shutil.rmtree, folder, ignore_errors=True)
        _write(tokenizer, module, folder)
    rows = min(len(one.weight) for one in (decoder.embedding, module.get_output_embeddings()))
    name = name or getattr(config, "name_or_path", "") or type(module).__name__
    speaker = load_speaker(name, folder, rows=rows, context=context)
    decoder.n_tokens = speaker.n_tokens
    return LanguageModel(**vars(speaker), decoder=decoder)


def _config(module: Any) -> Any:
    """Of the text model."""
    return module.config.get_text_config()


def _write(tokenizer: Any, module: Any, folder: Path) -> None:
    """The files of a tokenizer that is in memory, and the module's stops."""
    if isinstance(tokenizer, Tokenizer):
        tokenizer.save(str(folder / "tokenizer.json"))
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    else:
        raise ValueError(
            "expected a tokenizer of transformers or tokenizers, or the folder of one, got "
            f"{type(tokenizer).__name__}"
        )
    told = getattr(module, "generation_config", None), _config(module)
    stops = [getattr(one, "eos_token_id", None) for one in told]
    stop = next((one for one in stops if one is not None), None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}), "utf-8")


class HFDecoder(nn.Module):
    """A module of `transformers` up to its last hidden states, as `model.Decoder` is one.

    Passes run in `eval` mode, whatever mode the module is in and stays in, apart from those that keep
    the inputs of layers alone (`checkpointing`).

    Args:
        module: see `wrap`.

    Raises:
        ValueError: no trunk or head is found; weights on several devices; a head with weights
            beside its matrix and bias; logits that are not what the head makes of the hidden
            states; states that depend on more than the
            tokens of the row up to them.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        wanted = ("get_decoder", "get_input_embeddings", "get_output_embeddings", "config")
        missing = [name for name in wanted if not hasattr(module, name)]
        if missing:
            raise ValueError(
                f"expected a causal language model of transformers, got {type(module).__name__} "
                f"without {missing[0]}"
            )
        self.module, config, self.training = module, _config(module), False
        caps = (getattr(config, name, None) for name in CAPS)
        self.softcap: float | None = next((cap for cap in caps if cap), None)
        self.scale: float = 1 / (getattr(config, "logits_scaling", None) or 1)  # Granite
        for name in SCALES:
            self.scale *= getattr(config, name, None) or 1
        devices = {str(one.device) for one in module.parameters()}
        if len(devices) > 1 or devices == {"meta"}:
            raise ValueError(
                f"expected a module on one device, got {', '.join(sorted(devices))}; load it without device_map"
            )
        self._check_head()
        self.n_tokens = self.head.weight_VD.shape[0]
        self.cache_kind: tuple[str, Callable[[], Any]] | None = self._cache_kind()
        if self.cache_kind is None:
            log.warning(
                "%s keeps no plain keys and values: while sampling, every token reads its row anew",
                type(module).__name__,
            )
        self._check_alone()

    @property
    def embedding(self) -> Any:
        return self.module.get_input_embeddings()

    @property
    def trunk(self) -> Any:
        """All but the head. Before `transformers` 5 `get_decoder` leaves the head on some models."""
        found = self.module.get_decoder()
        return getattr(found, "base_model", found)

    @property
    def head(self) -> Head:
        layer, n = self.module.get_output_embeddings(), getattr(self, "n_tokens", None)
        weight_VD, bias_V = layer.weight, getattr(layer, "bias", None)
        if n is not None and n < len(weight_VD):  # a slice costs a copy in the backward pass
            weight_VD, bias_V = weight_VD[:n], None if bias_V is None else bias_V[:n]
        return Head(weight_VD, self.softcap, bias_V)

    @property
    def device(self) -> torch.device:
        found: torch.device = self.embedding.weight.device
        return found

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.embedding.weight.dtype
        return found

    @property
    def cuda_graphs(self) -> bool:
        return False

    @cuda_graphs.setter
    def cuda_graphs(self, wanted: bool) -> None:
        if wanted:
            raise ValueError(
                "expected --cuda-graphs with a model that minigold loads, got a module of transformers; leave it out"
            )

    @property
    def checkpointing(self) -> bool:
        return any(getattr(one, "gradient_checkpointing", False) for one in self.module.modules())

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        if wanted:  # else it stays as the caller has set it
            old = self.module.gradient_checkpointing_enable
            getattr(self.module, "activation_checkpointing_enable", old)({"use_reentrant": False})

    def train(self, mode: bool = True) -> HFDecoder:
        """Passes with gradients follow; the module's own mode stays as it is.

        Raises:
            ValueError: in `train` mode the states are others than in `eval` mode, by dropout for
                instance: what the student is trained on would not be what it sampled from.
        """
        if not mode:
            self.training = False
            return self
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            asleep = self(self._probe())
            with _mode(self.module, train=True):
                awake = self.states(self._probe())
        dropout = [
            f"{name} {one.p:g}"
            for name, one in self.module.named_modules()
            if isinstance(one, nn.Dropout) and one.p > 0
        ]
        if dropout or not _near(awake, asleep):
            found = f"dropout ({dropout[0]})" if dropout else "others, as with dropout"
            raise ValueError(
                f"expected the same states in train and eval mode, got {found}; set each dropout in the "
                "configuration (attention_dropout, lora_dropout and their like) to 0"
            )
        self.training = True
        return self

    def empty_cache(self, batch: int, length: int) -> Any:
        """A cache for `batch` rows; it grows as they do."""
        del length
        kind = self.cache_kind
        return _Columns(self, batch, *kind) if kind else _Tokens(self, batch)

    @contextmanager
    def decoding(self, cache: Any, n_steps: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """Gives a function from the next ids_B1 to the states after them, [B, D]."""
        del n_steps
        with _mode(self.module, train=False):
            yield lambda ids_B1: self(ids_B1, cache)[:, 0]

    def forward(self, ids_BS: Tensor, cache: Any = None) -> Tensor:
        """hidden_BSD, from which `head` makes logits; arguments as of `model.Decoder`.

        Raises:
            ValueError: a cache while gradients are on.
        """
        learns = torch.is_grad_enabled()
        if learns and cache is not None:
            raise ValueError(
                "expected gradients off with a cache, got them on; use torch.no_grad()"
            )
        # layers are checkpointed in `train` mode alone
        with _mode(self.module, train=learns and self.training and self.checkpointing):
            hidden_BSD: Tensor = self.states(ids_BS) if cache is None else cache.read(ids_BS)
        return hidden_BSD

    def states(self, ids_BS: Tensor, **more: Any) -> Tensor:
        given = {"use_cache": False, **more}
        found = self.trunk(input_ids=ids_BS, return_dict=True, **given)
        hidden_BSD: Tensor = found.last_hidden_state
        return hidden_BSD if self.scale == 1 else hidden_BSD * self.scale

    # -- what is understood ----------------------------------------------------------------------

    def _probe(self) -> Tensor:
        """ids_BS of two rows; no id twice beside itself."""
        ids = torch.linspace(0, len(self.embedding.weight) - 1, 2 * PROBE, device=self.device)
        return ids.long().view(PROBE, 2).T.contiguous()

    @torch.no_grad()
    def _check_head(self) -> None:
        """The head is one matrix, and only what is known is done to what it gives."""
        module, layer = self.module, self.module.get_output_embeddings()
        names = {name for name, _ in layer.named_parameters()} if layer is not None else set()
        if layer is None or not names <= {"weight", "bias"} or not layer.weight.is_floating_point():
            raise ValueError(
                f"expected a head with a matrix and maybe a bias in {type(module).__name__}, got "
                f"{', '.join(sorted(names)) or 'none'}; leave the head out of adapters, modules_to_save and quantization"
            )
        ids, passed = self._probe(), list[tuple[Tensor, Tensor, Tensor]]()

        def replace(_: nn.Module, given: tuple[Tensor], raw: Tensor) -> Tensor:
            other = FAR * torch.linspace(-1, 1, raw.numel()) ** 5
            passed.append((given[0], raw, other.to(raw).view_as(raw)))
            return passed[-1][2]

        hook = layer.register_forward_hook(replace)
        try:
            with _mode(module, train=False):
                seen = module(ids, use_cache=False).logits
        finally:
            hook.remove()
        name = f"the head of {type(module).__name__}"
        if not passed or not _near(self(ids), passed[0][0] * self.scale):
            raise ValueError(
                f"expected {name} to read what get_decoder gives, got other states (with prompts that peft has "
                "learnt, or layers between them); such a module is not built in"
            )
        if not _near(F.linear(passed[0][0], self.head.weight_VD, self.head.bias_V), passed[0][1]):
            raise ValueError(
                f"expected {name} to multiply by its matrix, got other logits; such a head is not built in"
            )
        if not _near(self.head.cap(passed[0][2].float() * self.scale), seen, times=2, each=True):
            raise ValueError(
                f"expected the logits of {name} scaled and capped as the configuration says "
                f"({', '.join((*CAPS, 'logits_scaling', *SCALES))}), got others; such a head is not built in"
            )

    @torch.no_grad()
    def _check_alone(self) -> None:
        """After other passes, with and without a cache."""
        ids, cause = self._probe(), None
        try:
            part, whole = self(ids[:1, : PROBE // 2]), self(ids)[:1, : PROBE // 2]
        except RuntimeError as error:  # what it keeps has the shape of an earlier pass
            part, whole, cause = ids[:0], ids, error
        if not _near(part, whole, within=1e-3):
            raise ValueError(
                f"expected {type(self.module).__name__} to give states that depend on the tokens of the row up to "
                "them alone, got others: by later tokens, other rows, or what it keeps of earlier passes; such a "
                "module is not built in"
            ) from cause

    @torch.no_grad()
    def _cache_kind(self) -> tuple[str, Callable[[], Any]] | None:
        """The name and kind of the module's cache; None if rows cannot go on from keys and values."""
        ids, rows = self._probe(), torch.arange(2, device=self.device)
        length_B, hidden_BSD = torch.tensor([4, 2], device=self.device), self(ids)
        try:
            with _mode(self.module, train=False):
                found = self.trunk(input_ids=ids, use_cache=True, return_dict=True)
                name = next(name for name in NAMES if found.get(name) is not None)
                kind = name, type(found[name])  # made anew it keeps all, also where a window slides
                cache, read = _Columns(self, 2, *kind), _Columns(self, 2, *kind)
                read.read(ids[:, :4])
                read.cut(length_B)
                cache.fill(rows, read, rows)
                for step in range(2):
                    column_B1 = (length_B + step)[:, None]
                    told_B1D = cache.read(ids.gather(1, column_B1))
                    wanted_B1D = hidden_BSD.take_along_dim(column_B1[:, :, None], 1)
                    if not _near(told_B1D, wanted_B1D, within=1e-3):
                        return None
        except (AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError):
            return None  # whatever it keeps, it is not these
        return kind

    # -- files -----------------------------------------------------------------------------------

    def check_saving(self) -> None:
        """Refuses adapters that `save` and `restore` could not keep apart.

        Raises:
            ValueError: adapters without `peft`'s own class around them, or one of another name.
        """
        adapters = list(getattr(self.module, "peft_config", ()))
        inside = getattr(self.module, "_hf_peft_config_loaded", False)
        if inside or adapters not in ([], ["default"]):
            raise ValueError(
                f"expected one adapter, `default`, around the student, got "
                f"{'one inside it' if inside else ', '.join(adapters)}; use "
                "get_peft_model of peft, or leave `out` out"
            )

    def save(self, folder: Path) -> None:
        """Writes what `transformers`, or `peft` where an adapter is trained, loads."""
        if hasattr(self.module, "peft_config"):
            self.module.save_pretrained(folder)
        else:
            self.module.save_pretrained(folder, max_shard_size=ONE_FILE)

    def restore(self, folder: Path) -> None:
        """Sets the weights back to what `save` wrote."""
        if hasattr(self.module, "peft_config"):
            self.module.load_adapter(folder, "default", is_trainable=True)
            return
        widest = reduce(torch.promote_types, {one.dtype for one in self.module.parameters()})
        stored = type(self.module).from_pretrained(folder, dtype=widest)
        self.module.load_state_dict(stored.state_dict())


class _Columns:
    """Keys and values in the module's own kind of cache; the last token of each row is in the last column.

    Letters: J columns. `mask_BJ` is 1 where a column holds a token, `next_B` the position of the next one.
    """

    def __init__(self, decoder: HFDecoder, batch: int, name: str, make: Callable[[], Any]) -> None:
        self.decoder, device = decoder, decoder.device
        self.name, self.make = name, make
        self.store = make()
        self.mask_BJ = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self.next_B = torch.zeros(batch, dtype=torch.int64, device=device)

    def read(self, ids_BS: Tensor) -> Tensor:
        """The states of more tokens, which are then kept too."""
        n_old, n_new = self.mask_BJ.shape[1], ids_BS.shape[1]
        more: dict[str, Any] = {self.name: self.store, "use_cache": True}
        self.mask_BJ = F.pad(self.mask_BJ, (0, n_new), value=1)
        if n_old:
            ahead = torch.arange(n_new, device=ids_BS.device)
            more["attention_mask"] = self.mask_BJ
            more["position_ids"] = self.next_B[:, None] + ahead
        self.next_B = self.next_B + n_new
        return self.decoder.states(ids_BS, **more)

    def _set(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.store = self.make()
        for i, (key_BGJE, value_BGJE) in enumerate(pairs):
            self.store.update(key_BGJE, value_BGJE, i)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys, layer.values) for layer in self.store.layers]

    def cut(self, length_B: Tensor) -> None:
        """Only the first `length_B` tokens of each row stay; they move to the last columns."""
        column_J = torch.arange(self.mask_BJ.shape[1], device=self.next_B.device)
        from_BJ = (column_J - (self.next_B - length_B)[:, None]) % len(column_J)
        from_B1J1 = from_BJ[:, None, :, None]
        self._set(
            [
                (key.take_along_dim(from_B1J1, 2), value.take_along_dim(from_B1J1, 2))
                for key, value in self._pairs()
            ]
        )
        self.mask_BJ = (column_J >= len(column_J) - length_B[:, None]).long()
        self.next_B = length_B

    def fill(self, rows_K: Tensor, other: _Columns, from_K: Tensor) -> None:
        """Rows of another cache, copied into some of this one's; both int64."""
        n, used = max(self.mask_BJ.shape[1], other.mask_BJ.shape[1]), other.mask_BJ.shape[1]
        batch, theirs = len(self.mask_BJ), other._pairs()
        mine = self._pairs() or [(key[:0], value[:0]) for key, value in theirs]

        def joined(old: Tensor, new: Tensor) -> Tensor:
            found = new.new_zeros(batch, new.shape[1], n, new.shape[3])
            if len(old):
                found[:, :, n - old.shape[2] :] = old
            found[rows_K, :, n - used :] = new[from_K]
            return found

        self._set(
            [
                (joined(old[0], new[0]), joined(old[1], new[1]))
                for old, new in zip(mine, theirs, strict=True)
            ]
        )
        self.mask_BJ = F.pad(self.mask_BJ, (n - self.mask_BJ.shape[1], 0))
        self.mask_BJ[rows_K, n - used :] = other.mask_BJ[from_K]
        self.next_B[rows_K] = other.next_B[from_K]

    def keep(self, rows_K: Tensor) -> None:
        """Only these rows (int64, ascending) stay, moved to the front."""
        self.store.batch_select_indices(rows_K)
        self.mask_BJ, self.next_B = self.mask_BJ[rows_K], self.next_B[rows_K]


class _Tokens:
    """For modules that keep something else than keys and values: the ids, to be read anew. As `_Columns`."""

    def __init__(self, decoder: HFDecoder, batch: int) -> None:
        self.decoder = decoder
        self.ids_BJ = torch.zeros(batch, 0, dtype=torch.int64, device=decoder.device)
        self.next_B = self.ids_BJ.new_zeros(batch)

    def read(self, ids_BS: Tensor) -> Tensor:
        column_BS = self.next_B[:, None] + torch.arange(ids_BS.shape[1], device=ids_BS.device)
        self._widen(int(column_BS.max()) + 1)
        self.ids_BJ.scatter_(1, column_BS, ids_BS)
        self.next_B = self.next_B + ids_BS.shape[1]
        return self.decoder.states(self.ids_BJ).take_along_dim(column_BS[:, :, None], 1)

    def _widen(self, n: int) -> None:
        self.ids_BJ = F.pad(self.ids_BJ, (0, max(0, n - self.ids_BJ.shape[1])))

    def cut(self, length_B: Tensor) -> None:
        self.next_B = length_B

    def fill(self, rows_K: Tensor, other: _Tokens, from_K: Tensor) -> None:
        self._widen(other.ids_BJ.shape[1])
        self.ids_BJ[rows_K, : other.ids_BJ.shape[1]] = other.ids_BJ[from_K]
        self.next_B[rows_K] = other.next_B[from_K]

    def keep(self, rows_K: Tensor) -> None:
        self.ids_BJ, self.next_B = self.ids_BJ[rows_K], self.next_B[rows_K]


@contextmanager
def _mode(module: nn.Module, *, train: bool) -> Iterator[None]:
    """In `train` or `eval` mode; what was in the other one is so again afterwards."""
    other = [one for one in module.modules() if one.training != train]
    try:
        for one in other:
            one.training = train
        yield
    finally:
        for one in other:
            one.training = not train


def _near(
    found: Tensor, wanted: Tensor, *, within: float = 0.0, times: float = 0.5, each: bool = False
) -> bool:
    """Equal to some times the rounding of the coarser type, relative to the largest number or to `each`.

    Args:
        within: other products or orders of sums lie between; this far apart is still equal, in types of
            few bits 16 times their rounding.
    """
    if found.shape != wanted.shape:
        return False
    eps = max(torch.finfo(x.dtype).eps for x in (found, wanted))
    limit = max(within, 16 * eps) if within else max(1e-5, times * eps)
    size = wanted.abs().double()
    apart = (found.double() - wanted.double()).abs()
    return bool((apart <= limit * (size if each else size.max())).all())
