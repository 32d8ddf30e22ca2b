# SPDX-License-Identifier: Apache-2.0
"""Modules of `transformers` and `peft`: the same numbers as theirs, and as our own decoder's."""

import warnings
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

import minigold as mg
from minigold import hf
from minigold.carry import Reading
from minigold.checkpoint import checkpoints_of
from minigold.config import Config
from minigold.data import Prompt
from minigold.dry_run import sizes_of
from minigold.evaluate import evaluate
from minigold.hf import HFDecoder, wrap
from minigold.load import LanguageModel
from minigold.pair import make_pair
from minigold.sample import CausalLM, pad, sample
from minigold.teacher import score
from minigold.train import adamw, distill, take_step
from reference import sample_slowly
from tiny_folders import CHATML, tiny_folder
from tiny_models import hugging_face_model, tiny_model
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")

SHAPE: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 200, "vocab_size": 41,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLIDES = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 6, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 6, "final_logit_softcapping": 3.0, **SLIDES},
    "phi3": {"sliding_window": 4},
    "olmo2": {},
    "mistral": {"head_dim": 6, "sliding_window": 4},
}
OTHERS: dict[str, dict[str, Any]] = {  # another scale, cap, bias, trunk, mask, router
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"head_dim": 6, "final_logit_softcapping": 2.0, "sliding_window": 4},
    "phi": {"partial_rotary_factor": 0.67, "hidden_size": 24},
    "gpt2": {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0},
    "bloom": {},
    "mixtral": {"num_local_experts": 3, "sliding_window": 4},
}
UNKEPT: dict[str, dict[str, Any]] = {  # they keep other things than keys and values
    "mamba": {"state_size": 4, "hidden_size": 12},
    "recurrent_gemma": {"hidden_size": 32, "lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 4,
                        "logits_soft_cap": 3.0},
}  # fmt: skip
ALL = {**FAMILIES, **OTHERS, **UNKEPT}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [3, 1], [2, 7, 1, 8, 2], [3, 1]]
EXACT: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}
CONFIG = Config(
    steps=3, batch_size=4, micro_batch=3, max_new_tokens=9, lr=3e-3, warmup=1, where="all",
    student_plain=True, teacher_plain=True, max_overhang=1.0, save_every=1,
)  # fmt: skip


def module_of(family: str, **changes: Any) -> Any:
    """Random weights in every tensor, large enough that predictions differ from uniform."""
    raw = {"model_type": family, **SHAPE, **ALL[family], **changes}
    return hugging_face_model(raw)


@cache
def decoder_of(family: str) -> HFDecoder:
    return HFDecoder(module_of(family))


def prompts_of(*texts: str, **fields: Any) -> list[Prompt]:
    one = {"completion": None, "teacher_prompt": None, "answer": None, "extra": {}, **fields}
    return [Prompt(prompt=text, line=i + 1, **one) for i, text in enumerate(texts)]


TEXTS = prompts_of("hello", "the fox", "def add", "Paris is", "x")


def teacher_of() -> LanguageModel:
    return tiny_model("llama", byte_bpe(), end="<|im_end|>", seed=2)


def student_of(family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> LanguageModel:
    tokenizer = sentencepiece_bpe()
    n, end = tokenizer.get_vocab_size() + 3, tokenizer.token_to_id("</s>")
    return wrap(module_of(family, vocab_size=n, eos_token_id=end, **changes).to(dtype), tokenizer)


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


# -- the numbers of transformers -----------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_logits_are_those_of_the_module(family: str) -> None:
    decoder = decoder_of(family)
    lengths = [len(prompt) for prompt in PROMPTS]
    with torch.no_grad():
        logits_BSV = decoder.head.logits(decoder(pad(PROMPTS, decoder.device)))
        for prompt, n, logits_SV in zip(PROMPTS, lengths, logits_BSV, strict=True):
            wanted = decoder.module(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(logits_SV[:n], wanted, **EXACT)
    ids = {"cohere": 0.0625, "granite": 0.125}
    assert decoder.scale == ids.get(family, 1)
    assert (decoder.head.bias_V is not None) == (family == "phi")


@pytest.mark.parametrize("family", [*FAMILIES, *UNKEPT])
def test_greedy_answers_are_those_of_generate(family: str) -> None:
    decoder = decoder_of(family)
    found = sample(decoder, PROMPTS, max_new_tokens=12, eos_ids=[2], temperature=0)
    for prompt, one in zip(PROMPTS, found, strict=True):
        wanted = decoder.module.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12,
            do_sample=False, eos_token_id=2, use_cache=family not in UNKEPT,
        )  # fmt: skip
        assert one.ids == wanted[0, len(prompt) :].tolist()
    assert (decoder.cache_kind is None) == (family in UNKEPT)


@pytest.mark.parametrize("family", ALL)
def test_sampling_reads_each_row_as_if_it_stood_alone(family: str) -> None:
    """Ids and log-probabilities are those of whole passes, past the window, while rows leave."""
    decoder = decoder_of(family)
    found = sample(decoder, PROMPTS, max_new_tokens=11, eos_ids=range(0, 41, 9), seed=5)
    assert len({len(one.ids) for one in found}) > 1
    for i, (prompt, one) in enumerate(zip(PROMPTS, found, strict=True)):
        g = torch.Generator().manual_seed(5 + i)
        uniform = torch.rand(11, generator=g, dtype=torch.float64).tolist()
        with torch.no_grad():
            assert one.ids == sample_slowly(decoder, prompt, uniform, len(one.ids))
            hidden_SD = decoder(torch.tensor([prompt + one.ids]))[0, len(prompt) - 1 : -1]
        logp_SV = decoder.head.logits(hidden_SD).log_softmax(-1)
        wanted = logp_SV.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
        torch.testing.assert_close(one.logp_S, wanted, **EXACT)


@st.composite
def passes(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int]]:
    """Rows of two prefills, how many tokens of each stay, and the rows that stay after a step."""
    rows = draw(
        st.lists(st.lists(st.integers(3, 40), min_size=1, max_size=7), min_size=2, max_size=4)
    )
    cuts = [draw(st.integers(1, len(row))) for row in rows]
    kept = draw(st.sets(st.integers(0, len(rows) - 1), min_size=1))
    return rows, cuts, sorted(kept)


@given(
    family=st.sampled_from(["gemma3_text", "phi3", "bloom", "recurrent_gemma"]),
    given=passes(), split=st.integers(1, 3), more=st.integers(1, 3),
)  # fmt: skip
def test_what_a_cache_holds_is_what_was_read(
    family: str, given: tuple[list[list[int]], list[int], list[int]], split: int, more: int
) -> None:
    """Cut, filled from two others in any order, read on by one token and by several, thinned out."""
    decoder, (rows, cuts, kept) = decoder_of(family), given
    held = decoder.empty_cache(len(rows), 30)
    with torch.no_grad():
        for part in (range(split % len(rows)), range(split % len(rows), len(rows))):
            if not part:
                continue
            some = [rows[i] for i in part]
            read = decoder.empty_cache(len(some), 30)
            decoder(pad(some, decoder.device), read)
            read.cut(torch.tensor([cuts[i] for i in part]))
            held.fill(torch.tensor(list(part)), read, torch.arange(len(some)))
        texts = [row[:n] for row, n in zip(rows, cuts, strict=True)]
        for last, n_new in enumerate((1, more)):
            new = torch.arange(len(texts) * n_new).view(-1, n_new) % 38 + 3
            told = decoder(new, held)
            texts = [[*text, *ids] for text, ids in zip(texts, new.tolist(), strict=True)]
            for text, hidden_SD in zip(texts, told, strict=True):
                wanted_SD = decoder(torch.tensor([text]))[0, -n_new:]
                torch.testing.assert_close(hidden_SD, wanted_SD, **EXACT)
            if not last:
                held.keep(torch.tensor(kept))
                texts = [texts[i] for i in kept]


# -- the numbers of our own decoder --------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("folders")
    for family in ("llama", "qwen3", "gemma3_text", "mistral"):
        tiny_folder(work / family, family, sentencepiece_bpe(), begin="<s>", end="</s>")
    tiny_folder(work / "chat", "llama", byte_bpe(), end="<|im_end|>", template=CHATML, seed=2)
    return work


def both_of(folder: Path) -> tuple[LanguageModel, LanguageModel]:
    """The same folder as our decoder and as a module."""
    import transformers

    module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return mg.load(folder), wrap(module, folder)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mistral"])
def test_a_step_is_that_of_our_own_decoder(family: str, folders: Path) -> None:
    """Ids, rollouts, loss and every weight after it; the module as student and as teacher."""
    own, module = both_of(folders / family)
    assert vars(own).keys() == vars(module).keys()
    for key in vars(own).keys() - {"decoder", "name"}:
        assert getattr(own, key) == getattr(module, key) or key == "tokenizer"
    told, steps = [], []
    for student in (own, module):
        teacher = mg.load(folders / "chat")
        pair = make_pair(student, teacher)
        student.decoder.train()
        optimizer = adamw(student.decoder, CONFIG)
        steps.append(take_step(pair, optimizer, TEXTS[:4], CONFIG, number=1))
        told.append({n.removeprefix("module."): p for n, p in student.decoder.named_parameters()})
    ours, theirs = steps
    assert [r.answer.ids for r in ours.rollouts] == [r.answer.ids for r in theirs.rollouts]
    for key in (
        "loss",
        "grad_norm",
        "reverse_kl_per_byte",
        "overhang_fraction",
        "completion_bytes",
    ):
        assert theirs.metrics[key] == pytest.approx(ours.metrics[key], rel=1e-4), key
    assert told[0].keys() == told[1].keys()
    for name, weight in told[0].items():
        torch.testing.assert_close(weight, told[1][name], atol=2e-5, rtol=0)


def test_a_teacher_scores_as_our_own_decoder(folders: Path) -> None:
    pair, found = None, []
    for teacher in both_of(folders / "chat"):
        pair = make_pair(mg.load(folders / "gemma3_text"), teacher)
        readings = [Reading([3, 4, 5], [7, 8, 9]), Reading([6], [])]
        found.append(
            score(teacher.decoder, readings, end_ids=teacher.eos_ids, side=pair.events.teacher)
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.hidden_MD, other.hidden_MD, **EXACT)
        torch.testing.assert_close(one.logp_T, other.logp_T, **EXACT)
        assert one.end_logp == pytest.approx(other.end_logp, abs=1e-5)


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["phi3", "olmo2", "mistral", "phi", "mamba"])
def test_training_lowers_the_loss(family: str) -> None:
    """On fixed answers, all of them in each step, so that losses can be compared."""
    changes = {"num_key_value_heads": 4} if family == "phi" else {}
    config = Config(**{**vars(CONFIG), "steps": 8, "lr": 0.01, "batch_size": 5, "lmbda": 0.0})
    texts = prompts_of("hello", "the fox", "def add", "Paris is", "x", completion=" the dog is")
    losses = [
        x["loss"] for x in distill(student_of(family, **changes), teacher_of(), texts, config)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def adapted(module: Any, **changes: Any) -> Any:
    """With an adapter of peft that does something from the start."""
    import peft

    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = peft.get_peft_model(module, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, one in found.named_parameters():
            if "lora_B" in name:
                one.normal_(std=0.1)
    return found


def adapted_student(**changes: Any) -> LanguageModel:
    tokenizer = sentencepiece_bpe()
    n, end = tokenizer.get_vocab_size() + 3, tokenizer.token_to_id("</s>")
    module = module_of("mistral", vocab_size=n, eos_token_id=end)
    return wrap(adapted(module, **changes), tokenizer)


def test_of_a_student_with_an_adapter_the_adapter_alone_is_trained() -> None:
    student = adapted_student()
    before = weights_of(student.decoder)
    needed = {n for n, p in student.decoder.named_parameters() if p.requires_grad}
    assert needed and all("lora_" in name for name in needed)
    distill(student, teacher_of(), TEXTS, CONFIG)
    after = weights_of(student.decoder)
    assert {name for name in before if not torch.equal(before[name], after[name])} == needed
    assert needed == {n for n, p in student.decoder.named_parameters() if p.requires_grad}


def test_a_prompt_that_peft_has_learnt_is_refused() -> None:
    import peft

    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="expected the head of PeftModelForCausalLM to read what"):
        HFDecoder(peft.get_peft_model(module_of("llama"), settings))


@pytest.mark.parametrize(
    "changes", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
def test_an_adapter_on_the_head_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"matrix and maybe a bias.*got .*; leave the head out of"):
        HFDecoder(adapted(module_of("llama"), **changes))


def test_weights_that_the_caller_froze_stay_as_they_are() -> None:
    student = student_of("olmo2")
    trunk = student.decoder.module.model
    trunk.embed_tokens.requires_grad_(False)
    before = weights_of(trunk)
    distill(student, teacher_of(), TEXTS, CONFIG)
    same = {name for name, x in weights_of(trunk).items() if torch.equal(x, before[name])}
    assert same == {"embed_tokens.weight"}
    student.decoder.requires_grad_(False)
    with pytest.raises(ValueError, match=r"require a gradient in \w+, got none; an adapter"):
        distill(student, teacher_of(), TEXTS, CONFIG)


@pytest.mark.parametrize("awake", [True, False])
def test_modes_stay_as_they_were(awake: bool) -> None:
    student, teacher = student_of("phi3"), student_of("mistral")
    modules = [student.decoder.module, teacher.decoder.module]
    for one in modules:
        one.train(awake)
        one.model.norm.train(not awake)
    before = [[part.training for part in one.modules()] for one in modules]
    seen = []
    for part in (modules[0].model.layers[0], modules[1].model.layers[0]):
        part.register_forward_pre_hook(lambda part, _: seen.append(part.training))
    distill(student, teacher, TEXTS, CONFIG)
    assert [[part.training for part in one.modules()] for one in modules] == before
    assert seen.count(True) == 1  # the look at the student's two modes


def test_dropout_is_refused_in_a_student_and_off_in_a_teacher() -> None:
    dropping, teacher = student_of("mistral", attention_dropout=0.3), teacher_of()
    with pytest.raises(
        ValueError, match="states in train and eval mode, got others, as with dropout"
    ):
        distill(dropping, teacher, TEXTS, CONFIG)
    with pytest.raises(ValueError, match=r"got dropout \(.*lora_dropout.default 0.05\); set each"):
        distill(adapted_student(lora_dropout=0.05), teacher, TEXTS, CONFIG)
    pair = make_pair(dropping, teacher)
    assert evaluate(pair, TEXTS[:2], CONFIG)["prompts"] == 2  # nothing is trained there
    dropping.decoder.module.train()
    read = [Reading([3, 4], [5, 6, 7])]
    pair = make_pair(student_of("olmo2"), dropping)
    first, second = (
        dropping.read(read, side=pair.events.teacher, micro_batch=1, temperature=1.0)[0].hidden_MD
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_looking_at_a_module_draws_no_random_numbers() -> None:
    module, state = module_of("mistral", attention_dropout=0.3), torch.get_rng_state()
    with pytest.raises(ValueError, match="as with dropout"):
        HFDecoder(module).train()
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpointing_changes_nothing_but_memory() -> None:
    config = Config(**{**vars(CONFIG), "gradient_checkpointing": True})
    plain, saving = student_of("phi3"), student_of("phi3")
    passes = [0, 0]

    def count(which: int) -> None:
        passes[which] += torch.is_grad_enabled()

    for i, student in enumerate((plain, saving)):
        layer = student.decoder.module.model.layers[0].mlp  # hooks of the layer itself run once
        layer.register_forward_pre_hook(lambda *_, i=i: count(i))
    one = distill(plain, teacher_of(), TEXTS, CONFIG)
    other = distill(saving, teacher_of(), TEXTS, config)
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=1e-5)
    assert not plain.decoder.checkpointing and saving.decoder.checkpointing
    assert passes[1] == 2 * passes[0] > 0
    distill(saving, teacher_of(), TEXTS, CONFIG)
    assert saving.decoder.checkpointing  # the caller's own setting stays


def test_one_module_is_not_both_sides() -> None:
    """Wrapped twice it is two decoders, and still the same weights."""
    student = student_of("mistral")
    teacher = wrap(student.decoder.module, student.tokenizer)
    with pytest.raises(ValueError, match="a teacher with weights of its own, got some of the stud"):
        distill(student, teacher, TEXTS, CONFIG)


@pytest.mark.parametrize("family", ["olmo2", "gemma3_text", "cohere"])
def test_sixteen_bits(family: str) -> None:
    student = student_of(family, dtype=torch.bfloat16)
    teacher = student_of("mistral", dtype=torch.bfloat16)
    assert (student.decoder.dtype, teacher.facts["teacher_dtype"]) == (torch.bfloat16, "bfloat16")
    history = distill(student, teacher, TEXTS, CONFIG)
    assert all(0 < row["loss"] < 50 and row["grad_norm"] > 0 for row in history)
    assert {p.dtype for p in student.decoder.parameters()} == {torch.bfloat16}


# -- tokenizers ----------------------------------------------------------------------------------


def test_tokenizers_of_each_kind_speak_alike(folders: Path) -> None:
    import transformers

    folder = folders / "chat"
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    by_folder, by_object, bare = (
        wrap(module, one)
        for one in (folder, fast, Tokenizer.from_file(str(folder / "tokenizer.json")))
    )
    texts = [one.tokenizer.to_str() for one in (by_folder, by_object, bare)]
    assert len(set(texts)) == 1
    for key in ("template", "eos_ids", "end_id", "n_tokens", "context", "bos_token", "eos_token"):
        assert getattr(by_folder, key) == getattr(by_object, key), key
    assert by_folder.template == CHATML
    assert (bare.template, bare.eos_ids) == (None, by_folder.eos_ids)
    place = by_object.folder
    assert place.is_dir()
    del by_object
    assert not place.exists()  # nothing is left behind


def test_prompts_of_messages_are_rendered(folders: Path) -> None:
    import transformers

    module = transformers.AutoModelForCausalLM.from_pretrained(folders / "chat")
    student = wrap(module, transformers.AutoTokenizer.from_pretrained(folders / "chat"))
    config = Config(**{**vars(CONFIG), "student_plain": False, "steps": 1})
    (row,) = distill(student, mg.load(folders / "llama"), TEXTS, config)
    assert row["grad_norm"] > 0


# -- files ---------------------------------------------------------------------------------------

VARYING = {"seconds", "seconds_sample", "seconds_teacher", "seconds_train", "peak_memory_gib"}


def numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in VARYING} for row in history]


@pytest.fixture
def quiet_peft() -> Iterator[None]:
    """What transformers and peft deprecate in each other is none of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("kind", ["tied", "adapter"])
def test_a_run_of_a_module_is_written_resumed_and_read_again(
    kind: str, tmp_path: Path, quiet_peft: None
) -> None:
    import peft
    import transformers

    def student() -> LanguageModel:
        if kind == "adapter":
            return adapted_student(init_lora_weights="gaussian")
        return student_of("phi3", tie_word_embeddings=True)

    torch.manual_seed(0)
    first = student()
    base = deepcopy(first.decoder.module)
    whole = distill(first, teacher_of(), TEXTS, CONFIG, out=tmp_path / "whole")
    torch.manual_seed(0)
    stopped = student()
    distill(stopped, teacher_of(), TEXTS, CONFIG, out=tmp_path / "run", stop=lambda: True)
    (checkpoint,) = checkpoints_of(tmp_path / "run")
    assert checkpoint.name == "step-1"
    torch.manual_seed(1)  # an adapter that begins elsewhere: its numbers come from the checkpoint
    again = student()
    if kind == "adapter":
        again.decoder.module.get_base_model().load_state_dict(
            stopped.decoder.module.get_base_model().state_dict()
        )
    rows = distill(again, teacher_of(), TEXTS, CONFIG, out=tmp_path / "run", resume=True)
    assert numbers(rows) == numbers(whole)
    for name, weight in weights_of(first.decoder).items():
        assert torch.equal(weight, again.decoder.state_dict()[name]), name
    finished = student()
    distill(finished, teacher_of(), TEXTS, CONFIG, out=tmp_path / "run", resume=True)
    final = tmp_path / "run" / "final"
    if kind == "adapter":
        plain = base.unload()
        read = peft.PeftModel.from_pretrained(plain, final)
    else:
        read = transformers.AutoModelForCausalLM.from_pretrained(final)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        wanted = first.decoder.module.eval()(ids).logits
        torch.testing.assert_close(read.eval()(ids).logits, wanted, **EXACT)
        torch.testing.assert_close(
            finished.decoder.module.eval()(ids).logits, wanted, atol=0, rtol=0
        )
    assert Tokenizer.from_file(str(final / "tokenizer.json")).to_str() == first.tokenizer.to_str()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()) == 3


@pytest.mark.parametrize("adapter", [True, False])
def test_a_family_that_is_built_in_goes_on_without_transformers(
    adapter: bool, folders: Path, tmp_path: Path, quiet_peft: None
) -> None:
    _, student = both_of(folders / "llama")
    if adapter:
        student = wrap(adapted(student.decoder.module), folders / "llama")
    distill(student, teacher_of(), TEXTS, CONFIG, out=tmp_path / "run")
    own = mg.load(tmp_path / "run" / "final")
    assert (own.eos_ids, own.template) == (student.eos_ids, student.template)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(own.decoder(ids), student.decoder(ids), **EXACT)


# -- what is refused -----------------------------------------------------------------------------


class Odd(torch.nn.Module):
    """A module around another one, of which the test changes one thing."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.inner, self.config = module, module.config
        for name in ("get_decoder", "get_input_embeddings", "get_output_embeddings"):
            setattr(self, name, getattr(module, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_heads_that_are_not_understood_are_refused() -> None:
    module = module_of("llama")

    class Scaled(Odd):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            found.logits = found.logits * 1.01
            return found

    with pytest.raises(ValueError, match="logits of the head of Scaled scaled and capped as the"):
        HFDecoder(Scaled(module))

    class Capped(Odd):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            found.logits = torch.tanh(found.logits / 500) * 500
            return found

    with pytest.raises(ValueError, match="logits of the head of Capped scaled and capped as the"):
        HFDecoder(Capped(module).to(torch.bfloat16))

    class Shifted(Odd):
        def __init__(self, module: Any) -> None:
            super().__init__(module)
            self.get_decoder = lambda: lambda **k: Shifted.moved(module.get_decoder()(**k))

        @staticmethod
        def moved(found: Any) -> Any:
            found.last_hidden_state = found.last_hidden_state * 1.01
            return found

    with pytest.raises(
        ValueError, match="the head of Shifted to read what get_decoder gives, got "
    ):
        HFDecoder(Shifted(module).to(torch.bfloat16))
    with pytest.raises(
        ValueError, match="language model of transformers, got Linear without get_de"
    ):
        HFDecoder(torch.nn.Linear(2, 2))
    module.set_output_embeddings(None)
    with pytest.raises(ValueError, match="a matrix and maybe a bias in LlamaForCausalLM, got none"):
        HFDecoder(module)


def test_models_that_look_ahead_are_refused() -> None:
    module = module_of("llama")
    module.config.is_causal = False
    for layer in module.model.layers:
        layer.self_attn.is_causal = False

    class Sees(Odd):
        """Bidirectional: a mask that hides nothing."""

        def __init__(self, module: Any) -> None:
            super().__init__(module)
            trunk = module.get_decoder()
            self.get_decoder = lambda: (
                lambda input_ids, **k: trunk(
                    input_ids=input_ids, attention_mask=self.nothing(input_ids), **k
                )
            )

        @staticmethod
        def nothing(ids: Tensor) -> Tensor:
            return torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])

        def forward(self, ids: Tensor, **kwargs: Any) -> Any:
            return self.inner(ids, attention_mask=self.nothing(ids), **kwargs)

    with pytest.raises(
        ValueError, match="expected Sees to give states that depend on the tokens of"
    ):
        HFDecoder(Sees(module))


def test_modules_that_keep_something_of_earlier_passes_are_refused() -> None:
    class Keeps(Odd):
        def __init__(self, module: Any) -> None:
            super().__init__(module)
            self.passes, trunk = 0, module.get_decoder()
            self.get_decoder = lambda: lambda **k: self.moved(trunk(**k))

        def moved(self, found: Any) -> Any:
            self.passes += 1
            if self.passes > 4:
                found.last_hidden_state = found.last_hidden_state * 1.1**self.passes
            return found

    with pytest.raises(ValueError, match="other rows, or what it keeps of earlier passes"):
        HFDecoder(Keeps(module_of("llama")))


def test_settings_and_places_that_do_not_go_together_are_refused(
    tmp_path: Path, quiet_peft: None
) -> None:
    student, teacher = student_of("olmo2"), teacher_of()
    with pytest.raises(
        ValueError, match=r"--lora-rank with a model that minigold loads.*get_peft_mo"
    ):
        distill(student, teacher, TEXTS, Config(lora_rank=2, **PLAIN))
    with pytest.raises(ValueError, match="--cuda-graphs with"):
        student.decoder.cuda_graphs = True
    pair = make_pair(student, teacher)
    with pytest.raises(ValueError, match="models that minigold loads for a dry run, got Olmo2For"):
        sizes_of(pair, TEXTS, CONFIG, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ValueError, match="expected gradients off with a cache, got them on"):
        student.decoder(torch.tensor([[3]]), student.decoder.empty_cache(1, 4))
    with pytest.raises(
        ValueError, match="a module on one device, got meta; load it without device_map"
    ):
        HFDecoder(module_of("llama").to("meta"))
    named = adapted_student()
    named.decoder.module.add_adapter("second", named.decoder.module.peft_config["default"])
    inside = student_of("mistral")
    inside.decoder.module._hf_peft_config_loaded = True  # as its own `add_adapter` does it
    with pytest.raises(
        ValueError, match="around the student, got one inside it; use get_peft_model"
    ):
        distill(inside, teacher, TEXTS, CONFIG, out=tmp_path / "run")
    with pytest.raises(
        ValueError, match="one adapter, `default`, around the student, got default, sec"
    ):
        distill(named, teacher, TEXTS, CONFIG, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


PLAIN = {"student_plain": True, "teacher_plain": True}


def test_tokenizers_that_are_none_are_refused() -> None:
    module, bare = module_of("llama"), module_of("bloom", vocab_size=900)
    del bare.config.max_position_embeddings
    with pytest.raises(
        ValueError, match="tokenizer of transformers or tokenizers, or the folder of one, got int"
    ):
        wrap(module, 3)
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json in nowhere"):
        wrap(module, "nowhere")
    with pytest.raises(
        ValueError, match=r"expected max_position_embeddings .* of BloomForCausalLM, got none"
    ):
        wrap(bare, sentencepiece_bpe())
    assert wrap(bare, sentencepiece_bpe(), context=77).context == 77


def test_nothing_of_transformers_is_imported() -> None:
    text = Path(hf.__file__).read_text("utf-8")
    assert "import transformers" not in text and "from transformers" not in text
    assert "from peft" not in text and "import peft" not in text


def test_it_has_what_minigold_asks_of_a_model() -> None:
    model: CausalLM = decoder_of("llama")
    assert model.device == torch.device("cpu")
    own = {name for name in vars(CausalLM) if name[:2] != "__" or name == "__call__"}
    assert {name for name in own if not hasattr(model, name) and name[:1] != "_"} == set()
