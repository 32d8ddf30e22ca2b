# SPDX-License-Identifier: Apache-2.0
"""Adapters: the same numbers as merged matrices and as `peft`, files both ways, and nothing else moves."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import minigold as mg
from minigold import train as training
from minigold.cli import main
from minigold.config import Config
from minigold.lora import (
    SETTINGS,
    AdaptedLinear,
    Adapter,
    adapt,
    adapter_of,
    load_adapter,
    merge,
    new_tensors,
    save_adapter,
)
from minigold.masked import train_pass
from minigold.model import MATRICES, Decoder
from minigold.packed import Linear
from minigold.pair import Pair
from minigold.sample import sample
from minigold.train import adamw, choose_trained, distill, take_step
from test_train import CONFIG, PROMPTS, all_chosen, cross_pair, rollouts_of
from tiny_folders import edit_json, tiny_folder
from tiny_models import FAMILIES, SCALED, hugging_face_model, new_decoder, raw_config
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

TENSORS = "adapter_model.safetensors"
IDS_BS = torch.randint(1, 41, (3, 17), generator=torch.Generator().manual_seed(0))
LORA = dataclasses.replace(CONFIG, lora_rank=3, lora_alpha=5.0)

adapters = st.builds(
    Adapter,
    st.integers(1, 30),
    st.floats(0.01, 100),
    st.sets(st.sampled_from(MATRICES), min_size=1).map(
        lambda some: tuple(name for name in MATRICES if name in some)
    ),
)


def with_adapter(decoder: Decoder, adapter: Adapter, seed: int = 0) -> Decoder:
    """Gives it one whose B is not zero."""
    tensors = new_tensors(decoder, adapter, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.normal_(std=0.3, generator=g)
    adapt(decoder, adapter, tensors)
    return decoder


def logits_of(decoder: Decoder, ids_BS: Tensor = IDS_BS) -> Tensor:
    with torch.no_grad():
        return decoder.head.logits(decoder(ids_BS))


def by_hand(decoder: Decoder, adapter: Adapter) -> Decoder:
    """The same as whole matrices, from the tensors' names alone."""
    tensors = decoder.state_dict()
    plain = Decoder(decoder.config).to(decoder.dtype)
    whole = {name: x.clone() for name, x in tensors.items() if ".lora_" not in name}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            change = tensors[f"{layer}.lora_B.weight"] @ tensors[name]
            whole[f"{layer}.weight"] += adapter.alpha / adapter.rank * change
    plain.load_state_dict(whole)
    return plain.eval()


# ------------------------------------------------------------------------------------- the numbers
@given(st.sampled_from(FAMILIES), adapters, st.integers(0, 99))
def test_an_adapter_is_a_change_of_the_matrices(family: str, adapter: Adapter, seed: int) -> None:
    decoder = with_adapter(new_decoder(family, seed=seed), adapter, seed).double().eval()
    assert adapter_of(decoder) == adapter
    plain = by_hand(decoder, adapter)
    before = logits_of(decoder)
    torch.testing.assert_close(before, logits_of(plain), rtol=1e-9, atol=1e-9)
    merge(decoder)
    assert adapter_of(decoder) is None
    assert {name: x.shape for name, x in decoder.state_dict().items()} == {
        name: x.shape for name, x in plain.state_dict().items()
    }
    torch.testing.assert_close(logits_of(decoder), before, rtol=1e-9, atol=1e-9)


@given(st.sampled_from(FAMILIES), adapters, st.integers(0, 99))
def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(
    family: str, adapter: Adapter, seed: int
) -> None:
    decoder = new_decoder(family, seed=seed)
    before, names = logits_of(decoder), dict(decoder.named_parameters())
    adapt(decoder, adapter, new_tensors(decoder, adapter, seed=seed))
    assert torch.equal(logits_of(decoder), before)
    for name, parameter in decoder.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        assert ".lora_" in name or parameter is names[name]
    adapted = [n for n, one in decoder.named_modules() if isinstance(one, AdaptedLinear)]
    linear = [n for n, one in decoder.named_modules() if isinstance(one, Linear)]
    assert adapted == [n for n in linear if n.rpartition(".")[2] in adapter.targets]
    assert len(linear) == 7 * decoder.config.n_layers


def test_a_begins_as_that_of_peft_and_follows_the_seed() -> None:
    decoder, adapter = new_decoder("llama"), Adapter(400, 1.0, MATRICES)
    state = torch.get_rng_state()
    first, same, other = (new_tensors(decoder, adapter, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    theirs = torch.nn.Linear(24, 400, bias=False).weight.detach()  # as peft begins it
    ours = first["model.layers.0.mlp.down_proj.lora_A.weight"]
    for one in (ours, theirs):
        assert one.abs().max().item() == pytest.approx(24**-0.5, rel=0.01)
        assert one.std().item() == pytest.approx((3 * 24) ** -0.5, rel=0.03)
    for name, tensor in first.items():
        assert torch.equal(tensor, same[name])
        assert torch.equal(tensor, other[name]) == ("lora_B" in name)
        assert ("lora_A" in name) or not tensor.any()
    values = [x for name, x in first.items() if "lora_A" in name and x.shape == (400, 20)]
    assert len(values) > 5 and not any(torch.equal(values[0], x) for x in values[1:])


def full_gradient(pair: Pair, rollouts: Any, chosen: Any) -> dict[str, Tensor]:
    decoder = pair.student.decoder
    decoder.requires_grad_(True).zero_grad(set_to_none=True)
    train_pass(pair, rollouts, chosen, CONFIG)
    found = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad(set_to_none=True)
    return found


def test_gradients_are_those_of_the_whole_matrices_by_the_chain_rule() -> None:
    """dA = s B^T dW and dB = s dW A^T, where dW is the gradient of the merged matrix."""
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    chosen = all_chosen(rollouts)
    adapter = Adapter(3, 5.0, MATRICES)
    own = with_adapter(deepcopy(pair.student.decoder), adapter)
    merged = deepcopy(own)
    merge(merged)

    def of(decoder: Decoder) -> Pair:
        return dataclasses.replace(pair, student=dataclasses.replace(pair.student, decoder=decoder))

    whole = full_gradient(of(merged), rollouts, chosen)
    train_pass(of(own), rollouts, chosen, CONFIG)
    tensors, scale, seen = own.state_dict(), 5 / 3, 0
    for name, parameter in own.named_parameters():
        if ".lora_" not in name:
            assert parameter.grad is None
            continue
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        whole_grad = whole[f"{layer}.weight"]
        if part == "lora_A":
            expected = scale * tensors[f"{layer}.lora_B.weight"].T @ whole_grad
        else:
            expected = scale * whole_grad @ tensors[f"{layer}.lora_A.weight"].T
        torch.testing.assert_close(parameter.grad, expected, atol=2e-6, rtol=1e-3)
        seen += bool(expected.abs().max() > 1e-4)
    assert seen == 2 * 7 * own.config.n_layers


def test_of_full_rank_a_step_is_that_of_the_matrices() -> None:
    """With A orthogonal and B zero, plain descent moves W + B A as it moves W."""
    pair = cross_pair()
    rollouts = rollouts_of(pair)
    chosen = all_chosen(rollouts)
    whole = full_gradient(pair, rollouts, chosen)
    for name in ("q_proj", "up_proj"):
        decoder = deepcopy(pair.student.decoder)
        adapter = Adapter(decoder.config.width, float(decoder.config.width), (name,))
        tensors = new_tensors(decoder, adapter, seed=0)
        for key, tensor in tensors.items():
            if "lora_A" in key:
                torch.nn.init.orthogonal_(tensor, generator=torch.Generator().manual_seed(1))
        adapt(decoder, adapter, tensors)
        own = dataclasses.replace(pair.student, decoder=decoder)
        optimizer = torch.optim.SGD(training.trained_weights(decoder), lr=0.5)
        train_pass(dataclasses.replace(pair, student=own), rollouts, chosen, CONFIG)
        optimizer.step()
        merge(decoder)
        moved = [key for key in whole if key.endswith(f".{name}.weight")]
        assert len(moved) == decoder.config.n_layers
        before, after = pair.student.decoder.state_dict(), decoder.state_dict()
        for key in moved:
            assert (after[key] - before[key]).abs().max() > 1e-4
            torch.testing.assert_close(
                after[key] - before[key], -0.5 * whole[key], atol=1e-6, rtol=1e-3
            )


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("length", [5, 40])
def test_samples_are_those_of_the_merged_matrices(family: str, length: int) -> None:
    """Long answers are decoded with packed copies."""
    adapter = Adapter(4, 9.0, ("v_proj", "o_proj", "down_proj"))
    decoder = with_adapter(new_decoder(family, seed=2), adapter).eval()
    plain = by_hand(decoder, adapter)
    prompts = [[5, 7, 9], [5, 7, 9], [11], [3, 4, 8, 20, 30]]
    settings: dict[str, Any] = {"max_new_tokens": length, "eos_ids": [0], "seed": 5}
    got, want = (sample(one, prompts, **settings) for one in (decoder, plain))
    bare = sample(new_decoder(family, seed=2), prompts, **settings)
    assert [one.ids for one in got] == [one.ids for one in want]
    assert [one.ids for one in got] != [one.ids for one in bare]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.logp_S, other.logp_S, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [5, 40])
def test_under_autocast_frozen_matrices_are_copied_once_and_say_the_same(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Adapter(4, 9.0, ("q_proj", "down_proj"))
    decoder = with_adapter(new_decoder("qwen2", seed=2), adapter).eval()
    copies: list[torch.dtype] = []
    pack = mg.packed.pack

    def seen(weight: Tensor) -> Tensor | None:
        found = pack(weight)
        copies.extend([found.dtype] if found is not None else [])
        return found

    with torch.autocast("cpu", torch.bfloat16):
        plain = sample(decoder, [[5, 7]] * 3, max_new_tokens=length, eos_ids=[], seed=5)
        monkeypatch.setattr("minigold.packed.pack", seen)
        monkeypatch.setattr("minigold.packed.PACK_FROM", 32)
        copied = sample(decoder, [[5, 7]] * 3, max_new_tokens=length, eos_ids=[], seed=5)
        monkeypatch.setattr("minigold.packed.pack", lambda _weight: None)
        monkeypatch.setattr("minigold.model.pack", lambda _weight: None)
        without = sample(decoder, [[5, 7]] * 3, max_new_tokens=length, eos_ids=[], seed=5)
    assert copies == [torch.bfloat16] * (14 if length >= 32 else 0)
    for one, two, three in zip(plain, copied, without, strict=True):
        assert one.ids == two.ids == three.ids
        assert torch.equal(one.logp_S, three.logp_S)
        assert torch.equal(one.logp_S, two.logp_S)


# ---------------------------------------------------------------------------------------- a step
def new_pair() -> Pair:
    pair = cross_pair()
    decoder = deepcopy(pair.student.decoder).requires_grad_(True)
    return dataclasses.replace(pair, student=dataclasses.replace(pair.student, decoder=decoder))


def test_the_first_loss_is_that_of_the_base_and_only_the_adapter_moves() -> None:
    first, found = [], []
    for config in (CONFIG, LORA):
        pair = new_pair()
        before = {name: x.clone() for name, x in pair.student.decoder.state_dict().items()}
        choose_trained(pair.student, config)
        optimizer = adamw(pair.student.decoder, config)
        steps = [take_step(pair, optimizer, list(PROMPTS), config, number=n) for n in (1, 2)]
        first.append((steps[0].metrics["loss"], [r.answer.ids for r in steps[0].rollouts]))
        after = pair.student.decoder.state_dict()
        moved = {
            name
            for name in after
            if name not in before or not torch.equal(after[name], before[name])
        }
        found.append((moved, optimizer, pair.student.decoder))
    assert first[0] == first[1]
    assert not any(".lora_" in name for name in found[0][0])
    moved, optimizer, decoder = found[1]
    adapted = {name for name, _ in decoder.named_parameters() if ".lora_" in name}
    assert moved == adapted and len(adapted) == 2 * 7 * decoder.config.n_layers
    assert set(optimizer.state) == {p for n, p in decoder.named_parameters() if n in adapted}
    changed = [x for name, x in decoder.state_dict().items() if name.endswith("lora_B.weight")]
    assert all(x.any() for x in changed)


def test_work_saved_counts_what_frozen_weights_cost() -> None:
    """By hand: a frozen weight is used in two products a token, one that is trained in three."""
    pair = new_pair()
    rollouts = rollouts_of(pair)
    chosen = [mask & (i % 2 == 0) for i, mask in enumerate(all_chosen(rollouts))]
    choose_trained(pair.student, LORA)
    got = train_pass(pair, rollouts, chosen, LORA).work_saved
    decoder = pair.student.decoder
    head = decoder.head.weight_VD.numel()
    frozen = sum(
        p.numel() for n, p in decoder.named_parameters()
        if not any(part in n for part in (".lora_", "embed_tokens", "lm_head"))
    )  # fmt: skip
    body = 2 * frozen + 3 * sum(p.numel() for n, p in decoder.named_parameters() if ".lora_" in n)
    costs = [
        body * mg.masked.n_inputs(r, m) + 2 * head * int(mg.batch.head_rows(r)[m].sum())
        for r, m in zip(rollouts, all_chosen(rollouts), strict=True)
    ]
    assert got == pytest.approx(1 - sum(costs[::2]) / sum(costs))


# ---------------------------------------------------------------------------------------- files
@contextmanager
def quiet() -> Iterator[None]:
    """What transformers and peft deprecate in each other is none of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base_folder(folder: Path, family: str, seed: int = 0) -> tuple[Path, Any]:
    """A model of `transformers`, and its folder."""
    raw = raw_config(family)
    model = hugging_face_model(raw, seed)
    with quiet():
        model.save_pretrained(folder)
    byte_bpe().save(str(folder / "tokenizer.json"))  # more ids than rows: those beyond are not used
    edit_json(folder / "generation_config.json", eos_token_id=3)
    return folder, model


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3", SCALED[1]])
def test_peft_reads_what_we_write(family: str, tmp_path: Path) -> None:
    import peft
    import transformers

    base, model = base_folder(tmp_path / "base", family)
    for adapter in (Adapter(3, 7.0, MATRICES), Adapter(2, 0.5, ("k_proj", "down_proj"))):
        decoder = with_adapter(mg.weights.load_decoder(base), adapter)
        folder = tmp_path / f"adapter {adapter.rank}"
        save_adapter(decoder, folder, source=base, base=str(base), base_folder=base)
        ours = logits_of(decoder)
        assert (ours - logits_of(mg.weights.load_decoder(base))).abs().max() > 0.1
        with quiet(), torch.no_grad():
            loaded = peft.PeftModel.from_pretrained(deepcopy(model), folder)
            torch.testing.assert_close(loaded(IDS_BS).logits, ours, atol=5e-5, rtol=1e-4)
            whole = loaded.merge_and_unload()
            torch.testing.assert_close(whole(IDS_BS).logits, ours, atol=5e-5, rtol=1e-4)
    with quiet(), torch.no_grad():  # the folder alone is enough for transformers
        alone = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(alone(IDS_BS).logits, ours, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3", SCALED[1]])
def test_we_read_what_peft_writes(family: str, tmp_path: Path) -> None:
    import peft

    base, model = base_folder(tmp_path / "base", family)
    inner = r".*language_model.*\.(q_proj|up_proj)" if family == "gemma3" else ["q_proj", "up_proj"]
    model.name_or_path = str(base)
    settings = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, target_modules=inner,
                               task_type="CAUSAL_LM", init_lora_weights=False)  # fmt: skip
    with quiet():
        theirs = peft.get_peft_model(model, settings).eval()
        theirs.save_pretrained(tmp_path / "adapter")
    if family == "gemma3":  # peft keeps the pattern; a list of names is what we read
        edit_json(tmp_path / "adapter" / SETTINGS, target_modules=["q_proj", "up_proj"])
    ours = mg.load(tmp_path / "adapter")
    assert ours.base == (str(base), base)
    assert adapter_of(ours.decoder) == Adapter(3, 7.0, ("q_proj", "up_proj"))
    with torch.no_grad():
        expected = theirs(IDS_BS).logits[..., : ours.n_tokens]
        with theirs.disable_adapter():
            assert (theirs(IDS_BS).logits[..., : ours.n_tokens] - expected).abs().max() > 0.1
    torch.testing.assert_close(logits_of(ours.decoder), expected, atol=5e-5, rtol=1e-4)


def test_an_adapter_on_a_base_of_sixteen_bits_works_in_float32_as_in_peft(tmp_path: Path) -> None:
    import peft

    base, model = base_folder(tmp_path / "base", "llama")
    adapter = Adapter(3, 7.0, MATRICES)
    decoder = with_adapter(mg.weights.load_decoder(base), adapter)
    save_adapter(decoder, tmp_path / "a", source=base, base=str(base), base_folder=base)
    ours = mg.load(tmp_path / "a", dtype=torch.bfloat16).decoder
    types = {name: x.dtype for name, x in ours.state_dict().items()}
    assert all((kind == torch.float32) == (".lora_" in name) for name, kind in types.items())
    with quiet(), torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(model.to(torch.bfloat16), tmp_path / "a")
        expected = loaded(IDS_BS).logits.float()
    exact = logits_of(decoder)
    error = (logits_of(ours) - exact).abs().mean()
    assert error < 0.1 and error == pytest.approx(float((expected - exact).abs().mean()), rel=0.3)


@given(st.sampled_from(FAMILIES), adapters)
def test_what_is_written_comes_back(family: str, adapter: Adapter) -> None:
    base, again = new_decoder(family), new_decoder(family)
    decoder = with_adapter(base, adapter)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(raw_config(family)), "utf-8")
        save_adapter(decoder, folder / "a", source=folder, base=name, base_folder=folder)
        load_adapter(again, folder / "a")
    assert adapter_of(again) == adapter
    stored, found = decoder.state_dict(), again.state_dict()
    assert stored.keys() == found.keys()
    assert all(torch.equal(stored[name], found[name]) for name in stored)


# ------------------------------------------------------------------------------------ hostile files
@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("good")
    base, _ = base_folder(work / "base", "llama")
    decoder = with_adapter(mg.weights.load_decoder(base), Adapter(3, 7.0, ("q_proj", "down_proj")))
    save_adapter(decoder, work / "adapter", source=base, base=str(base), base_folder=base)
    return work


def settings(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / SETTINGS, **changes)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        found = load_file(folder / TENSORS)
        change(found)
        save_file(found, folder / TENSORS)

    return apply


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content, "utf-8")


DOWN = "base_model.model.model.layers.0.mlp.down_proj"
SPOILT: list[tuple[Callable[[Path], object], str]] = [
    (settings(r=0), "a whole number r above 0 in .*adapter_config.json, got 0; "),
    (settings(r=-3), "a whole number r above 0 .*got -3"),
    (settings(r=3.0), "a whole number r above 0 .*got 3.0"),
    (settings(r=True), "a whole number r above 0 .*got True"),
    (settings(r="3"), "a whole number r above 0 .*got '3'"),
    (settings(r=...), "a whole number r above 0 .*got None"),
    (settings(r=10**30), "a whole number r above 0 .*got 10{30}"),
    (settings(r=2**31 - 1), "got 8 of another shape: .* for .*2147483647"),
    (settings(r=4), r"adapter_config.json for the base .*got 8 of another shape: .*\[3, 24\] for \[4, 24\]"),
    (settings(lora_alpha=float("nan")), "got NaN, which JSON does not have"),
    (settings(lora_alpha=float("inf")), "got Infinity, which JSON does not have"),
    (settings(lora_alpha=10**400), "expected numbers below 1.8e308"),
    (settings(lora_alpha=0), "a finite number lora_alpha above 0 .*got 0;"),
    (settings(lora_alpha=-1), "a finite number lora_alpha above 0 .*got -1"),
    (settings(lora_alpha=True), "a finite number lora_alpha above 0 .*got True"),
    (settings(lora_alpha="7"), "a finite number lora_alpha above 0 .*got '7'"),
    (settings(lora_alpha=...), "a finite number lora_alpha above 0 .*got None"),
    (settings(target_modules=["q_proj", "lm_head"]), r"a list out of q_proj, .*got \['q_proj', 'lm_head'\]"),
    (settings(target_modules="all-linear"), "a list out of q_proj, .*got 'all-linear'; merge the"),
    (settings(target_modules=[]), r"a list out of q_proj, .*got \[\]"),
    (settings(target_modules=[["q_proj"]]), r"a list out of q_proj, .*got \[\['q_proj'\]\]"),
    (settings(target_modules=None), "a list out of q_proj, .*got None"),
    (settings(target_modules=["q_proj"]), "got 4 unexpected: .*down_proj.*not of the same model"),
    (settings(target_modules=["q_proj", "k_proj", "down_proj"]), "got 4 missing: .*k_proj"),
    (settings(peft_type="IA3"), "expected peft_type 'LORA' in .*got 'IA3'; merge the adapter"),
    (settings(peft_type=...), "expected peft_type LORA and the name of a model .*got None and"),
    (settings(task_type="SEQ_CLS"), "expected task_type 'CAUSAL_LM' in .*got 'SEQ_CLS'"),
    (settings(use_dora=True), "expected use_dora off in .*got True; merge the adapter"),
    (settings(use_rslora=True), "expected use_rslora off .*got True"),
    (settings(bias="all"), "expected bias 'none' in .*got 'all'"),
    (settings(modules_to_save=["lm_head"]), r"expected modules_to_save off .*got \['lm_head'\]"),
    (settings(rank_pattern={"q_proj": 2}), "expected rank_pattern off .*got {'q_proj': 2}"),
    (settings(layers_to_transform=[1]), r"expected layers_to_transform off .*got \[1\]"),
    (settings(init_lora_weights="pissa"), "expected init_lora_weights True or 'gaussian' in .*'pissa'"),
    (settings(exclude_modules=["q_proj"]), "expected exclude_modules '.*vision_tower.*' in .*got .'q_proj'"),
    (settings(of_the_future={"a": 1}), "expected of_the_future off .*got {'a': 1}"),
    (settings(base_model_name_or_path=None), "the name of a model as base_model_name_or_path .*None"),
    (settings(base_model_name_or_path=""), "the name of a model as base_model_name_or_path .*''"),
    (settings(base_model_name_or_path=3), "the name of a model as base_model_name_or_path .*3"),
    (settings(base_model_name_or_path="./absent"),
     "the base of the adapter .*adapter: expected a model folder, found no folder absent; .*correct base_"),
    (settings(base_model_name_or_path="owner/absent"), "the base of the adapter .*the hub did not give it"),
    (lambda folder: edit_json(folder / SETTINGS, base_model_name_or_path=str(folder)),
     "expected a whole model as the base of the adapter .*, got the adapter .*; correct base_model_name"),
    (lambda folder: edit_json(folder / SETTINGS, base_model_name_or_path=str(folder / SETTINGS)),
     "the base of the adapter .*: expected a model folder, got the file"),
    (text(SETTINGS, "{"), "adapter_config.json: expected one JSON object, got"),
    (text(SETTINGS, "[1]"), r"adapter_config.json: expected an object such as .*, got a list of 1"),
    (lambda folder: (folder / TENSORS).unlink(), f"expected {TENSORS} in .*, found none; download it"),
    (text(TENSORS, "x" * 100), "expected a whole safetensors file .*adapter_model.safetensors with a header"),
    (tensors(lambda t: t.pop(f"{DOWN}.lora_A.weight")), "got 1 missing: model.layers.0.mlp.down_proj.lora_A"),
    (tensors(lambda t: t.update(x=torch.ones(1))), "got 1 unexpected: x; "),
    (tensors(lambda t: t.update({f"{DOWN}.lora_B.bias": torch.ones(20)})), "got 1 unexpected: .*lora_B.bias"),
    (tensors(lambda t: t.update({f"{DOWN}.weight": torch.ones(20, 24)})), "got 1 unexpected: .*down_proj.weight"),
    (tensors(lambda t: t.update({"model.layers.0.mlp.down_proj.lora_A.weight": torch.ones(3, 24)})),
     "expected each tensor once, got .*down_proj.lora_A.weight again"),
    (tensors(lambda t: t.update({f"{DOWN}.lora_A.weight": torch.ones(24, 3)})), r"\[24, 3\] for \[3, 24\]"),
    (tensors(lambda t: t.update({f"{DOWN}.lora_A.weight": torch.ones(3, 24, 1)})), r"\[3, 24, 1\] for"),
    (tensors(lambda t: t.update({f"{DOWN}.lora_A.weight": torch.ones(3, 24, dtype=torch.int8)})),
     "expected float tensors, got .*down_proj.lora_A.weight of type I8"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=[m[:50] for _, m in SPOILT])
def test_an_adapter_that_is_not_right_is_refused(
    good: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    """A dry run, which reads no weights, refuses it as well."""
    folder = tmp_path / "adapter"
    shutil.copytree(good / "adapter", folder)
    spoil(folder)
    for device in ("cpu", "meta"):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            mg.load(folder, device=device)


def test_shapes_alone_are_read_where_no_weights_are(good: Path) -> None:
    found, shapes = (mg.load(good / "adapter", device=d).decoder for d in ("cpu", "meta"))
    assert adapter_of(shapes) == adapter_of(found) == Adapter(3, 7.0, ("q_proj", "down_proj"))
    for name, tensor in shapes.state_dict().items():
        assert tensor.is_meta and tensor.shape == found.state_dict()[name].shape


def test_an_adapter_for_another_base_is_refused(good: Path, tmp_path: Path) -> None:
    base, _ = base_folder(tmp_path / "other", "smollm3")
    edit_json(base / "config.json", hidden_size=20)
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / SETTINGS, base_model_name_or_path=str(base))
    mg.load(tmp_path / "adapter")  # a model of the same sizes takes it
    small = raw_config("llama", num_hidden_layers=1)
    with quiet():
        hugging_face_model(small).save_pretrained(tmp_path / "small")
    edit_json(tmp_path / "adapter" / SETTINGS, base_model_name_or_path=str(tmp_path / "small"))
    with pytest.raises(ValueError, match=r"for the base .*small.*got 4 unexpected: model.layers.1"):
        mg.load(tmp_path / "adapter")


def test_another_adapter_cannot_take_the_place_of_one(good: Path) -> None:
    decoder = with_adapter(mg.weights.load_decoder(good / "base"), Adapter(4, 7.0, ("q_proj",)))
    with pytest.raises(ValueError, match=r"expected Adapter\(rank=4, .*got Adapter\(rank=3, "):
        load_adapter(decoder, good / "adapter")


def test_a_base_without_a_tokenizer_file_in_the_adapter_lends_its_own(
    good: Path, tmp_path: Path
) -> None:
    for name in (SETTINGS, TENSORS):
        shutil.copy(good / "adapter" / name, tmp_path / name)
    bare, whole = mg.load(tmp_path), mg.load(good / "adapter")
    assert (bare.folder, whole.folder) == (good / "base", good / "adapter")
    assert bare.eos_ids == whole.eos_ids == (3,)
    (good / "base" / "generation_config.json").rename(tmp_path / "kept.json")
    edit_json(good / "base" / "config.json", eos_token_id=4)
    try:
        assert mg.load(tmp_path).eos_ids == (4,)
        assert mg.load(good / "adapter").eos_ids == (3,)
    finally:
        (tmp_path / "kept.json").rename(good / "base" / "generation_config.json")


# ------------------------------------------------------------------------------ the command line
@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    tiny_folder(work / "student", "gemma3", sentencepiece_bpe(), begin="<s>", end="</s>")
    tiny_folder(work / "teacher", "llama", byte_bpe(), end="<|im_end|>", seed=2)
    rows = [{"prompt": text, "completion": " dog"} for text in ("hello", "the fox 🙂", "def add")]
    (work / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert main(command(work, "run", "--lora-rank", "3", "--lora-alpha", "5")) == 0
    return work


def command(work: Path, out: str, *more: str, student: str = "student") -> list[str]:
    return [
        "train", "--teacher", str(work / "teacher"), "--student", str(work / student), "--prompts",
        str(work / "p.jsonl"), "--out", str(work / out), "--steps", "2", "--batch-size", "2",
        "--max-new-tokens", "6", "--lr", "0.05", "--warmup", "0", "--plain-prompt", "--save-every", "1",
        *more,
    ]  # fmt: skip


def test_a_run_leaves_adapters_alone(work: Path) -> None:
    files = {
        SETTINGS, TENSORS, "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    }  # fmt: skip
    found = {p.name for p in (work / "run" / "final").iterdir()}
    assert found == files
    for step in ("step-1", "step-2"):
        names = {p.name for p in (work / "run" / "checkpoints" / step).iterdir()}
        assert names == {*files, "checkpoint.json", "optimizer.safetensors"}
        stored = load_file(work / "run" / "checkpoints" / step / "optimizer.safetensors")
        assert all(".lora_" in name for name in stored) and len(stored) == 3 * 2 * 7 * 2
    tensors = load_file(work / "run" / "final" / TENSORS)
    assert len(tensors) == 2 * 7 * 2
    raw = json.loads((work / "run" / "final" / SETTINGS).read_text("utf-8"))
    assert raw["base_model_name_or_path"] == str((work / "student").resolve())
    assert (raw["r"], raw["lora_alpha"], raw["target_modules"]) == (3, 5, list(MATRICES))


def test_generate_and_eval_take_the_folder(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = mg.load(work / "run" / "final").decoder
    merge(decoder)
    mg.weights.save_decoder(decoder, work / "merged", source=work / "student")
    said = []
    for name in ("run", "run/final", "merged", "student"):
        args = [
            "generate",
            str(work / name),
            "hello",
            "--max-new-tokens",
            "30",
            "--temperature",
            "0",
        ]
        assert main(args) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] != said[3]
    figures = []
    for name in ("run", "merged", "student"):
        args = ["eval", "--teacher", str(work / "teacher"), "--student", str(work / name), "--prompts",
                str(work / "p.jsonl"), "--json", "--plain-prompt", "--max-new-tokens", "8"]  # fmt: skip
        assert main(args) == 0
        figures.append(json.loads(capsys.readouterr().out)["bits_per_byte_student"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5) != figures[2]
    shutil.rmtree(work / "run" / "final")
    assert main(["generate", str(work / "run"), "hello", "--max-new-tokens", "30",
                 "--temperature", "0"]) == 0  # fmt: skip
    out, err = capsys.readouterr()
    assert out == said[0] and "the model is checkpoints/step-2" in err
    assert main([*command(work, "run", "--lora-rank", "3", "--lora-alpha", "5"), "--resume"]) == 0
    assert adapter_of(mg.load(work / "run" / "final").decoder) == Adapter(3, 5.0, MATRICES)


def test_training_goes_on_with_the_adapter_of_a_student(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--lora-rank", "3", "--lora-alpha", "5", "--out", str(tmp_path / "on"))
    assert main(command(work, "x", *more, student="run/final")) == 0
    first = json.loads((tmp_path / "on" / "final" / SETTINGS).read_text("utf-8"))
    assert first["base_model_name_or_path"] == str((work / "student").resolve())
    start, end = (load_file(p / "final" / TENSORS) for p in (work / "run", tmp_path / "on"))
    assert start.keys() == end.keys()
    moved = max(float((start[name] - end[name]).abs().max()) for name in start)
    assert 0.01 < moved < 1
    capsys.readouterr()
    for rank in ("3", "4"):
        for dry in ((), ("--dry-run",)):
            more = ("--lora-rank", rank, *dry)
            assert main(command(work, "never", *more, student="run/final")) == 2
            line = capsys.readouterr().err
            assert "expected --lora-rank 3 --lora-alpha 5 --lora-targets q_proj,k_proj," in line
            assert f"has, got {rank}, 16 and q_proj," in line
    assert not (work / "never").exists()


def test_where_the_weights_are_trained_an_adapter_is_merged_first(
    work: Path, tmp_path: Path
) -> None:
    assert main(command(work, "x", "--out", str(tmp_path / "on"), student="run/final")) == 0
    assert {p.name for p in (tmp_path / "on" / "final").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json",
    }  # fmt: skip
    rows = [(tmp_path / "on" / "metrics.jsonl").read_text("utf-8").splitlines()[0]]
    decoder = mg.load(work / "run" / "final").decoder
    merge(decoder)
    mg.weights.save_decoder(decoder, tmp_path / "whole", source=work / "student")
    args = command(work, "x", "--out", str(tmp_path / "same"))
    args[args.index("--student") + 1] = str(tmp_path / "whole")
    assert main(args) == 0
    rows.append((tmp_path / "same" / "metrics.jsonl").read_text("utf-8").splitlines()[0])
    losses = [json.loads(row)["loss"] for row in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_adapter_teaches_as_its_merged_model_does(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    decoder = with_adapter(
        mg.load(work / "teacher").decoder, Adapter(2, 9.0, ("o_proj", "gate_proj"))
    )
    save_adapter(decoder, folder, source=work / "teacher", base=str(work / "teacher"),
                 base_folder=work / "teacher")  # fmt: skip
    merge(decoder)
    mg.weights.save_decoder(decoder, tmp_path / "merged", source=work / "teacher")
    losses = []
    for teacher in (folder, tmp_path / "merged", work / "teacher"):
        args = command(
            work, "x", "--out", str(tmp_path / f"run of {teacher.name}"), "--where", "all"
        )
        args[args.index("--teacher") + 1] = str(teacher)
        assert main(args) == 0
        rows = (tmp_path / f"run of {teacher.name}" / "metrics.jsonl").read_text("utf-8")
        losses.append(json.loads(rows.splitlines()[0])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) != losses[2]


def test_a_dry_run_counts_the_adapter(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = []
    for more in ((), ("--lora-rank", "3"), ("--lora-rank", "3", "--lora-targets", "q_proj")):
        assert main(command(work, "never", "--dry-run", *more)) == 0
        lines = capsys.readouterr().out.splitlines()
        figures.append(json.loads(lines[-1]))
        assert lines[0].endswith(f", {figures[-1]['trained_parameters']:,} trained")
    tensors = load_file(work / "run" / "checkpoints" / "step-2" / TENSORS)
    sizes = {name: x.numel() for name, x in tensors.items()}
    assert figures[1]["trained_parameters"] == sum(sizes.values())
    assert figures[2]["trained_parameters"] == sum(n for x, n in sizes.items() if ".q_proj." in x)
    assert figures[0]["trained_parameters"] == figures[0]["student_parameters"]
    assert len({one["student_parameters"] for one in figures}) == 1
    assert figures[1]["memory_gib"]["optimizer"] < figures[0]["memory_gib"]["optimizer"]
    assert not (work / "never").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_rank": -1}, "expected --lora-rank at least 0, got -1"),
        ({"lora_rank": 4, "lora_alpha": 0}, "expected --lora-alpha above 0, got 0"),
        ({"lora_rank": 4, "lora_alpha": float("inf")}, "expected --lora-alpha finite, got inf"),
        ({"lora_alpha": 8.0}, "expected --lora-alpha with --lora-rank above 0 only, got 8.0"),
        ({"lora_targets": "q_proj"}, "expected --lora-targets with --lora-rank above 0 only"),
        ({"lora_rank": 4, "lora_targets": "lm_head"}, "expected --lora-targets all, or a list out of q_"),
        ({"lora_rank": 4, "lora_targets": ""}, "expected --lora-targets all, or a list .*, got ''"),
        ({"lora_rank": 4, "lora_targets": "q_proj,q_proj"}, "expected --lora-targets all, or a list"),
        ({"lora_rank": 4, "lora_targets": "q_proj, k_proj"}, "without spaces, got 'q_proj, k_proj'"),
        ({"lora_rank": 4, "lora_targets": "all,q_proj"}, "expected --lora-targets all, or a list"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_layers_are_named_in_the_order_of_their_use() -> None:
    assert Config().adapted == ()
    assert Config(lora_rank=1).adapted == MATRICES
    assert Config(lora_rank=1, lora_targets="down_proj,q_proj").adapted == ("q_proj", "down_proj")


def test_a_student_of_a_hub_name_is_named_as_it_is(good: Path, tmp_path: Path) -> None:
    decoder = with_adapter(mg.weights.load_decoder(good / "base"), Adapter(2, 1.5, ("q_proj",)))
    save_adapter(
        decoder, tmp_path, source=good / "base", base="owner/name", base_folder=good / "base"
    )
    raw = json.loads((tmp_path / SETTINGS).read_text("utf-8"))
    assert (raw["base_model_name_or_path"], raw["lora_alpha"]) == ("owner/name", 1.5)


def test_distill_without_a_folder_trains_an_adapter_too() -> None:
    pair = new_pair()
    history = distill(pair.student, pair.teacher, PROMPTS, dataclasses.replace(LORA, steps=2))
    assert len(history) == 2
    assert adapter_of(pair.student.decoder) == Adapter(3, 5.0, MATRICES)
