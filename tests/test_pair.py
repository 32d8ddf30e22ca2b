# SPDX-License-Identifier: Apache-2.0
"""Which tokenizers may be a student, what a teacher loses, and vocabularies kept on disk."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from minigold import pair
from minigold.events import match
from minigold.pair import check_student, lost_text, make_pair, matched
from minigold.rollout import collect, sample_answers
from test_train import CONFIG, PROMPTS
from tiny_models import tiny_model
from tokenizers_for_tests import (
    FAMILIES,
    byte_bpe,
    byte_bpe_lossy,
    byte_bpe_nfc,
    char_bpe_lossy,
    sentencepiece_bpe,
    unigram,
    wordpiece,
)


def edited(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    for name, part in parts.items():
        setattr(copy, name, part)
    return copy


def t5() -> Tokenizer:
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    return edited(unigram(), pre_tokenizer=split)


def marked_ends() -> Tokenizer:
    model = models.BPE({"h": 0, "h</w>": 1, "<e>": 2}, [], end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens(["<e>"])
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


# -- probes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [byte_bpe, byte_bpe_lossy, byte_bpe_nfc, char_bpe_lossy, sentencepiece_bpe, unigram]
)
def test_a_student_may_lack_characters_but_not_change_text(make: Callable[[], Tokenizer]) -> None:
    check_student(make())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wordpiece, r"writes 'abcDEF' as ' abcdef' \(letters\): the teacher would read"),
        (
            lambda: edited(byte_bpe(), normalizer=normalizers.Lowercase()),
            r"writes 'abcDEF' as 'abcdef' \(letters\)",
        ),
        (t5, r"writes 'a  b    c' as 'a b c' \(runs of spaces\)"),
        (
            lambda: edited(byte_bpe(), normalizer=normalizers.Replace("\n", " ")),
            r"writes 'a\\nb\\n\\n  c' as 'a b    c' \(line breaks\)",
        ),
        (
            lambda: edited(byte_bpe(), normalizer=normalizers.Replace("\t", "    ")),
            r"writes 'a\\tb' as 'a    b' \(tabs\)",
        ),
        (
            lambda: edited(byte_bpe(), normalizer=normalizers.Replace("'", "`")),
            r"writes \"it's\(a.* as 'it`s\(a.*\(punctuation\)",
        ),
        (
            lambda: edited(byte_bpe(), normalizer=normalizers.Replace(" ", "")),
            r"writes 'a b c' as 'abc' \(spaces\)",
        ),
        (
            lambda: edited(byte_bpe(), normalizer=normalizers.Replace("\n", "")),
            r"writes 'a\\nb\\n\\n  c' as 'ab  c' \(line breaks\)",
        ),
        (
            lambda: edited(byte_bpe(), normalizer=normalizers.Replace(Regex("[A-Z]"), "")),
            r"writes 'abcDEF' as 'abc' \(letters\)",
        ),
        (
            lambda: edited(byte_bpe(), normalizer=normalizers.Replace(Regex("[0-9]"), "0")),
            r"writes '0123456789' as '0000000000' \(digits\)",
        ),
        (words, "expected a student that can write plain text, got a tokenizer that knows no word"),
        (marked_ends, r'got \{"type": "BPEDecoder".* not known'),
    ],
)
def test_a_student_that_writes_another_text_is_refused(
    make: Callable[[], Tokenizer], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_student(make())


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (byte_bpe, []),
        (sentencepiece_bpe, []),
        (byte_bpe_nfc, ["combining accents"]),
        (byte_bpe_lossy, ["accents", "emoji", "control characters"]),
        (t5, ["runs of spaces", "line breaks", "tabs", "combining accents"]),
        (wordpiece, ["letters", "runs of spaces", "line breaks", "tabs", "accents"]),
    ],
)
def test_what_a_teacher_loses_is_named(make: Callable[[], Tokenizer], lost: list[str]) -> None:
    found = lost_text(make())
    assert set(lost) <= set(found) <= {*pair.PLAIN, *pair.OTHER}
    if make in (byte_bpe, sentencepiece_bpe, byte_bpe_nfc, byte_bpe_lossy):
        assert found == lost


@pytest.mark.parametrize("make", [wordpiece, t5, marked_ends, unigram])
def test_a_teacher_that_loses_text_reads_what_it_can(
    make: Callable[[], Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    """It is told at the start, each lost chunk is unscorable with its reason, the rest is scored."""
    student = tiny_model("llama", byte_bpe(), end="<|im_end|>", seed=1)
    end = {wordpiece: "[SEP]", marked_ends: "<e>"}.get(make, "</s>")
    teacher = tiny_model("qwen3", make(), end=end, seed=2)
    with caplog.at_level(logging.INFO, "minigold"):
        both = make_pair(student, teacher)
    assert "the teacher cannot read exactly are not scored:" in caplog.text
    config = dataclasses.replace(CONFIG, lmbda=0.0)
    said = "hh h Hello, dog!\n  hello  the fox"
    prompts = [dataclasses.replace(PROMPTS[0], completion=said)]
    rollouts = collect(both, *sample_answers(both, prompts, config, number=1), config)
    chunks, scorable = rollouts[0].chunks, rollouts[0].scorable_C
    assert scorable.any() and not scorable.all()
    assert (np.isfinite(rollouts[0].teacher_logp_C) == scorable).all()
    assert chunks.s1[-1] == len(rollouts[0].answer.ids)
    assert rollouts[0].answer.text == said


def test_a_refused_student_is_refused_before_training() -> None:
    student = tiny_model("llama", wordpiece(), end="[SEP]", seed=1)
    with pytest.raises(ValueError, match="such a tokenizer can only be the teacher's"):
        make_pair(student, tiny_model("llama", byte_bpe(), end="<|im_end|>", seed=1))


# -- vocabularies on disk ------------------------------------------------------------------------


def side(name: str) -> tuple[Tokenizer, list[int], int]:
    tokenizer = FAMILIES[name]()
    return tokenizer, [1], tokenizer.get_vocab_size() + 2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINIGOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pair, "KEEP_FROM", 0)
    return tmp_path / "cache"


@pytest.mark.parametrize("left", FAMILIES)
@pytest.mark.parametrize("right", FAMILIES)
def test_kept_vocabularies_come_back_as_they_were(left: str, right: str, cache: Path) -> None:
    fresh = matched(side(left), side(right))
    assert len(list(cache.iterdir())) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair, "_matched", None)
        again = matched(side(left), side(right))
    assert fresh == again
    for one, two in zip(*(vars(match(*both)).values() for both in (fresh, again)), strict=True):
        if hasattr(one, "event_V"):
            assert one.event_V.tolist() == two.event_V.tolist()
        else:
            assert one == two


def test_what_other_code_matched_is_kept_apart(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pair, pair.offsets, pair):
        matched(side("byte_bpe"), side("unigram"))
        monkeypatch.setattr(module, "__file__", __file__)
    assert len(list(cache.iterdir())) == 3


def test_another_pair_is_kept_apart(cache: Path) -> None:
    left, right = side("byte_bpe"), side("unigram")
    grown = edited(left[0])
    grown.add_tokens(["<new>"])
    for sides in (
        (left, right),
        (right, left),
        ((left[0], [2], left[2]), right),
        ((left[0], left[1], left[2] + 1), right),
        ((grown, left[1], left[2]), right),
    ):
        before = len(list(cache.glob("*"))) if cache.exists() else 0
        assert matched(*sides) == pair._matched(*sides)
        assert len(list(cache.iterdir())) == before + 1


def spoil_torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def spoil_key(path: Path) -> None:
    save_file({"a": np.zeros(3)}, path)


def spoil_roles(path: Path) -> None:
    arrays = dict(load_file(path))
    arrays["student.roles"] = arrays["student.roles"] + 9
    save_file(arrays, path)


def spoil_ends(path: Path) -> None:
    arrays = dict(load_file(path))
    arrays["teacher.firsts"] = arrays["teacher.firsts"] + 10**6
    save_file(arrays, path)


def spoil_type(path: Path) -> None:
    """A type of safetensors that numpy does not have."""
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = data[8:size].replace(b'"U8"', b'"F8_E4M3"', 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[size:])


def spoil_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def spoil_other(path: Path) -> None:
    """Another pair's file under this name."""
    other = path.parent / "other"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIGOLD_CACHE", str(other))
        matched(side("byte_bpe"), side("wordpiece"))
    (found,) = other.iterdir()
    found.replace(path)
    other.rmdir()


def spoil_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_torn,
        spoil_key,
        spoil_roles,
        spoil_ends,
        spoil_type,
        spoil_bit,
        spoil_other,
        spoil_empty,
    ],
)
def test_a_spoiled_file_is_told_and_made_anew(
    spoil: Callable[[Path], None], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = matched(side("byte_bpe"), side("unigram"))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    spoil(path)
    with caplog.at_level(logging.WARNING, "minigold"):
        again = matched(side("byte_bpe"), side("unigram"))
    assert again == fresh
    assert "they are matched anew" in caplog.text
    assert path.read_bytes() == whole
    assert list(cache.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_stops_nothing(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file, not a folder", "utf-8")
    with caplog.at_level(logging.WARNING, "minigold"):
        both = matched(side("byte_bpe"), side("unigram"))
    assert both[0].roles[1] == "end"
    assert "are not kept" in caplog.text
    assert "set MINIGOLD_CACHE" in caplog.text


def test_a_folder_in_the_place_of_the_file_stops_nothing(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = matched(side("byte_bpe"), side("unigram"))
    (path,) = cache.iterdir()
    path.unlink()
    path.mkdir()
    with caplog.at_level(logging.WARNING, "minigold"):
        assert matched(side("byte_bpe"), side("unigram")) == fresh
    assert "are not kept: expected a file to write to, got" in caplog.text


def test_other_code_does_not_read_what_this_code_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matched(side("byte_bpe"), side("unigram"))
    edited_code = tmp_path / "offsets.py"
    edited_code.write_bytes(Path(pair.offsets.__file__).read_bytes() + b"# edited\n")
    monkeypatch.setattr(pair.offsets, "__file__", str(edited_code))
    matched(side("byte_bpe"), side("unigram"))
    assert len(list(cache.iterdir())) == 2


def test_a_full_disk_and_a_missing_home_stop_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_args: Any, **_fields: Any) -> None:
        raise OSError(28, "No space left on device")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pair, "write_whole", fails)
    fresh = pair._matched(side("byte_bpe"), side("unigram"))
    with caplog.at_level(logging.WARNING, "minigold"):
        assert matched(side("byte_bpe"), side("unigram")) == fresh
        assert list(cache.iterdir()) == []
        monkeypatch.delenv("MINIGOLD_CACHE")
        monkeypatch.setattr(Path, "home", homeless)
        assert matched(side("byte_bpe"), side("unigram")) == fresh
    assert caplog.text.count("are not kept") == 2


def test_small_vocabularies_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGOLD_CACHE", str(tmp_path))
    matched(side("byte_bpe"), side("unigram"))
    assert list(tmp_path.iterdir()) == []


def test_the_cache_lies_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIGOLD_CACHE", raising=False)
    assert pair.cache_folder() == Path.home() / ".cache" / "minigold"
