# SPDX-License-Identifier: Apache-2.0
"""Breaks the code on purpose, one small edit at a time: the named tests must fail each time.

    python tests/mutants.py [WORD]      only the edits whose file or text contains WORD

Each edit is applied to a copy of the repository. Before that, the same tests must pass there
unchanged. Exit 1 if an edit survives, or if its text is not found exactly once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["MUTANTS", "Mutant", "main"]

ROOT = Path(__file__).parent.parent
LIMIT = 300  # seconds for the tests of one edit; a loop without end counts as noticed
IGNORED = shutil.ignore_patterns(
    ".git", ".hypothesis", ".*_cache", ".venv", "__pycache__", "*.egg-info", "build", "dist", "runs"
)


class Mutant(NamedTuple):
    """In `file`, `old` (found once) becomes `new`; then `tests` (arguments of pytest) must fail."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    # a special token in the middle takes part in a broken character
    Mutant(
        "minigold/offsets.py",
        "touched = (start < end) & (",
        "touched = (start <= end) & (",
        "tests/test_offsets.py",
    ),
    # a replaced range is taken as one byte of text, not the three of U+FFFD
    Mutant(
        "minigold/offsets.py",
        "np.cumsum(3 - (broken[:, 1] - broken[:, 0]))",
        "np.cumsum(1 - (broken[:, 1] - broken[:, 0]))",
        "tests/test_offsets.py",
    ),
    # a character that the window cuts is taken for broken
    Mutant(
        "minigold/offsets.py",
        "if error.start > 0 and error.end == len(window) == _WINDOW:",
        "if error.start < 0 and error.end == len(window) == _WINDOW:",
        "tests/test_offsets.py",
    ),
    # text that looks like a special token is one
    Mutant(
        "minigold/offsets.py",
        "encoder.encode_special_tokens = True",
        "encoder.encode_special_tokens = False",
        "tests/test_offsets.py",
    ),
    # what a normalizer deleted at the start is not counted
    Mutant(
        "minigold/offsets.py",
        "cuts.append((begin, at))",
        "cuts.append((begin, begin))",
        "tests/test_invariants.py",
    ),
    # a word's space before T5's first word
    Mutant(
        "minigold/offsets.py",
        'config["pre_tokenizer"] = parts[1] | {"split": True}',
        'config["pre_tokenizer"] = config["pre_tokenizer"]',
        "tests/test_offsets.py",
    ),
    # a student that writes another text is accepted
    Mutant(
        "minigold/pair.py",
        "if written(text) not in (text, known) and not is_unknown:",
        "if written(text) not in (written(text), known) and not is_unknown:",
        "tests/test_pair.py",
    ),
    # kept first pieces are those of the other side
    Mutant(
        "minigold/pair.py",
        "firsts = [spelled[i] for i in",
        "firsts = [spelled[i - 1] for i in",
        "tests/test_pair.py",
    ),
    # a kept file of a type that numpy does not have ends a run
    Mutant(
        "minigold/pair.py",
        "LookupError, TypeError, AttributeError,",
        "LookupError, TypeError,",
        "tests/test_pair.py",
    ),
    # vocabularies are kept under a name that does not tell the tokenizers apart
    Mutant(
        "minigold/pair.py",
        "found.update(hashlib.sha256(tokenizer.to_str().encode()).digest())",
        "found.update(b'')",
        "tests/test_pair.py",
    ),
    # the end of the last token is taken for the end of all before it
    Mutant(
        "minigold/align.py",
        "reached, following = np.maximum.accumulate(spans[:, 1]), spans[1:, 0]",
        "reached, following = spans[:, 1], spans[1:, 0]",
        "tests/test_align.py",
    ),
    # a boundary stands before the last of the tokens without text, not the first
    Mutant(
        "minigold/align.py",
        "& text_follows & (following > spans[:-1, 0])",
        "& text_follows & (following < np.append(spans[2:, 0], reached[-1:]))",
        "tests/test_align.py",
    ),
    # bytes without a token are no reason
    Mutant(
        "minigold/align.py",
        "np.where(own < _NONE, own, _LOST * lost)",
        "np.where(own < _NONE, own, 0 * lost)",
        "tests/test_align.py",
    ),
    # the teacher's flaws are forgotten
    Mutant(
        "minigold/align.py",
        "own = np.minimum(_flaws(student, student_cut), _flaws(teacher, teacher_cut))",
        "own = _flaws(student, student_cut)",
        "tests/test_align.py",
    ),
    # with a cache a token does not see itself
    Mutant(
        "minigold/model.py",
        "(key <= query) & (key > query - window)",
        "(key < query) & (key > query - window)",
        "tests/test_sample.py",
    ),
    # the sliding window holds one token more
    Mutant(
        "minigold/model.py",
        "(key <= query) & (key > query - window)",
        "(key <= query) & (key >= query - window)",
        "tests/test_model.py",
    ),
    # the halves of a head turn the other way
    Mutant(
        "minigold/model.py",
        "torch.cat([-sin, sin], dim=-1)",
        "torch.cat([sin, -sin], dim=-1)",
        "tests/test_model.py",
    ),
    # layers without RoPE are turned too
    Mutant(
        "minigold/model.py",
        "        if self.rotary:\n",
        "        if True:\n",
        "tests/test_model.py",
    ),
    # the scale of YaRN is left out
    Mutant(
        "minigold/model.py",
        "(angle.cos() * scale).to(self.dtype), (angle.sin() * scale)",
        "angle.cos().to(self.dtype), angle.sin()",
        "tests/test_model.py",
    ),
    # sliding layers turn as full ones do
    Mutant(
        "minigold/model.py",
        "self.config.rope_local if sliding else self.config.rope",
        "self.config.rope",
        "tests/test_model.py",
    ),
    # the bounds of YaRN change places
    Mutant(
        "minigold/rope.py",
        "for turns in (beta_fast, beta_slow)",
        "for turns in (beta_slow, beta_fast)",
        "tests/test_rope.py",
    ),
    # the bounds of YaRN are rounded inwards
    Mutant(
        "minigold/rope.py",
        "math.floor(first), math.ceil(last)",
        "math.ceil(first), math.floor(last)",
        "tests/test_rope.py",
    ),
    # Llama 3: the pairs between are scaled the wrong way round
    Mutant(
        "minigold/rope.py",
        "(1 - kept_P) * plain_P / factor + kept_P * plain_P",
        "kept_P * plain_P / factor + (1 - kept_P) * plain_P",
        "tests/test_rope.py",
    ),
    # settings of RoPE under the new name and the old one are mixed
    Mutant(
        "minigold/families.py",
        "if (new and old) or not (",
        "if not (",
        "tests/test_weights.py",
    ),
    # the old name scales the sliding layers of Gemma 3 too
    Mutant(
        "minigold/families.py",
        'if gemma and (new or layers == "sliding_attention"):',
        "if gemma and new:",
        "tests/test_model.py",
    ),
    # the outer length of the first training is overlooked
    Mutant(
        "minigold/families.py",
        "places = [config, settings]",
        "places = [settings, config]",
        "tests/test_model.py",
    ),
    # a factor that is written down gives way to the one of YaRN
    Mutant(
        "minigold/families.py",
        'if kind == "yarn" and scale is None:',
        'if kind == "yarn":',
        "tests/test_model.py",
    ),
    # in SmolLM3 the layers with RoPE slide
    Mutant(
        "minigold/families.py",
        "return not rotary",
        "return rotary",
        "tests/test_model.py",
    ),
    # Qwen's window starts one layer late
    Mutant(
        "minigold/families.py",
        "return layer >= first",
        "return layer > first",
        "tests/test_model.py",
    ),
    # Mistral sees everything
    Mutant(
        "minigold/families.py",
        "return (sliding,)",
        "return (full,)",
        "tests/test_model.py",
    ),
    # templates may change the messages
    Mutant(
        "minigold/sandbox.py",
        "jinja2.sandbox.ImmutableSandboxedEnvironment)",
        "jinja2.sandbox.SandboxedEnvironment)",
        "tests/test_chat.py",
    ),
    # rows of padding behind the tokenizer's ids can be sampled
    Mutant(
        "minigold/load.py",
        "decoder.n_tokens = speaker.n_tokens",
        "decoder.n_tokens = decoder.config.vocab_size",
        "tests/test_load.py",
    ),
    # ends of turn count in the reverse KL a byte
    Mutant(
        "minigold/metrics.py",
        "text_C = r.scorable_C & (r.chunks.end > r.chunks.start)",
        "text_C = r.scorable_C",
        "tests/test_metrics.py",
    ),  # of ids with equal bytes only one counts
    Mutant(
        "minigold/events.py",
        "return floor_NX.scatter_add_(1, self.column_V",
        "return floor_NX.scatter_(1, self.column_V",
        "tests/test_events.py",
    ),
    # what strict leaves out is no overhang
    Mutant(
        "minigold/events.py",
        " | (event_K == side.n_events)",
        "",
        "tests/test_events.py",
    ),
    # longer tokens count where they were another event
    Mutant(
        "minigold/events.py",
        "else self.event_of_id[ids] == event",
        "else self.event_of_id[ids] >= 0",
        "tests/test_events.py",
    ),
    # what was looked up is looked up again
    Mutant(
        "minigold/events.py",
        "if text not in self.known:",
        "if text:",
        "tests/test_carry.py",
    ),
    # ... at a boundary on the way the rests of other tokens are looked at
    Mutant(
        "minigold/events.py",
        "[low - start : high - start] == taken",
        "[: high - low] == taken",
        "tests/test_events.py",
    ),
    # student and teacher change places
    Mutant(
        "minigold/loss.py",
        "_Divergence.apply(student_CX, teacher_CX, n, beta)",
        "_Divergence.apply(student_CX, teacher_CX, n, 1 - beta)",
        "tests/test_loss.py",
    ),
    # events are not conditioned
    Mutant(
        "minigold/loss.py",
        "s_raw_N1.clamp(min=RARE), t_raw_N1.clamp(min=RARE)",
        "s_raw_N1 * 0 + 1, t_raw_N1 * 0 + 1",
        "tests/test_loss.py",
    ),
    # the derivative forgets that rows are scaled
    Mutant(
        "minigold/loss.py",
        "-mean_N1 * scaled_N1, 0.0)",
        "0 * scaled_N1, 0.0)",
        "tests/test_loss_properties.py",
    ),
    # logarithms near 1 lose their digits
    Mutant(
        "minigold/loss.py",
        "return scaled_NX.sub_(share).log1p_().div_(-share)",
        "return scaled_NX.add_(1 - share).log_().div_(-share)",
        "tests/test_loss_properties.py",
    ),
    # a beta near an end is that end
    Mutant(
        "minigold/loss.py",
        "END = 1e-30",
        "END = 1e-3",
        "tests/test_loss_properties.py",
    ),
    # what has no event is free
    Mutant(
        "minigold/loss.py",
        "return loss_C + torch.where(other_C < 0.5",
        "return loss_C + 0 * torch.where(other_C < 0.5",
        "tests/test_loss.py",
    ),
    # the observed chunk is forgotten
    Mutant(
        "minigold/loss.py",
        "moved_C = torch.where(observed_C, torch.minimum(prob_C, most_C), 0.0)",
        "moved_C = torch.where(observed_C, 0.0 * most_C, 0.0)",
        "tests/test_loss.py",
    ),
    # longer tokens bring mass, but the prediction keeps all of its own
    Mutant(
        "minigold/loss.py",
        "law_CX[chunk_B] = law_CX[chunk_B] * stay_B[:, None] + FLOOR",
        "law_CX[chunk_B] = law_CX[chunk_B] * (0 * stay_B + 1)[:, None] + FLOOR",
        "tests/test_loss.py",
    ),
    # no gradient through what the prediction keeps
    Mutant(
        "minigold/loss.py",
        "by_stay_B = (grad_CX[chunk_B] * before_BX).sum(-1)",
        "by_stay_B = 0 * (grad_CX[chunk_B] * before_BX).sum(-1)",
        "tests/test_loss_properties.py",
    ),
    # the bias learns nothing
    Mutant(
        "minigold/loss.py",
        "of_bias += grad_NV.sum(0, dtype=of_bias.dtype)",
        "of_bias += 0 * grad_NV.sum(0, dtype=of_bias.dtype)",
        "tests/test_loss_properties.py",
    ),
    # padding of short prompts is seen
    Mutant(
        "minigold/cache.py",
        "self.position_BJ >= length_B[:, None]",
        "self.position_BJ > length_B[:, None]",
        "tests/test_sample.py",
    ),
    # rows that are copied go on from another position
    Mutant(
        "minigold/cache.py",
        "self.next_B[rows_K] = other.next_B[from_K]",
        "self.next_B[rows_K] = other.next_B[rows_K % len(other.next_B)]",
        "tests/test_sample.py",
    ),
    # the states after the prompts are in the order of their lengths
    Mutant(
        "minigold/sample.py",
        "torch.cat(found)[torch.tensor(order, device=device).argsort()]",
        "torch.cat(found)",
        "tests/test_sample.py",
    ),
    # the point inside a block of tokens is that of the block before
    Mutant(
        "minigold/sample.py",
        "/ mass_BX.gather(1, found_B1) + 1",
        "/ mass_BX.gather(1, found_B1) + 0.5",
        "tests/test_sample.py",
    ),
    # a row that ended between two looks comes back
    Mutant(
        "minigold/sample.py",
        "ended = ended | torch.isin(ids, stops)",
        "ended = torch.isin(ids, stops)",
        "tests/test_sample.py",
    ),
    # the other path's token is read after one too many, or too few
    Mutant(
        "minigold/teacher.py",
        "copies.cut(torch.tensor([len(row) - 1 for row in some], device=device))",
        "copies.cut(torch.tensor([len(row) for row in some], device=device))",
        "tests/test_teacher.py",
    ),
    # a cache takes float32 for bfloat16
    Mutant(
        "minigold/cache.py",
        "key_BGSE, value_BGSE = key_BGSE.to(dtype), value_BGSE.to(dtype)",
        "pass",
        "tests/test_replay.py",
    ),
    # the first tokens are read under a mask
    Mutant(
        "minigold/cache.py",
        "            if self.used == n_new:\n                return ahead_1S, ahead_1S\n",
        "",
        "tests/test_model.py",
    ),
    # groups of heads stand beside a mask
    Mutant(
        "minigold/model.py",
        "sight.mask_R1SJ is not None and query.device.type in UNGROUPED",
        "False",
        "tests/test_model.py",
    ),
    # the teacher's logits are of the student's precision
    Mutant(
        "minigold/masked.py",
        "with torch.autocast(hidden.device.type, enabled=False):",
        "with torch.autocast(hidden.device.type, enabled=torch.is_autocast_enabled('cpu')):",
        "tests/test_masked.py",
    ),
    # copies of a prompt are counted in another order than they are placed
    Mutant(
        "minigold/sample.py",
        "copies_G = torch.tensor([len(rows[prompt]) for prompt in group])",
        "copies_G = torch.tensor([len(rows[prompt]) for prompt in group[::-1]])",
        "tests/test_sample.py",
    ),
    # weights do not decay
    Mutant(
        "minigold/train.py",
        "lr=config.lr, weight_decay=config.weight_decay",
        "lr=config.lr, weight_decay=0",
        "tests/test_train.py",
    ),
    # rows that ended stay in the batch, and the others leave
    Mutant(
        "minigold/sample.py",
        "left = (~ended).nonzero()[:, 0]",
        "left = ended.nonzero()[:, 0]",
        "tests/test_sample.py",
    ),
    # the shift is deleted
    Mutant(
        "minigold/sample.py",
        "return hidden_SD[n_prompt - 1 : n_prompt + n_completion]",
        "return hidden_SD[n_prompt : n_prompt + n_completion + 1]",
        "tests/test_train.py",
    ),
    # the longer tokens of an improbable path weigh too little
    Mutant(
        "minigold/carry.py",
        "- sum(logp[cover.at : cover.start])",
        "- sum(logp[cover.start - 1 : cover.start])",
        "tests/test_teacher.py",
    ),
    # ... and those inside a chunk as much as its start
    Mutant(
        "minigold/carry.py",
        "path = sum(logp[cover.start : cover.at]) -",
        "path = -",
        "tests/test_carry.py",
    ),
    # a little of what the teacher says inside a chunk is taken for all
    Mutant(
        "minigold/carry.py",
        "and known >= MOSTLY * mass.sum())",
        "and known >= 0)",
        "tests/test_carry.py",
    ),
    # ... of any text
    Mutant("minigold/carry.py", "INSIDE_FROM * known)", "0.0)", "tests/test_carry.py"),
    # ... and what it leaves open is not counted
    Mutant(
        "minigold/carry.py",
        "np.append(ids, of_ends), np.append(rests, np.full_like(of_ends, -1))",
        "ids, rests",
        "tests/test_carry.py",
    ),
    # tokens that another comparison has told apart speak inside a chunk
    Mutant(
        "minigold/carry.py",
        "apart = [one for one in told if one[0] < len(text)]",
        "apart = []",
        "tests/test_carry.py",
    ),
    # ... or are told apart where the chunk does not start
    Mutant("minigold/carry.py", "size -= len(spelled)", "size -= 0", "tests/test_carry.py"),
    # a longer token reaches over what cannot be scored
    Mutant(
        "minigold/carry.py",
        "if stop in reading.opaque or not self.spelled[stop]",
        "if not self.spelled[stop]",
        "tests/test_teacher.py",
    ),
    # ... or what was told apart on the way is not
    Mutant(
        "minigold/carry.py",
        "passed.append((len(whole), self.taken[k]))",
        "pass",
        "tests/test_teacher.py",
    ),
    # the teacher's token tells apart what the student's did not
    Mutant(
        "minigold/carry.py",
        "reading.taken.get(at, own[at])",
        "own[at]",
        "tests/test_carry.py",
    ),
    # nothing is compared inside chunks
    Mutant("minigold/batch.py", "if s in score.inside]", "if s in ()]", "tests/test_carry.py"),
    # ... or it counts as another chunk does
    Mutant(
        "minigold/batch.py",
        "np.repeat(np.concatenate(weights), counts)",
        "np.resize(np.concatenate(weights), sum(counts))",
        "tests/test_carry.py",
    ),
    # ... or the teacher's prediction at the chunk's start counts there
    Mutant("minigold/batch.py", "if n == 0 else -1", "if n >= 0 else -1", "tests/test_carry.py"),
    # the token that broke a character is compared with what follows U+FFFD
    Mutant(
        "minigold/batch.py",
        "np.append(True, breaks_C == 0)[: len(breaks_C)]",
        "np.ones(len(breaks_C), dtype=bool)",
        "tests/test_carry.py",
    ),
    # the same texts cost something: spaces that the student has one token for have a say,
    Mutant(
        "minigold/carry.py",
        'fewest > 0 and rest.startswith(b" " * (fewest + 1))',
        "False",
        "tests/test_carry.py",
    ),
    # ... or those of them that are tokens of their own,
    Mutant("minigold/events.py", "        if spaces:\n", "        if 0:\n", "tests/test_events.py"),
    # ... what is left is not the other side's token,
    Mutant(
        "minigold/events.py",
        "is_theirs = text in texts[1 - side]",
        "is_theirs = False",
        "tests/test_events.py",
    ),
    # ... line breaks are counted,
    Mutant(
        "minigold/events.py",
        'if end in (b" ", b"\\n") else text',
        'if end == b" " else text',
        "tests/test_events.py",
    ),
    # ... and the text's own words are cut at will
    Mutant(
        "minigold/carry.py",
        "return event if len(spelled) > len(rest) else other",
        "return other",
        "tests/test_carry.py",
    ),
    # what is left of a token goes to its longest prefix
    Mutant(
        "minigold/pair.py",
        "wanted = {text[len(first) :] for text, first in new.items()} - asked",
        "wanted = set()",
        "tests/test_carry.py",
    ),
    # one of several stops counts
    Mutant(
        "minigold/teacher.py",
        "[list(end_ids)].logsumexp(0)",
        "[list(end_ids)][0]",
        "tests/test_teacher.py",
    ),
    # the mask is flipped
    Mutant(
        "minigold/disagree.py",
        "return ~(uniform_C < acceptance_C",
        "return (uniform_C < acceptance_C",
        "tests/test_disagree.py",
    ),
    # the smallest are trained
    Mutant(
        "minigold/disagree.py",
        "score_C.argsort(descending=True, stable=True)",
        "score_C.argsort(stable=True)",
        "tests/test_masked.py",
    ),
    # the control takes the first chunks
    Mutant(
        "minigold/disagree.py",
        "order_K = torch.randperm(len(places_K), generator=generator)",
        "order_K = torch.arange(len(places_K))",
        "tests/test_loss_properties.py",
    ),
    # rows run to their ends
    Mutant(
        "minigold/masked.py",
        "return len(rollout.answer.prompt_ids) + needed - 1 if needed else 0",
        "return len(rollout.answer.prompt_ids) + len(rollout.answer.ids) - 1 if needed else 0",
        "tests/test_masked.py",
    ),
    # the control takes as many as there are
    Mutant(
        "minigold/masked.py",
        "count = sum(n_trained(rollouts, chosen, config))",
        "count = sum(int(mask.sum()) for mask in chosen)",
        "tests/test_masked.py",
    ),
    # ... and its fraction is taken a second time
    Mutant(
        "minigold/masked.py",
        "if config.picks else map(np.sum, chosen)",
        "if config.mask else map(np.sum, chosen)",
        "tests/test_masked.py",
    ),
    # the loss that is no number is not among those that are picked
    Mutant(
        "minigold/masked.py",
        "torch.where(loss_C.isfinite(), scores_C.nan_to_num(), torch.inf)",
        "scores_C.nan_to_num()",
        "tests/test_masked.py",
    ),
    # what is looked up counts as a product
    Mutant(
        "minigold/masked.py",
        "if p.data_ptr() not in ends]",
        "if p.data_ptr() != weight_VD.data_ptr()]",
        "tests/test_masked.py",
    ),
    # a student with the teacher's tokenizer learns an end at which it does not stop
    Mutant(
        "minigold/events.py",
        "end if i in also_ends else min(i, n)",
        "min(i, n)",
        "tests/test_train.py",
    ),
    # the end's probability is that of ends that are ids of their own, too
    Mutant(
        "minigold/load.py",
        "end_ids=side.end_ids",
        "end_ids=self.eos_ids",
        "tests/test_masked.py",
    ),
    # ... or loses one at which it does
    Mutant("minigold/pair.py", ", stops=student.eos_ids)", ")", "tests/test_train.py"),
    # a teacher is surer than sure
    Mutant(
        "minigold/loss.py",
        "known_C = rows.teacher_logp_C.to(student_NV).clamp(max=0)",
        "known_C = rows.teacher_logp_C.to(student_NV)",
        "tests/test_tiers.py",
    ),
    # the teacher's temperature is not that of the chunks' probabilities
    Mutant(
        "minigold/rollout.py",
        "temperature=config.teacher_temperature,",
        "temperature=1.0,",
        "tests/test_masked.py",
    ),
    # the end of turn is not scored
    Mutant(
        "minigold/batch.py",
        "flaw = EXACT if ids[-1] == end_id else SPECIAL",
        "flaw = SPECIAL",
        "tests/test_train.py",
    ),
    # the token before a chunk is taken for one that starts at a shared boundary
    Mutant(
        "minigold/batch.py",
        "BEFORE if s in chunks.s0 else INSIDE",
        "BEFORE",
        "tests/test_train.py",
    ),
    # only the last token before a chunk is looked at
    Mutant(
        "minigold/batch.py",
        "max(found_C[chunk_of[stop]], stop - s)",
        "found_C[chunk_of[stop]]",
        "tests/test_same_texts.py",
    ),
    # ... or those before it count as if the path to it were certain
    Mutant("minigold/loss.py", "lead_N[row_J] * longer_J", "longer_J", "tests/test_loss.py"),
    # the step's loss is divided by all chunks
    Mutant(
        "minigold/masked.py",
        "return 1 / max(n_chosen, FLOOR_SHARE * n_chunks, 1)",
        "return 1 / max(n_chunks, 1)",
        "tests/test_train.py",
    ),
    # a layer keeps three tensors of the MLP's width, not four
    Mutant(
        "minigold/cost.py",
        "2 * d + 2 * q + 2 * k + 4 * m",
        "2 * d + 2 * q + 2 * k + 3 * m",
        "tests/test_cost.py",
    ),
    # the masks of sliding layers are forgotten
    Mutant(
        "minigold/cost.py",
        "mask = WIDE * length**2 if masked else 0",
        "mask = 0",
        "tests/test_cost.py",
    ),
    # norms of heads have no weights
    Mutant(
        "minigold/cost.py",
        'return config.family in ("qwen3", "gemma3_text")',
        'return config.family in ("gemma3_text",)',
        "tests/test_cost.py",
    ),
    # attention's backward pass makes no scores again
    Mutant(
        "minigold/cost.py",
        "layers += 14 * _queries(c)",
        "layers += 12 * _queries(c)",
        "tests/test_cost.py",
    ),
    # AdamW has one moment
    Mutant(
        "minigold/cost.py",
        '"AdamW": 2 * WIDE * s.trained',
        '"AdamW": WIDE * s.trained',
        "tests/test_cost.py",
    ),
    # the packed copies take no memory
    Mutant(
        "minigold/cost.py",
        '"packed matrices": WIDE * (matrix_parameters(s.student) + head)',
        '"packed matrices": WIDE * head',
        "tests/test_cost.py",
    ),
    # gradients stay while the next step samples
    Mutant(
        "minigold/train.py",
        "optimizer.zero_grad(set_to_none=True)  # room",
        "optimizer.zero_grad(set_to_none=False)  # room",
        "tests/test_cost.py",
    ),
    # the copies stay after the last step of decoding
    Mutant("minigold/packed.py", "layer.packed = None", "pass", "tests/test_sample.py"),
    # a recorded step is played after the columns that it sees are full
    Mutant(
        "minigold/replay.py",
        "if not self.works or shape != self.shape:",
        "if not self.works or self.shape is None:",
        "tests/test_replay.py",
    ),
    # the column that a recorded step writes stays where it was
    Mutant("minigold/cache.py", "self.column_1 += 1", "pass", "tests/test_replay.py"),
    # packed products forget the bias
    Mutant(
        "minigold/packed.py",
        'MULTIPLY(x, copy, bias, "none", [], "")',
        'MULTIPLY(x, copy, None, "none", [], "")',
        "tests/test_sample.py",
    ),
    # keys alone are cached
    Mutant(
        "minigold/cost.py",
        "cached = 2 * c.n_layers",
        "cached = c.n_layers",
        "tests/test_cost.py",
    ),
    # only the teacher reads the prompt again
    Mutant(
        "minigold/cost.py", "seen = steps * s.prompt + steps", "seen = steps", "tests/test_cost.py"
    ),
    # what the activations of a pass take is forgotten
    Mutant(
        "minigold/cost.py", '"activations": activations,', '"activations": 0,', "tests/test_cost.py"
    ),
    # a padded table's slice costs nothing
    Mutant(
        "minigold/cost.py",
        "tables = bool(before) + c.tied * (1 + bool(padded))",
        "tables = 0",
        "tests/test_cost.py",
    ),
    # the begin of a character is said as a broken one
    Mutant(
        "minigold/generate.py",
        "return self.decoder.decode(self.token_bytes[token])",
        "return self.decoder.decode(self.token_bytes[token], final=True)",
        "tests/test_generate.py",
    ),
    # tokens behind the end are said, where they are looked at together
    Mutant(
        "minigold/generate.py",
        "ended = ended or token in model.eos_ids",
        "ended = token in model.eos_ids",
        "tests/test_generate.py",
    ),
    # a character that the limit cut is a line's last
    Mutant(
        "minigold/generate.py",
        "text.close() * completion.finished",
        "text.close()",
        "tests/test_generate.py",
    ),
    # text stays in a buffer until the process ends
    Mutant(
        "minigold/cli_models.py",
        "    sys.stdout.flush()\n",
        "",
        "tests/test_generate.py",
    ),
    # checkpoints in the order of their names
    Mutant(
        "minigold/cli_models.py",
        "newest = max(found, key=lambda path: int(path.name[5:]), default=None)",
        "newest = max(found, key=lambda path: path.name, default=None)",
        "tests/test_generate.py",
    ),
    # an answer that was cut off is taught to end there
    Mutant(
        "minigold/rollout.py",
        "return [*ids, student.end_id] if prompt.finished else ids",
        "return [*ids, student.end_id]",
        "tests/test_generate.py",
    ),
    # fixed completions at the share that the student should sample
    Mutant(
        "minigold/rollout.py",
        "c >= config.lmbda",
        "c < config.lmbda",
        "tests/test_generate.py",
    ),
    # the divergence of the other side
    Mutant("minigold/evaluate.py", "beta=0.0,", "beta=1.0,", "tests/test_evaluate.py"),
    # what a prompt adds on top and below is drawn apart
    Mutant(
        "minigold/evaluate.py",
        "top_P[drawn].sum() / bottom_P[drawn].sum()",
        "top_P[drawn].sum() / bottom_P[rng.integers(n, size=n)].sum()",
        "tests/test_evaluate.py",
    ),
    # an interval of half the level
    Mutant(
        "minigold/evaluate.py",
        "[(1 - level) / 2, (1 + level) / 2]",
        "[1 - level, level]",
        "tests/test_evaluate.py",
    ),
    # nats for bits
    Mutant(
        "minigold/evaluate.py",
        "/ math.log(2)",
        "/ 1",
        "tests/test_evaluate.py",
    ),
    # every batch draws the numbers of the first
    Mutant(
        "minigold/evaluate.py",
        "settings, seeds[some])",
        "settings, seeds[: len(prompts[some])])",
        "tests/test_evaluate.py",
    ),
    # the student stays in eval mode
    Mutant(
        "minigold/evaluate.py",
        "decoder.train(was)",
        "pass",
        "tests/test_evaluate.py",
    ),
    # bytes of a broken character count once for each of its tokens
    Mutant(
        "minigold/metrics.py",
        "np.maximum(r.chunks.start, before_C)",
        "r.chunks.start",
        "tests/test_evaluate.py",
    ),
    # less right answers are better
    Mutant(
        "minigold/evaluate.py",
        "sign = -1 if BEST_BY[best_by] else 1",
        "sign = 1",
        "tests/test_resume.py",
    ),
    # the best checkpoint goes with the oldest
    Mutant(
        "minigold/checkpoint.py",
        'if best is None or _number(old) != best["step"]:',
        "if True:",
        "tests/test_resume.py",
    ),
    # evaluations of steps that are done again stay
    Mutant(
        "minigold/checkpoint.py",
        "run.evals = read_evals(run.out, n_bytes=sizes[LOGS[2]])",
        "run.evals = read_evals(run.out)",
        "tests/test_resume.py",
    ),
    # a dry run takes options of a server with a folder
    Mutant(
        "minigold/cli.py",
        "if any(check_options(args)):",
        "if False:",
        "tests/test_http_teacher.py",
    ),
    # the dry run reads the weights
    Mutant("minigold/weights.py", "if shapes_only:\n", "if False:\n", "tests/test_cli.py"),
    # a run may be asked for below a file
    Mutant("minigold/checkpoint.py", "if not found.is_dir():", "if False:", "tests/test_cli.py"),
    # what the teacher would write is read behind the chunk
    Mutant(
        "minigold/metrics.py",
        "torch.as_tensor(rollout.chunks.t0)",
        "torch.as_tensor(rollout.chunks.t1 - 1)",
        "tests/test_report.py",
    ),
    # the least likely token is the teacher's best
    Mutant(
        "minigold/teacher.py",
        "best.append(tuple(prob_NV.max(-1)))",
        "best.append(tuple(prob_NV.min(-1)))",
        "tests/test_teacher.py",
    ),
    # the last answer is that of the last row, not the first of the last step
    Mutant(
        "minigold/history.py",
        "line.step > met[-1].step",
        "line.step >= met[-1].step",
        "tests/test_report.py",
    ),
    # half a line is an error
    Mutant(
        "minigold/history.py",
        'if not raw.endswith(b"\\n"):',
        'if not raw.startswith(b"{"):',
        "tests/test_report.py",
    ),
    # the shade says how much the teacher agrees
    Mutant(
        "minigold/report.py",
        "int(LEVELS * (1 - sample.acceptance[k]))",
        "int(LEVELS * sample.acceptance[k])",
        "tests/test_report.py",
    ),
    # a prompt is HTML
    Mutant(
        "minigold/report.py",
        "{prose(told[:room])}",
        "{told[:room]}",
        "tests/test_report.py",
    ),
    # marks that turn text around stay in a prompt
    Mutant(
        "minigold/markup.py",
        'not in ("Cc", "Cf", "Cs"',
        'not in ("Cc", "Cs"',
        "tests/test_report.py",
    ),
    # a spike is lost where many steps share a place
    Mutant(
        "minigold/chart.py",
        "sorted({known[0], known[-1]} if",
        "sorted({known[0]} if",
        "tests/test_report.py",
    ),
    # the mean leaves the last step around out
    Mutant(
        "minigold/chart.py",
        "min(len(values), i + reach + 1)",
        "min(len(values), i + reach)",
        "tests/test_report.py",
    ),
    # the ends of an interval have charts of their own
    Mutant(
        "minigold/report.py",
        "key.endswith(e) and key.removesuffix(e) in row",
        "key.endswith(e) and key.removesuffix(e) not in row",
        "tests/test_report.py",
    ),
    # ---- resume
    # moments start again from nothing
    Mutant(
        "minigold/checkpoint.py",
        "set_moments(run.pair.student.decoder, run.optimizer, stored)",
        "stored.clear()",
        "tests/test_resume.py",
    ),
    # weights start again from the student's folder
    Mutant(
        "minigold/checkpoint.py",
        "_load_student(run.pair.student, run.last)\n",
        "pass\n",
        "tests/test_resume.py",
    ),
    # a file's hash is not looked at
    Mutant(
        "minigold/checkpoint.py",
        "if _described(folder / name) != written:",
        'if _described(folder / name)["bytes"] != written["bytes"]:',
        "tests/test_resume.py",
    ),
    # a log that ends early is no flaw
    Mutant(
        "minigold/checkpoint.py",
        "not 0 <= size <= log_file.stat().st_size:",
        "not 0 <= size:",
        "tests/test_resume.py",
    ),
    # prompts that were read are read again
    Mutant(
        "minigold/train.py",
        "islice(batches_of(prompts, config), len(history), None)",
        "islice(batches_of(prompts, config), 0, None)",
        "tests/test_resume.py",
    ),
    # lines after the checkpoint stay
    Mutant(
        "minigold/checkpoint.py",
        "os.truncate(run.out / name, size)",
        "(run.out / name).touch()",
        "tests/test_resume.py",
    ),
    # the checkpoint before goes while the new one is not whole yet
    Mutant(
        "minigold/checkpoint.py",
        "            for name in logs:\n                _flush(self.out / name)\n",
        "            self.keep -= 1\n            self.drop_oldest()\n            self.keep += 1\n",
        "tests/test_resume.py",
    ),
    # a checkpoint is written in its place
    Mutant(
        "minigold/checkpoint.py",
        'part = target.with_name(f".{target.name}{PART}")\n    part.mkdir(parents=True)',
        "part = target\n    part.mkdir(parents=True)",
        "tests/test_resume.py",
    ),
    # checkpoints that were passed over stay
    Mutant(
        "minigold/checkpoint.py",
        "path for path in found if _number(path) > done",
        "path for path in found if _number(path) > done and path.is_file()",
        "tests/test_resume.py",
    ),
    # two processes write to one folder
    Mutant(
        "minigold/data.py",
        "fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(found, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "tests/test_resume.py",
    ),
    # what a process left half done stays
    Mutant(
        "minigold/checkpoint.py",
        '*run.out.glob(f"*/.*{PART}")):',
        '*run.out.glob(f"*/?.*{PART}")):',
        "tests/test_resume.py",
    ),
    # prompts are compared by their number
    Mutant(
        "minigold/checkpoint.py",
        "json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True)",
        "json.dumps(len(prompts))",
        "tests/test_resume.py",
    ),
    # other versions go unnoticed
    Mutant(
        "minigold/checkpoint.py",
        '{**one, **one["versions"]} for one in (was, now)',
        "{**one} for one in (was, now)",
        "tests/test_resume.py",
    ),
    # a full disk is not told with the way on
    Mutant(
        "minigold/checkpoint.py",
        "except (OSError, SafetensorError) as error:",
        "except OSError as error:",
        "tests/test_resume.py",
    ),
    # a signal ends the run without a checkpoint
    Mutant(
        "minigold/train.py",
        "saving = best or stopping or (",
        "saving = best or (",
        "tests/test_resume.py",
    ),
    # handlers stay after the run
    Mutant(
        "minigold/stop.py",
        "for number, handler in before.items():",
        "for number, handler in list(before.items())[1:]:",
        "tests/test_resume.py",
    ),
    # ---- numbers that fail
    # a gradient of NaN reaches the weights
    Mutant(
        "minigold/train.py",
        "if math.isfinite(norm) and math.isfinite(result.loss):",
        "if math.isfinite(result.loss):",
        "tests/test_watch.py",
    ),
    # a loss of NaN does
    Mutant(
        "minigold/train.py",
        "if math.isfinite(norm) and math.isfinite(result.loss):",
        "if math.isfinite(norm):",
        "tests/test_watch.py",
    ),
    # weights are not looked at
    Mutant(
        "minigold/train.py",
        '"" if finite(parameters) else',
        '"" if parameters else',
        "tests/test_watch.py",
    ),
    # failed steps are counted over the whole run
    Mutant(
        "minigold/watch.py",
        'if row["loss"] is not None and row["grad_norm"] is not None:\n            break',
        'if row["loss"] is not None and row["grad_norm"] is not None:\n            continue',
        "tests/test_watch.py",
    ),
    # a warning at every step of a collapse
    Mutant("minigold/train.py", "if sign not in before:", "if sign:", "tests/test_watch.py"),
    # a task with repetitions is taken for a collapse
    Mutant(
        "minigold/watch.py",
        "if now > 0.3 and now > was + 0.2:",
        "if now > 0.3:",
        "tests/test_watch.py",
    ),
    # answers that were cut from the start are one
    Mutant(
        "minigold/watch.py",
        "if now < 0.02 and was > 0.1:",
        "if now < 0.02:",
        "tests/test_watch.py",
    ),
    # what is no number is left out
    Mutant(
        "minigold/disagree.py",
        "return ~(acceptance_C >= threshold)",
        "return acceptance_C < threshold",
        "tests/test_disagree.py",
    ),
    # another teacher goes on with a run
    Mutant(
        "minigold/checkpoint.py",
        "if not drift <= DRIFT:",
        "if drift < 0:",
        "tests/test_http_teacher.py",
    ),
    # a token over a whole chunk is carried and no part of it
    Mutant(
        "minigold/loss.py",
        "whole_J = over_J >= sum(map(len, groups))",
        "whole_J = over_J < 0",
        "tests/test_loss.py",
    ),
    # half a character before an end is given the whole characters
    Mutant(
        "minigold/events.py",
        "if not all(self.spelling[i] for i, _ in path):",
        "if not path:",
        "tests/test_loss.py",
    ),
    # a student that never knew a word is one that forgot them
    Mutant(
        "minigold/watch.py",
        "if now > 0.05 and now > 2 * was:",
        "if now > 0.05:",
        "tests/test_watch.py",
    ),
    # repetition of other answers counts
    Mutant(
        "minigold/metrics.py",
        "    return _share(n_runs - n_different, n_runs)",
        "    return _share(n_runs - len({t for r in sampled for t in zip(*[r.answer.ids[k:] for k in "
        "range(RUN)])}), n_runs)",
        "tests/test_watch.py",
    ),
    # three spaces and ` return` are another thing than four and `return`
    Mutant(
        "minigold/events.py",
        'fold = _one_blank if kind in ("prefix", CHUNK) else bytes',
        "fold = bytes",
        "tests/test_events.py",
    ),
    # right bytes in other tokens are a mistake
    Mutant(
        "minigold/load.py",
        "temperature=temperature, other_paths=True,",
        "temperature=temperature, other_paths=False,",
        "tests/test_teacher.py",
    ),
    # another path is as likely as the one that was taken
    Mutant(
        "minigold/carry.py",
        "_Branch(row, one.at, one.end, left, mass * path)",
        "_Branch(row, one.at, one.end, left, mass)",
        "tests/test_teacher.py",
    ),
    # what follows a longer token is not looked at
    Mutant(
        "minigold/events.py",
        "event < self.n_events and len(self.event_bytes[event]) > len(rest)",
        "event < 0",
        "tests/test_carry.py",
    ),
    # ... of the token that was read
    Mutant("minigold/carry.py", "if at in self.wanted]", "if at in ()]", "tests/test_carry.py"),
    # ... or is what comes before it
    Mutant(
        "minigold/carry.py",
        "before = range(self.n_done - 1, self.n_done - 1 + len(prob_NV))",
        "before = range(self.n_done, self.n_done + len(prob_NV))",
        "tests/test_carry.py",
    ),
    # ... of tokens on another path
    Mutant(
        "minigold/carry.py",
        "self.after.setdefault(one.at, {})[one.row[-1]] = after",
        "pass",
        "tests/test_carry.py",
    ),
    # ... of tokens that end in a space
    Mutant("minigold/carry.py", 'endswith(b" "):', 'endswith(b"\\0"):', "tests/test_carry.py"),
    # ... or it counts beside the rest alone
    Mutant(
        "minigold/carry.py",
        "np.where(of_it_K, 0.0, masses[0])",
        "masses[0]",
        "tests/test_carry.py",
    ),
    # a token that was told apart where the chunk starts is another path, too
    Mutant(
        "minigold/carry.py",
        "event = text.taken[at] if at == start else None",
        "event = None",
        "tests/test_teacher.py",
    ),
    # longer tokens of the teacher leave the tail as it was
    Mutant(
        "minigold/loss.py",
        "return law_CX, known_CX, tail_C * (1 - over_C)",
        "return law_CX, known_CX, tail_C",
        "tests/test_tiers.py",
    ),
    # the student's mass on events that the teacher did not list is forgotten
    Mutant(
        "minigold/loss.py",
        "tail_C = law_CX.masked_fill(known_CX, 0).sum(-1)",
        "tail_C = law_CX.masked_fill(known_CX, 0).sum(-1) * 0",
        "tests/test_tiers.py",
    ),
    # what is left beside a chunk loses its digits where the student is sure
    Mutant(
        "minigold/loss.py",
        "left_N = prob_NV.scatter(1, taken_N1, 0.0).sum(-1)",
        "left_N = 1 - prob_NV.gather(1, taken_N1)[:, 0]",
        "tests/test_tiers.py",
    ),
    # listed tokens are scaled up to fill the tail
    Mutant(
        "minigold/teacher.py",
        "Listed(column_MK, prob_MK.float(), tail_M),",
        "Listed(column_MK, (prob_MK / prob_MK.sum(1, True)).float(), 0 * tail_M),",
        "tests/test_tiers.py",
    ),
    # a filled-up list names an event that the teacher did not
    Mutant(
        "minigold/teacher.py",
        "column_MK = column_MK.where(is_listed_MK, column_MK[:, :1])",
        "column_MK = column_MK.where(is_listed_MK, 0)",
        "tests/test_tiers.py",
    ),
    # the token itself may be any of k + 1 listed ones
    Mutant(
        "minigold/http_teacher.py",
        'return "" if place[i] <= least + SLACK else',
        'return "" if place[i] <= 0 else',
        "tests/test_http_teacher.py",
    ),
    # another model behind the same address is trusted
    Mutant(
        "minigold/http_teacher.py",
        "if not drift <= DRIFT:",
        "if drift > 1e9:",
        "tests/test_http_teacher.py",
    ),
    # an answer that is cut is taken for whole
    Mutant(
        "minigold/wire.py",
        "if size <= most and response.length:",
        "if size > most and response.length:",
        "tests/test_http_teacher.py",
    ),
    # a thread that fails lets the others go on
    Mutant(
        "minigold/wire.py",
        "errors.append(error)\n                    self.stopped.set()",
        "errors.append(error)",
        "tests/test_http_teacher.py",
    ),
    # a key may have a new line at its end
    Mutant(
        "minigold/wire.py",
        "key = key.strip()",
        "key = key",
        "tests/test_http_teacher.py",
    ),
    # a key that cannot be sent is tried, and shown
    Mutant(
        "minigold/wire.py",
        "if not (key.isascii() and key.isprintable()):",
        "if not key.isprintable():",
        "tests/test_http_teacher.py",
    ),
    # a server that sends a byte now and then is read for ever
    Mutant(
        "minigold/wire.py",
        "            socket.shutdown(used, SHUT_RDWR)",
        "            pass",
        "tests/test_http_teacher.py",
    ),
    # an answer that the time-out cut is taken for whole
    Mutant(
        "minigold/wire.py",
        "if time.monotonic() >= until:  # an answer",
        "if False:  # an answer",
        "tests/test_http_teacher.py",
    ),
    # an address with a space in it is asked
    Mutant(
        "minigold/wire.py",
        'if re.search(r"[^!-~]", sent):',
        "if False:",
        "tests/test_http_teacher.py",
    ),
    # a time-out may be longer than sockets take
    Mutant(
        "minigold/http_teacher.py",
        "LONGEST = 10**6",
        "LONGEST = 10**10",
        "tests/test_http_teacher.py",
    ),
    # a completion's end of turn is taken from the next one
    Mutant(
        "minigold/score.py",
        "rows = slice(t0 + n, t1 + n + 1)",
        "rows = slice(t0 + n + 1, t1 + n + 2)",
        "tests/test_score.py",
    ),
    # the contents of a file of scores are not looked at
    Mutant(
        "minigold/score.py",
        "if _digest(metadata, arrays) != sha256:",
        "if not sha256:",
        "tests/test_score.py",
    ),
    # a student may sample what was not scored
    Mutant(
        "minigold/score.py",
        "if config.lmbda > 0:",
        "if config.lmbda > 1:",
        "tests/test_score.py",
    ),
    # an adapter is not scaled by its rank
    Mutant(
        "minigold/lora.py",
        "return torch.add(whole, change, alpha=self.alpha / self.rank)",
        "return torch.add(whole, change, alpha=self.alpha)",
        "tests/test_lora.py",
    ),
    # the base beside an adapter is trained too
    Mutant("minigold/lora.py", "decoder.requires_grad_(False)", "pass", "tests/test_lora.py"),
    # a stored adapter is checked and not taken
    Mutant(
        "minigold/lora.py",
        "decoder.load_state_dict(found, strict=False)",
        "pass",
        "tests/test_resume.py",
    ),
    # nested Gemma 3 has the names of the text model
    Mutant(
        "minigold/lora.py",
        'if nested else f"{PREFIX}model."',
        'if not base else f"{PREFIX}model."',
        "tests/test_lora.py",
    ),
    # any other way to adapt is taken for this one
    Mutant(
        "minigold/lora.py",
        "if value and key not in HARMLESS",
        "if value and key in ASKED",
        "tests/test_lora.py",
    ),
    # frozen matrices are copied at each step of decoding
    Mutant(
        "minigold/packed.py",
        "return None if weight.requires_grad else weight.to",
        "return None if weight.is_leaf else weight.to",
        "tests/test_lora.py",
    ),
    # a step of the optimizer forgets that frozen weights have no gradient of their own
    Mutant(
        "minigold/cost.py",
        "(6 * s.adapter - 2 * matrix_parameters(c))",
        "(6 * s.adapter)",
        "tests/test_cost.py",
    ),
    # layers run twice only where that is not asked for
    Mutant(
        "minigold/model.py",
        "if self.checkpointing and torch",
        "if not self.checkpointing and torch",
        "tests/test_train.py",
    ),
    # the layer that runs again takes no memory
    Mutant(
        "minigold/cost.py",
        "    if s.checkpointing:  # a layer is there once more",
        "    if False:  # a layer is there once more",
        "tests/test_cost.py",
    ),
    # a file's options win over those of the command line
    Mutant(
        "minigold/config_file.py",
        'return ["train", *(word for path in known.config for word in words_of(path)), *rest]',
        'return ["train", *rest, *(word for path in known.config for word in words_of(path))]',
        "tests/test_config_file.py",
    ),
    # a file with too many brackets is a bug of this library
    Mutant(
        "minigold/config_file.py",
        "except (ValueError, RecursionError) as error:",
        "except ValueError as error:",
        "tests/test_config_file.py",
    ),
    # a file's word for both sides comes after those of one
    Mutant(
        "minigold/config_file.py",
        'key=lambda name: name != "plain_prompt"',
        'key=lambda name: name == "plain_prompt"',
        "tests/test_config_file.py",
    ),
    # true is a whole number
    Mutant(
        "minigold/config_file.py",
        "if type(value) not in allowed:",
        "if not isinstance(value, allowed):",
        "tests/test_config_file.py",
    ),
    # TensorBoard shows steps twice that were done again
    Mutant("minigold/log_to.py", "purge_step=first", "purge_step=None", "tests/test_log_to.py"),
    # a run that goes on is another one
    Mutant(
        "minigold/log_to.py",
        "    if not path.is_file():\n",
        "    if True:\n",
        "tests/test_log_to.py",
    ),
    # a bar begins at zero where the run does not
    Mutant("minigold/progress.py", "initial=done", "initial=0", "tests/test_log_to.py"),
    # links may lead out of a folder
    Mutant(
        "minigold/data.py",
        "home, target = folder.resolve(), (folder / name).resolve()",
        "home, target = folder.resolve(), folder.resolve() / name",
        "tests/test_hostile.py",
    ),
    # the cache of the hub is not read through its links
    Mutant(
        "minigold/data.py",
        "homes = [home, *(root",
        "homes = [home, *(home / root",
        "tests/test_hostile.py",
    ),
    # deep JSON passes
    Mutant("minigold/data.py", "    if level:\n", "    if False:\n", "tests/test_hostile.py"),
    # a checkpoint may name any file as a log
    Mutant("minigold/checkpoint.py", " <= kept <= {*LOGS}", " <= kept", "tests/test_hostile.py"),
    # weights that the manifest does not name are read
    Mutant(
        "minigold/checkpoint.py",
        "if not whole or not",
        "if not",
        "tests/test_hostile.py",
    ),
    # a turn of a loop costs no time
    Mutant(
        "minigold/sandbox.py",
        'node.iter = self._through("turns", node.iter)',
        "pass",
        "tests/test_hostile.py",
    ),
    # what is joined has any length
    Mutant(
        "minigold/sandbox.py",
        "size += _size(value, LARGEST - size)",
        "size += 0",
        "tests/test_hostile.py",
    ),
    # JSON has any length
    Mutant(
        "minigold/sandbox.py",
        "return self.concat(encoder.iterencode(value))",
        'return "".join(encoder.iterencode(value))',
        "tests/test_hostile.py",
    ),
    # integers have any length
    Mutant(
        "minigold/sandbox.py",
        "if one.bit_length() > BITS:",
        "if False:",
        "tests/test_hostile.py",
    ),
    # a difference is not weighed
    Mutant(
        "minigold/sandbox.py",
        '"+", "-", "*"',
        '"+", "*"',
        "tests/test_hostile.py",
    ),
    # a view of values weighs nothing
    Mutant(
        "minigold/sandbox.py",
        "| Mapping | ValuesView):",
        "| Mapping):",
        "tests/test_hostile.py",
    ),
    # a date has any width
    Mutant(
        "minigold/sandbox.py",
        'if len(pattern) > PATTERN or re.search(r"%[-_+^#]*\\d", pattern):',
        "if len(pattern) > PATTERN:",
        "tests/test_hostile.py",
    ),
    # only the first argument of a method is looked at
    Mutant(
        "minigold/sandbox.py",
        "max(len(str(arg)) for arg in args)",
        "len(str(args[0]))",
        "tests/test_hostile.py",
    ),
    # compiling costs no time
    Mutant(
        "minigold/sandbox.py",
        "time.monotonic() + SECONDS - spent, 0",
        "time.monotonic() + SECONDS, 0",
        "tests/test_hostile.py",
    ),
    # nobody looks at the clock after the last step
    Mutant(
        "minigold/sandbox.py",
        "sandbox.look_at_the_clock()\n        return text",
        "return text",
        "tests/test_hostile.py",
    ),
    # small pieces may add up
    Mutant(
        "minigold/sandbox.py",
        "_check_size(self.made, MADE)",
        "_check_size(self.made, 2**40)",
        "tests/test_hostile.py",
    ),
    # sizes in a tokenizer are believed
    Mutant(
        "minigold/load.py",
        "    if wrong:\n        raise",
        "    if False:\n        raise",
        "tests/test_hostile.py",
    ),
    # samples may point anywhere
    Mutant(
        "minigold/history.py",
        "for share in shares) or not _fits(sample):",
        "for share in shares):",
        "tests/test_hostile.py",
    ),
    # the control without a teacher pushes likely tokens down
    Mutant(
        "examples/experiments/arms.py",
        "logp_S.detach() < np.log(UNLIKELY)",
        "logp_S.detach() > np.log(UNLIKELY)",
        "tests/test_experiments.py",
    ),
    # the mask that should be unbiased prefers what it draws often
    Mutant(
        "minigold/disagree.py",
        "return 1 / (1 - agreement_C).clamp(min=LEAST)",
        "return (1 - agreement_C).clamp(min=LEAST)",
        "tests/test_masked.py",
    ),
    # ... or draws what the teacher accepts less often than it says
    Mutant(
        "minigold/disagree.py",
        "most = 1 - LEAST if",
        "most = 1 - 0.5 * LEAST if",
        "tests/test_disagree.py",
    ),
    # a fixed answer is tested as if the student had written it
    Mutant(
        "minigold/masked.py",
        "wrote, reads = sides if r.answer.on_policy else sides[::-1]",
        "wrote, reads = sides",
        "tests/test_masked.py",
    ),
    # weighted leaves out what the teacher finds likelier
    Mutant(
        "minigold/disagree.py",
        "return gain_C.abs().neg().exp()",
        "return gain_C.clamp(max=0).exp()",
        "tests/test_masked.py",
    ),
    # half a character is a place to hide
    Mutant(
        "minigold/batch.py",
        "observed_C = (scorable_C | _is_broken(answer)) &",
        "observed_C = scorable_C &",
        "tests/test_train.py",
    ),
    # ... which the teacher is said to like
    Mutant(
        "minigold/batch.py",
        "if rollout.scorable_C[c] else -math.inf",
        "if rollout.scorable_C[c] else 0.0",
        "tests/test_train.py",
    ),
    # ... or blames the bytes that were right
    Mutant(
        "minigold/batch.py",
        "found_C[c] = bool(said.getstate()[0])",
        "found_C[c] = not said.getstate()[0]",
        "tests/test_train.py",
    ),
    # the teacher learns to make mistakes
    Mutant(
        "examples/train_demo_models.py",
        "-100 if any(start < stop and end > first",
        "-100 if any(start > stop and end > first",
        "tests/test_experiments.py",
    ),
    # learning rates are chosen on prompts that were trained on
    Mutant(
        "examples/experiments/screen.py",
        "return train[:-n], train[-n:]",
        "return train, train[-n:]",
        "tests/test_experiments.py",
    ),
    # a random mask trains its own number of chunks
    Mutant(
        "examples/experiments/arms.py",
        'mask = {"replay": changes["where"], **changes, "where": "random"}',
        'mask = {"replay": "all", "where": "random"}',
        "tests/test_experiments.py",
    ),
    # a tie counts as a win
    Mutant(
        "examples/experiments/table.py",
        "        holds = low > 0\n",
        "        holds = value >= 0\n",
        "tests/test_experiments.py",
    ),
    # a module's matrix is used, and what is done to its logits is not
    Mutant(
        "minigold/hf.py",
        "other = FAR * torch",
        "other = 1e-4 * FAR * torch",
        "tests/test_hf.py",
    ),
    # positions count the columns of padding as well
    Mutant(
        "minigold/hf.py",
        'more["position_ids"] = self.next_B[:, None] + ahead',
        'more["position_ids"] = n_old + ahead.expand(ids_BS.shape)',
        "tests/test_hf.py",
    ),
    # rows keep the tokens that they had in the other cache, padding in the middle
    Mutant(
        "minigold/hf.py",
        "found[rows_K, :, n - used :] = new[from_K]",
        "found[rows_K, :, :used] = new[from_K]",
        "tests/test_hf.py",
    ),
    # the module is left in the mode that minigold needed
    Mutant(
        "minigold/hf.py",
        "            one.training = not train\n",
        "            one.training = train\n",
        "tests/test_hf.py",
    ),
    # the student trains with dropout, and samples without
    Mutant(
        "minigold/hf.py",
        "if dropout or not _near(awake, asleep):",
        "if dropout and not _near(awake, asleep):",
        "tests/test_hf.py",
    ),
    # checkpointing is asked for and not done
    Mutant(
        "minigold/hf.py",
        "train=learns and self.training and self.checkpointing",
        "train=False",
        "tests/test_hf.py",
    ),
    # a student with an adapter of peft: its base is trained too
    Mutant(
        "minigold/train.py",
        "    if isinstance(decoder, HFDecoder):\n        return\n",
        "",
        "tests/test_hf.py",
    ),
    # in TRL's trainer the loss grows with the batch
    Mutant(
        "examples/in_trl.py",
        "weight=chunk_weight(rollouts, chosen, gold),",
        "weight=1.0,",
        "tests/test_in_trl.py",
    ),
    # the cache is filled with rows that were never cut
    Mutant(
        "minigold/hf.py",
        "self.mask_BJ = (column_J >= len(column_J) - length_B[:, None]).long()",
        "self.mask_BJ = torch.ones_like(self.mask_BJ)",
        "tests/test_hf.py",
    ),
    # the ranks' gradients are averaged where they should be added up
    Mutant(
        "examples/torchrun_fsdp2.py",
        "weight = world * chunk_weight",
        "weight = chunk_weight",
        "tests/test_torchrun.py",
    ),
    # each rank divides by its own number of chunks
    Mutant(
        "examples/torchrun_fsdp2.py",
        "chunk_weight(rollouts, chosen, config)",
        "chunk_weight(own, chosen[mine], config)",
        "tests/test_torchrun.py",
    ),
    # the next step samples from the old embedding and head
    Mutant(
        "examples/torchrun_fsdp2.py",
        "    decoder.reshard()  # else",
        "    # else",
        "tests/test_torchrun.py",
    ),
    # a row's random stream depends on the rows beside it
    Mutant(
        "minigold/rollout.py",
        "(seeds or seeds_of(config.seed, number, DRAW, len(rows)))[part]",
        "(seeds or seeds_of(config.seed, number, DRAW, len(rows)))[: len(coins)]",
        "tests/test_masked.py",
    ),
    # the teacher reads the student's prompt
    Mutant(
        "minigold/rollout.py",
        "told = prompt.teacher_prompt if prompt.teacher_prompt is not None else prompt.prompt",
        "told = prompt.prompt",
        "tests/test_self_teacher.py",
    ),
    # reading is practised on right answers
    Mutant(
        "examples/compute_as_teacher.py",
        "batch.append(Prompt(shown(copies, str(row.prompt)), answer=truth))",
        "batch.append(Prompt(shown(copies, str(row.prompt)), answer=row.answer))",
        "tests/test_self_teacher.py",
    ),
    # an answer to a turned question is taken as it stands
    Mutant(
        "examples/compute_as_teacher.py",
        '[*text.split(", "), ""][:2][::turned]',
        '[*text.split(", "), ""][:2]',
        "tests/test_self_teacher.py",
    ),
    # the teacher is the student as it is now, not as it was at the start
    Mutant(
        "examples/compute_as_teacher.py",
        "distill(student, anchor, blank,",
        "distill(student, copy.deepcopy(student), blank,",
        "tests/test_self_teacher.py",
    ),
)


def _pytest(folder: Path, tests: str) -> int | None:
    """pytest's exit code, or None if it ran past the limit."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    environment = {
        **os.environ,
        "HYPOTHESIS_PROFILE": "ci",  # the same examples every time
        "PYTHONPATH": str(folder),  # the copy, not an installed minigold
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def _verdict(folder: Path, mutant: Mutant) -> str:
    path = folder / mutant.file
    original = path.read_text("utf-8")
    count = original.count(mutant.old)
    if count != 1:
        return f"STALE: found {count} times, expected once"
    path.write_text(original.replace(mutant.old, mutant.new), "utf-8")
    try:
        code = _pytest(folder, mutant.tests)
    finally:
        path.write_text(original, "utf-8")
    if code in (1, None):
        return "noticed"
    return "SURVIVED" if code == 0 else f"INVALID: pytest ended with {code}, expected failed tests"


def main(word: str = "") -> int:
    """Prints a table; 0 if every edit was noticed."""
    chosen = [m for m in MUTANTS if word in "".join(m)]
    if not chosen:
        raise ValueError(f"expected a word in one of {len(MUTANTS)} edits, got {word!r}")
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(ROOT, folder, ignore=IGNORED)
        for tests in dict.fromkeys(m.tests for m in chosen):
            if _pytest(folder, tests) != 0:
                print(f"{tests}: expected to pass without an edit, got a failure")
                return 1
        for mutant in chosen:
            start = time.perf_counter()
            verdict = _verdict(folder, mutant)
            bad += verdict != "noticed"
            place = f"{mutant.file}: {' '.join(mutant.new.split())[:60]}"
            print(f"{verdict:10} {time.perf_counter() - start:5.1f} s  {place}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} edits noticed")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:2]))
