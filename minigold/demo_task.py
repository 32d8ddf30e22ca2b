# SPDX-License-Identifier: Apache-2.0
"""The task of the demo: a made-up operator on number words.

    six glim three, two glim four
    -> ninety-four, seventy-six

Nobody can guess the operator, so a student that answers has it from the teacher. Answers are
words, so the two tokenizers cut them at different places; digits would not test alignment.
Everything is made by counting: the same prompts on every machine.
"""

from __future__ import annotations

import numpy as np

from minigold.data import Prompt

__all__ = [
    "N_HELD_OUT",
    "N_WARM_UP",
    "OPERANDS",
    "glim",
    "held_out",
    "number_word",
    "prompts",
    "warm_up",
]

OPERANDS = 8  # zero to seven
N_HELD_OUT = 200
N_WARM_UP = 24
_UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number_word(n: int) -> str:
    """0 to 99 in English.

    >>> [number_word(n) for n in (0, 17, 40, 93)]
    ['zero', 'seventeen', 'forty', 'ninety-three']
    """
    if n < 20:
        return _UNITS[n]
    tens, unit = divmod(n, 10)
    return _TENS[tens - 2] + (f"-{_UNITS[unit]}" if unit else "")


def glim(a: int, b: int) -> int:
    """The operator: an arbitrary rule from two numbers to 0..99.

    >>> glim(6, 3), glim(3, 6)
    (94, 28)
    """
    return (a * a * b + 17 * a + 13 * b + 29 * (a ^ b)) % 100


def _prompt(place: int) -> Prompt:
    """The prompt that is number `place` of all."""
    digits = [place // OPERANDS**k % OPERANDS for k in (3, 2, 1, 0)]
    a, b, c, d = map(number_word, digits)
    answer = f"{number_word(glim(*digits[:2]))}, {number_word(glim(*digits[2:]))}"
    return Prompt(prompt=f"{a} glim {b}, {c} glim {d}\n", answer=answer)


def _all_prompts() -> list[Prompt]:
    """Every pair of sums once, in an order that is random but fixed."""
    order = np.random.default_rng(0).permutation(OPERANDS**4)
    return [_prompt(int(place)) for place in order]


def held_out() -> list[Prompt]:
    """Prompts that no model of the demo was trained on; each of their sums is in others too."""
    return _all_prompts()[:N_HELD_OUT]


def prompts() -> list[Prompt]:
    """All other prompts. Their answers are for evaluation: distillation does not read them."""
    return _all_prompts()[N_HELD_OUT:]


def warm_up() -> list[Prompt]:
    """The few of them whose answers the student has seen; they hold less than two thirds of the sums."""
    return prompts()[:N_WARM_UP]
