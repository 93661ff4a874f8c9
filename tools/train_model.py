"""Train the small language model that ships in ``headway.lm``.

The model is a Llama of about 1.9 million parameters, trained on the King James
Bible as Debian packages it (``bible-kjv-text``; the program that unpacks it is
in ``bible-kjv``).  The result is an ordinary Hugging Face model folder: this
script needs PyTorch and ``tokenizers``, the package that reads the folder does
not need PyTorch.

    pip install torch numpy safetensors tokenizers
    python tools/train_model.py --out src/headway/lm/model --bfloat16 --compile

The two switches only make it faster: --bfloat16 on processors that multiply
in bfloat16, --compile where there is a C++ compiler.  The shipped model was
trained with both.

A run is a function of its arguments: the batch and the dropout mask of every
step are drawn from (seed, step), so a run that was stopped and resumed from
its checkpoint takes the same steps as one that was not.  (Floating-point sums
still differ in their last bits between processors and thread counts.)
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

BOS, EOS = "<s>", "</s>"
#: SHA-256 of what ``bible -f gen1:1-rev22:21`` prints (bible-kjv-text 4.38).
TEXT_SHA256 = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"
#: One chapter in 33 (3 %), evenly spread, is never trained on.
HOLD_OUT_EVERY, HOLD_OUT_FIRST = 33, 16


# --------------------------------------------------------------------- text


def run_bible(program: str, data_dir: Path | None) -> str:
    """What the ``bible`` program prints for the whole text, a verse per line."""
    command = [program]
    if data_dir is not None:
        command += ["-p", str(data_dir)]
    # -f switches the pretty-printing *off*: no line is wrapped.
    command += ["-f", "gen1:1-rev22:21"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="ascii").stdout


def fetch_text(path: Path | None) -> str:
    """The text from a file, from an installed ``bible``, or from Debian's packages."""
    if path is not None:
        return path.read_text(encoding="ascii")
    installed = shutil.which("bible")
    if installed is not None:
        return run_bible(installed, None)
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        sys.exit("no `bible` program and no apt-get: give the text with --text FILE")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "bible-kjv", "bible-kjv-text"], check=True, cwd=folder)
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), folder], check=True)
        root = Path(folder, "usr")
        return run_bible(str(root / "bin" / "bible"), root / "lib")


def split_chapters(text: str) -> list[str]:
    """Chapters in order, each its verses without numbers, one verse per line.

    A verse is one line however long it is, so there is no wrapping to learn.
    """
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(\w+?\d+):\d+ (.+)", line)
        if match is None:
            raise ValueError(f"not a verse: {line!r}")
        verse = re.sub(r" +", " ", match[2]).strip()
        chapters.setdefault(match[1], []).append(verse)
    return ["\n".join(verses) for verses in chapters.values()]


def train_tokenizer(chapters: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text can be encoded, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, chapters: list[str]) -> Tensor:
    """All chapters in one stream, each between <s> and </s>."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([f"{BOS}{chapter}{EOS}" for chapter in chapters]):
        ids += encoding.ids
    return torch.tensor(ids)


# -------------------------------------------------------------------- model


@dataclass(frozen=True)
class Config:
    """The shape of the model, under Hugging Face's names."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 480
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, in the half-split layout of Hugging Face."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention in which several query heads share a key-value head."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Attend along the second axis of (batch, length, hidden)."""
        batch, length, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, -1, self.c.head_dim).transpose(1, 2)

        # The tables are float32; under autocast the projections are bfloat16.
        v = heads(self.v_proj(x))
        q = rotate(heads(self.q_proj(x)), cos, sin).to(v.dtype)
        k = rotate(heads(self.k_proj(x)), cos, sin).to(v.dtype)
        groups = self.c.num_attention_heads // self.c.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        # Written out, because at this size it is faster on a CPU, forward and
        # backward, than scaled_dot_product_attention (1.4 times, measured).
        scores = (q * self.c.head_dim**-0.5) @ k.transpose(-1, -2)
        y = (scores + mask.to(scores.dtype)).softmax(dim=-1) @ v
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class MLP(nn.Module):
    """The gated feed-forward half of a layer."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to each position by itself."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, c: Config, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Return the residual stream after this layer."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x


class Decoder(nn.Module):
    """The part that Hugging Face names ``model``: it only holds the parameters."""

    def __init__(self, c: Config, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, dropout) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Llama(nn.Module):
    """Llama with the parameter names of Hugging Face's LlamaForCausalLM."""

    cos: Tensor
    sin: Tensor
    mask: Tensor

    def __init__(self, c: Config, dropout: float) -> None:
        super().__init__()
        self.model = Decoder(c, dropout)
        self.dropout = nn.Dropout(dropout)
        inverse = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        angles = torch.outer(torch.arange(c.max_position_embeddings), inverse).repeat(1, 2)
        # Not parameters, and not in the file: they follow from the config.
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        future = torch.full((c.max_position_embeddings,) * 2, -torch.inf).triu(1)
        self.register_buffer("mask", future, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream starts smaller, so that
                # the stream's size does not grow with the number of layers.
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * c.num_hidden_layers) ** -0.5 if into_stream else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross-entropies of ``targets``, in nats."""
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        mask = self.mask[:length, :length]
        x = self.dropout(self.model.embed_tokens(ids))
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask)
        # The embedding is tied: the same matrix reads and writes tokens.
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


# ----------------------------------------------------------------- training


def batches(ids: Tensor, length: int, size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Endless batches of ``length + 1`` tokens, from step ``start`` on.

    An epoch cuts the stream into windows in a random order, from a random
    offset: no two epochs see the same cuts.
    """
    per_epoch = (len(ids) - length - 1) // length // size
    step = start
    while True:
        epoch, index = divmod(step, per_epoch)
        rng = np.random.default_rng([seed, epoch])
        offset = int(rng.integers(length))
        order = rng.permutation((len(ids) - 1 - offset) // length)
        for i in range(index, per_epoch):
            windows = order[i * size : (i + 1) * size] * length + offset
            yield torch.stack([ids[w : w + length + 1] for w in windows.tolist()])
            step += 1


def learning_rate(step: int, *, peak: float, warmup: int, decay: int, total: int) -> float:
    """Linear warm-up, a plateau, then a half cosine down to nothing.

    With a plateau, the steps before the decay do not depend on their total
    number: a checkpoint from there may be decayed at once, or trained longer.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    remaining = min(1.0, (total - step) / decay)
    return peak * 0.5 * (1 - math.cos(math.pi * remaining))


@torch.no_grad()
def evaluate(model: Llama, ids: Tensor, length: int) -> float:
    """Total nats of every token of the stream but its first."""
    model.eval()
    total = 0.0
    for start in range(0, len(ids) - 1, length * 8):
        block = ids[start : start + length * 8 + 1]
        full = (len(block) - 1) // length
        if full:
            rows = block[: full * length + 1].unfold(0, length + 1, length)
            total += model(rows[:, :-1], rows[:, 1:]).item()
        rest = block[full * length :]
        if len(rest) > 1:
            total += model(rest[None, :-1], rest[None, 1:]).item()
    model.train()
    return total


def export(folder: Path, model: Llama, c: Config, tokenizer: Tokenizer) -> None:
    """Write the Hugging Face model folder, the weights as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner alone
    # Merges as "a b", the older of the two spellings: every version of `tokenizers` reads it.
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(c),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": "float16",
    }
    generation = {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        # "LORD ," is not "LORD,": decoding must not tidy up.
        "clean_up_tokenization_spaces": False,
        "model_max_length": c.max_position_embeddings,
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(path: Path, **content: object) -> None:
    """Replace the checkpoint in one move: a stop half-way leaves the old one."""
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; the numbers' defaults are the shipped model's."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--text", type=Path, help="output of `bible -f gen1:1-rev22:21`")
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--decay-steps", type=int, default=2250)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--seed", type=int, default=1611)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--checkpoint", type=Path, help="resume from, and save to, this file")
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations")
    return parser.parse_args()


def main() -> None:
    """Prepare the text, train, and write the model's folder."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    text = fetch_text(args.text)
    if hashlib.sha256(text.encode()).hexdigest() != TEXT_SHA256:
        print("warning: not the text that the shipped model was trained on", file=sys.stderr)
    chapters = split_chapters(text)
    held_out = set(range(HOLD_OUT_FIRST, len(chapters), HOLD_OUT_EVERY))
    training = [c for i, c in enumerate(chapters) if i not in held_out]
    validation = [c for i, c in enumerate(chapters) if i in held_out]

    config = Config(max_position_embeddings=args.length)
    tokenizer = train_tokenizer(training, config.vocab_size)
    for chapter in chapters:
        assert tokenizer.decode(tokenizer.encode(chapter).ids) == chapter
    train_ids, valid_ids = encode(tokenizer, training), encode(tokenizer, validation)
    valid_bytes = sum(len(c.encode()) for c in validation)

    model = Llama(config, args.dropout)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{len(train_ids):,} tokens to train on, {len(valid_ids):,} held out "
        f"({len(validation)} of {len(chapters)} chapters)",
        flush=True,
    )
    # Gains of the norms are not decayed: there is no reason for them to be small.
    groups: list[dict[str, object]] = [
        {"params": [p for p in model.parameters() if p.dim() == 2]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=args.lr,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=True,
    )
    first = 0
    if args.checkpoint is not None and args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"resumed after step {first}", flush=True)

    step_loss = torch.compile(model) if args.compile else model
    autocast = torch.autocast("cpu", torch.bfloat16) if args.bfloat16 else contextlib.nullcontext()
    running, began, began_at = 0.0, time.monotonic(), first
    stream = batches(train_ids, args.length, args.batch, args.seed, first)
    for step in range(first, args.steps):
        rows = next(stream)
        torch.manual_seed(args.seed * 1_000_003 + step)  # for the dropout masks
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, peak=args.lr, warmup=args.warmup_steps, decay=args.decay_steps, total=args.steps
            )
        with autocast:
            loss = step_loss(rows[:, :-1], rows[:, 1:]) / (args.batch * args.length)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        running += loss.item()

        done = step + 1
        if done % args.every == 0 or done == args.steps:
            nats = evaluate(model, valid_ids, args.length)
            speed = (done - began_at) / (time.monotonic() - began)
            print(
                f"step {done:6d}  epoch {done * args.batch * args.length / len(train_ids):5.2f}  "
                f"train {running / ((done - 1) % args.every + 1):.4f}  "
                f"valid {nats / (len(valid_ids) - 1):.4f} nats/token, "
                f"{nats / math.log(2) / valid_bytes:.4f} bits/byte  {speed:.2f} steps/s",
                flush=True,
            )
            running = 0.0
            if args.checkpoint is not None:
                save_checkpoint(
                    args.checkpoint,
                    model=model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    step=done,
                )
    export(args.out, model, config, tokenizer)
    print(f"wrote {args.out}: {sum(p.stat().st_size for p in args.out.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
