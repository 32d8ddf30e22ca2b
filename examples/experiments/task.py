# SPDX-License-Identifier: Apache-2.0
"""The task of the screening, and its models, made from nothing: code that nobody can guess.

    python examples/experiments/task.py --out runs/tiny

    façade: six glim three, two glim four
    -> def façade():
           return ninety-four, seventy-six

The operator is the demo's; the answer is a few lines of code around the two numbers, with one of
three shapes and an accented name. The two tokenizers cut it differently: the teacher's tokens hold
a line break and most of an indentation, and the last space goes with the word; the student's hold
line breaks, runs of spaces and words apart, and spell some accents in bytes.

The folder gets `student`, `teacher`, `untaught` (the teacher when it knew how an answer looks and no
sum), `apart` (a student that spells every space by itself), `same` (one with the teacher's tokenizer),
and what the teacher wrote on the prompts, `train.jsonl` and `held_out.jsonl`. It simplifies: no model
knows anything but the task, and all seeds of an arm start from the same student.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from minigold.chat import prompt_ids
from minigold.data import Prompt, read_object, read_prompts, write_whole
from minigold.demo_task import glim, number_word
from minigold.evaluate import exact_matches
from minigold.generate import said
from minigold.load import LanguageModel, load
from minigold.offsets import text_of_ids
from minigold.sample import sample
from minigold.weights import save_decoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_demo_models import STUDENT, TEACHER, TEMPLATE, drawn, fine_tune, new_folder, ship

__all__ = [
    "MAX_NEW_TOKENS",
    "held_out",
    "is_made",
    "make",
    "prompts",
    "read_run",
    "read_texts",
    "save",
    "well_indented",
    "write_texts",
]

NAMES = ("façade", "naïve", "café", "über", "señor", "déjà", "jalapeño", "crème", "smörgås",
         "ångström", "piñata", "fiancé")  # fmt: skip
SHAPES = (
    "def {name}():\n    return {a}, {b}",
    "def {name}():\n    if {a}:\n        return {b}",
    "class {name}:\n    def glim():\n        if {a}:\n            return {b}",
)
WORD, NUMBERS = re.compile(r"[a-z-]+"), {number_word(n) for n in range(100)}
OPERANDS, N_HELD_OUT, N_PROMPTS = (
    5,
    200,
    4000,
)  # zero to four: 25 sums, which a student learns in minutes
VALUES = [number_word(n) for n in range(OPERANDS)]
INDENT = 4
MAX_NEW_TOKENS, CONTEXT = 72, 192
MADE = "made"
BYTES = [chr(byte).replace(" ", "▁") for byte in range(256)]
FOLDERS = ("student", "teacher", "untaught", "apart", "same")


# ------------------------------------------------------------------- the task
def answer(name: str, first: str, second: str, shapes: Sequence[str] = SHAPES) -> str:
    """The code that is right for a name and two numbers in words."""
    return shapes[NAMES.index(name) % len(shapes)].format(name=name, a=first, b=second)


@cache
def _all_prompts(shapes: Sequence[str]) -> tuple[Prompt, ...]:
    """Every name with every two sums, in an order that is random but fixed."""
    order = np.random.default_rng(0).permutation(len(NAMES) * OPERANDS**4).tolist()
    found = []
    for place in order[: N_HELD_OUT + N_PROMPTS]:
        rest, name = divmod(place, len(NAMES))
        a, b, c, d = (rest // OPERANDS**k % OPERANDS for k in (3, 2, 1, 0))
        told = f"{VALUES[a]} glim {VALUES[b]}, {VALUES[c]} glim {VALUES[d]}"
        right = answer(NAMES[name], number_word(glim(a, b)), number_word(glim(c, d)), shapes)
        found.append(Prompt(f"{NAMES[name]}: {told}\n", answer=right))
    return tuple(found)


def held_out(shapes: Sequence[str] = SHAPES) -> list[Prompt]:
    """Prompts that no model is trained on; each of their sums, and each name, is in others."""
    return list(_all_prompts(shapes)[:N_HELD_OUT])


def prompts(shapes: Sequence[str] = SHAPES) -> list[Prompt]:
    """All other prompts. Distillation does not read their answers."""
    return list(_all_prompts(shapes)[N_HELD_OUT:])


def forms(seed: int) -> list[Prompt]:
    """Prompts with answers of the right form: every other one adds, the rest get random numbers."""
    rng, found = np.random.default_rng(seed), []
    for i, p in enumerate(prompts()):
        name, told = str(p.prompt).split(": ")
        if i % 2:
            told = told.replace("glim", "plus")
            sums = [one.split(" plus ") for one in told.strip().split(", ")]
            numbers = [VALUES.index(a) + VALUES.index(b) for a, b in sums]
        else:
            numbers = rng.integers(0, 100, 2).tolist()
        a, b = map(number_word, numbers)
        found.append(Prompt(f"{name}: {told}", answer=answer(name, a, b)))
    return found


def damaged(rows: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Right answers with one to three mistakes each, whose byte ranges stand in `extra`.

    A mistake is another number, or a few characters left out, put in or replaced by a piece of
    other answers or by spaces. What follows it is right: who learns these texts, but for the
    mistakes, goes on well after a mistake. Its range begins where the word begins, with the space
    before it: these bytes may be right, and are cut into other tokens than in a right answer.
    """
    rng, found = np.random.default_rng(seed), []
    for p in rows:
        text = p.answer or ""
        cuts = sorted(rng.choice(len(text), size=int(rng.integers(1, 4)), replace=False).tolist())
        made, at = "", 0
        mistakes: list[tuple[int, int]] = []
        for cut in cuts:
            if mistakes and cut <= at:
                continue
            word = WORD.match(text, cut)
            if word and word[0] in NUMBERS:
                piece, at_next = number_word(int(rng.integers(100))), word.end()
            else:
                piece, at_next = _piece(rng, rows), cut + int(rng.integers(0, 9))
            made += text[at:cut]
            before = re.sub(r"\s*\S*$", "", made)
            made += piece
            at = min(at_next, len(text) - (not piece))
            shown = made + ("" if piece else text[at])  # what follows a gap shows that there is one
            last = mistakes[-1][1] if mistakes else 0
            mistakes.append((max(last, len(before.encode())), len(shown.encode())))
        found.append(Prompt(p.prompt, answer=made + text[at:], extra={"mistakes": mistakes}))
    return found


def _piece(rng: np.random.Generator, rows: Sequence[Prompt]) -> str:
    """Nothing, spaces, or up to eight characters of some answer."""
    kind, size = rng.integers(3), int(rng.integers(1, 9))
    if kind == 0:
        return ""
    if kind == 1:
        return " " * size
    text = rows[int(rng.integers(len(rows)))].answer or ""
    start = int(rng.integers(len(text)))
    return text[start : start + size]


def well_indented(text: str) -> bool:
    """Each line stands one level deeper than a line before it that ends in a colon, else no deeper.

    Levels are four spaces; the first line stands at the margin, and no colon is the last word.

    >>> well_indented("if a:\\n    return b"), well_indented("if a:\\n   return b"), well_indented("if a:")
    (True, False, False)
    """
    level, opened = 0, False
    for line in text.split("\n"):
        spaces = len(line) - len(line.lstrip(" "))
        deepest = level + opened
        if not line.strip() or spaces % INDENT or spaces // INDENT > deepest:
            return False
        if opened and spaces // INDENT < deepest:
            return False
        level, opened = spaces // INDENT, line.endswith(":")
    return not opened


# ------------------------------------------------------------------- tokenizers
def teacher_tokenizer() -> Tokenizer:
    """Byte-level BPE on the task itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=410,
        special_tokens=["<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{p.prompt}{p.answer}" for p in prompts()[:2000]], trainer)
    return tokenizer


def student_tokenizer(*, apart: bool = False) -> Tokenizer:
    """BPE with byte fallback on other text: as Gemma's, line breaks and runs of spaces are tokens.

    Args:
        apart: the single space before a word is a token, too.
    """
    words = [number_word(n) for n in range(80)]
    known = " ".join(name for name in NAMES if "ö" not in name)  # the others are spelled in bytes
    other = ["glimmer, glimpse, returned; define: class", f"def return if class: {known}"]
    lines = [
        f"{words[k]} {words[k - 7]}, {words[k - 11]}:\n{' ' * (INDENT * depth)}{words[k - 3]}"
        for k in range(len(words))
        for depth in range(3)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    word = r"▁+|[^▁\n:,()-]+" if apart else r"▁{2,}|▁?[^▁\n:,()-]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\n+|[:,()]+|-|{word}"), "isolated")
    tokenizer.train_from_iterator(
        [*lines, *other * 9], BpeTrainer(vocab_size=260, show_progress=False)
    )
    trained = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    spare = [f"<0x{byte:02X}>" for byte in range(256) if byte > 127 or BYTES[byte] not in pieces]
    first = ["<pad>", "<eos>", "<bos>", "<unk>", *spare]  # one id only for each string of bytes
    tokenizer.model = models.BPE(
        vocab={piece: i for i, piece in enumerate([*first, *pieces])},
        merges=[(left, right) for left, right in trained["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in first[:4]])
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


# ------------------------------------------------------------------- models
def make(out: Path, *, scale: float = 1.0, say: Callable[[str], None] = print) -> None:
    """Writes all folders and files that are not there yet.

    Args:
        scale: of all numbers of steps; less than 1 is for tests, which get few and short texts too.
    """
    teach = partial(_teach, scale=scale, say=say)
    form = forms(seed=2)
    if not is_made(out / "teacher"):
        tokenizer = teacher_tokenizer()
        teacher = _new(out / "untaught", TEACHER, tokenizer, end="<|end|>", template=TEMPLATE)
        teach(teacher, form, steps=300, size=64, seed=1, lr=2e-3)
        save(teacher, out / "untaught")
        teach(teacher, prompts(), steps=500, size=128, seed=5, lr=2e-3)
        both = [*prompts(), *damaged(prompts(), seed=6), *damaged(prompts(), seed=7)]
        teach(teacher, both, steps=300, size=128, seed=8, lr=1e-3)
        save(teacher, out / "teacher")
    for name, tokenizer, end, template in (
        ("student", student_tokenizer(), "<eos>", None),
        ("apart", student_tokenizer(apart=True), "<eos>", None),
        ("same", teacher_tokenizer(), "<|end|>", TEMPLATE),
    ):
        if not is_made(out / name):
            student = _new(out / name, STUDENT, tokenizer, end=end, template=template)
            teach(student, form, steps=800, size=64, seed=3, lr=2e-3)
            save(student, out / name)
    length = MAX_NEW_TOKENS if scale == 1 else MAX_NEW_TOKENS // 4
    for name, rows in (("train", prompts()), ("held_out", held_out())):
        write_texts(out, name, rows if scale == 1 else rows[:64], length)


def _new(folder: Path, config: dict[str, Any], tokenizer: Tokenizer, **more: Any) -> LanguageModel:
    """Random weights, the same whatever was made before."""
    torch.manual_seed(0)
    return new_folder(folder, config | {"max_position_embeddings": CONTEXT}, tokenizer, **more)


def _teach(
    model: LanguageModel, rows: Sequence[Prompt], *, steps: int, size: int, seed: int, lr: float,
    scale: float, say: Callable[[str], None],
) -> None:  # fmt: skip
    steps, plain = max(1, round(scale * steps)), model.template is None
    fine_tune(model, drawn(rows, size, seed=seed), steps=steps, lr=lr, plain=plain, say=say)


def is_made(folder: Path) -> bool:
    return (folder / MADE).is_file()


def save(model: LanguageModel, folder: Path) -> None:
    """Writes the weights, rounded to float16, into the model's own folder or a new one."""
    if folder == model.folder:
        ship(model)
    else:
        save_decoder(model.decoder.half(), folder, source=model.folder)
    model.decoder.float()
    (folder / MADE).touch()  # last: without it the folder is made again


def write_texts(
    out: Path, name: str, rows: Sequence[Prompt], length: int, *, plain: bool = False
) -> None:
    """What the teacher in the folder writes at temperature 1, a prompts file if there is none yet."""
    path, lines = out / f"{name}.jsonl", []
    if path.is_file():
        return
    teacher = load(out / "teacher")
    for start in range(0, len(rows), 256):
        some = rows[start : start + 256]
        found = sample(
            teacher.decoder,
            [prompt_ids(teacher, p.prompt, plain=plain) for p in some],
            max_new_tokens=length,
            eos_ids=teacher.eos_ids,
            seed=list(range(start, start + len(some))),
        )
        lines += [
            {"prompt": p.prompt, "completion": text_of_ids(teacher.tokenizer, said(one)),
             "finished": one.finished} | ({"answer": p.answer} if p.answer else {})
            for p, one in zip(some, found, strict=True)
        ]  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(path, text.encode())


def read_run(path: Path) -> dict[str, Any]:
    """What `screen.py` wrote of one arm and seed."""
    return read_object(path, remedy="delete it, and run that arm and seed again")


def read_texts(folder: Path, name: str) -> list[Prompt]:
    """`train` or `held_out`: prompts with what the teacher wrote."""
    return read_prompts(folder / f"{name}.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the models, and says how often each is right."""
    parser = argparse.ArgumentParser(description="Makes the models of the screening.")
    parser.add_argument("--out", type=Path, required=True, help="gets the folders and files")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = time.perf_counter()
    make(args.out)
    for name in FOLDERS:
        model = load(args.out / name)
        right = exact_matches(
            model, held_out(), plain=model.template is None, max_new_tokens=MAX_NEW_TOKENS
        )
        print(f"{name:9} {sum(right) / len(right):.3f} exact match")
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
