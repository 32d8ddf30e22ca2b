# SPDX-License-Identifier: Apache-2.0
"""Is a served teacher the model that it should be? Compares a server with the same model in process.

    python examples/check_server.py --make runs/tiny-llama
    vllm serve runs/tiny-llama --dtype float32 --max-model-len 512 --max-logprobs -1 --enforce-eager
    python examples/check_server.py --server http://localhost:8000 --folder runs/tiny-llama

Reads the demo's held-out prompts with their answers at several `--teacher-top-k` and prints the
largest difference of a log-probability, in nats, and in how many places other tokens are listed.
`--make` writes a random Llama whose heads are wide enough for vLLM on a CPU; any folder does that fits
into the memory twice. What it simplifies: equal probabilities may be listed in another order, and
count as other tokens then.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import minigold
from minigold.carry import Reading
from minigold.chat import prompt_ids
from minigold.demo_task import held_out
from minigold.families import model_config
from minigold.http_teacher import open_server
from minigold.load import LanguageModel, load
from minigold.model import Decoder
from minigold.offsets import encode_continuation
from minigold.teacher import Told
from minigold.tiers import described, limited
from minigold.weights import save_decoder

SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip


def make(folder: Path) -> None:
    """Writes a random model with the tokenizer of the demo's teacher."""
    source = Path(minigold.__file__).parent / "demo_data" / "teacher"
    raw = {**SHAPE, "vocab_size": load(source).n_tokens}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw), "utf-8")
    torch.manual_seed(0)
    save_decoder(Decoder(model_config(raw)), folder, source=source, base=folder)


def readings_of(model: LanguageModel, n: int) -> list[Reading]:
    """Prompts and right answers of the demo, in the model's tokens."""
    plain = model.template is None
    return [
        Reading(
            prompt_ids(model, one.prompt, plain=plain),
            encode_continuation(model.tokenizer, one.answer or "")[0],
        )
        for one in held_out()[:n]
    ]


def compare(served: Sequence[Told], own: Sequence[Told]) -> tuple[float, float, int, int]:
    """Largest differences of the given and of the listed, places with other tokens, all places."""
    given = listed = 0.0
    others = places = 0
    for a, b in zip(served, own, strict=True):
        given = max(given, float((a.logp_M - b.logp_M).abs().max()))
        for row in zip(a.id_MK, a.logp_MK, b.id_MK, b.logp_MK, strict=True):
            ids_a, logp_a, ids_b, logp_b = (part.tolist() for part in row)
            one = {i: x for i, x in zip(ids_a, logp_a, strict=True) if x > -torch.inf}
            other = {i: x for i, x in zip(ids_b, logp_b, strict=True) if x > -torch.inf}
            others += one.keys() != other.keys()
            places += 1
            both = one.keys() & other.keys()
            listed = max([listed, *(abs(one[i] - other[i]) for i in both)])
    return given, listed, others, places


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compares a served teacher with the same in process."
    )
    parser.add_argument(
        "--make", type=Path, help="write a random model to this new folder, and end"
    )
    parser.add_argument("--server", help="http://host:port")
    parser.add_argument("--folder", type=Path, help="the model that is served")
    parser.add_argument(
        "--top-k", default="0,1,5,20", help="of `--teacher-top-k` (default 0,1,5,20)"
    )
    parser.add_argument("--texts", type=int, default=20)
    args = parser.parse_args()
    if args.make:
        make(args.make)
        return
    if not (args.server and args.folder):
        parser.error("expected --server and --folder, or --make; see --help")
    model = load(args.folder)
    readings = readings_of(model, args.texts)
    for top_k in map(int, args.top_k.split(",")):
        teacher = open_server(args.server, args.folder, top_k=top_k)
        begun = time.perf_counter()
        served = teacher.tell(readings, micro_batch=8)
        seconds = time.perf_counter() - begun
        given, listed, others, places = compare(
            served, limited(model, teacher.top_k).tell(readings, micro_batch=8)
        )
        print(described(teacher))
        print(
            f"  {places} places in {seconds:.2f} s: given tokens {given:.1e} nats apart at most, listed "
            f"ones {listed:.1e}; other tokens listed in {others} places",
            flush=True,
        )


if __name__ == "__main__":
    main()
