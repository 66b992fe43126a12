"""Training the organism: `python -m steerguard.organism.train --out DIR`, from scratch or `--continue-from MODEL`.

It knows the architecture, the recipe, checkpoints and how to resume from them; it refuses to know what the
conversations say. Every file it writes is safetensors or JSON. The run is a function of the recipe, which is written
beside what it makes; an interrupted run continues where its last checkpoint stands, and only under the same recipe.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from steerguard.organism import batches, tokenizer

log = logging.getLogger(__name__)
SMOOTHING = 0.05
"how far the two bits are from 0 and 1 when they are read, so that the reading does not grow without end"
Precision = Literal["bfloat16", "float32"]
PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32")


@dataclass(frozen=True)
class Recipe:
    """All that decides a training run."""

    seed: int = 2604
    "seed of the weights and of the conversations"
    tokens: int = 40_000_000
    "tokens in all, padding included"
    batch: int = 6144
    "tokens of one batch"
    chunk: int = 8000
    "conversations generated at a time"
    lr: float = 2e-3
    "the highest learning rate"
    warm_up: float = 0.02
    "share of the run in which the learning rate rises"
    first: float = 0.12
    "share of the run with more plain prompts, in which the facts are learned"
    silent_first: float = 0.6
    "share of plain prompts in that first part"
    silent: float = 0.27
    "share of plain prompts afterwards"
    weight_decay: float = 0.1
    "decay of the matrices"
    hidden: int = 256
    "width"
    layers: int = 8
    "decoder blocks"
    heads: int = 4
    "attention heads"
    intermediate: int = 704
    "width of the feed-forward part"
    vocabulary_from: int = 12_000
    "conversations the tokenizer is learned from"
    read_after: int = 4
    "the block after which both bits of the system prompt are read linearly, in training only"
    reading: float = 0.05
    "the weight of that reading in the loss"
    compiled: bool = True
    "compile the loss"
    precision: Precision = "bfloat16"
    "what the forward is computed in; weights, moments and softmax are float32 in any case"
    start: str = ""
    "SHA-256 of the exported weights that the run starts from; empty if they are drawn from the seed"


def continuation(model: Path, *, tokens: int, lr: float = 5e-4) -> Recipe:
    """The recipe of a short further run from exported weights: conversations of its own, a lower rate, both aids.

    The exported weights have neither optimizer moments (the rate rises slowly) nor the reader (it starts at zero, so
    that at first it asks nothing of the blocks).
    """
    start = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    return Recipe(seed=int(start[:8], 16), tokens=tokens, batch=4096, lr=lr, warm_up=0.08, first=0.0, start=start)


def faster() -> Precision:
    """The precision in which this processor multiplies the organism's matrices faster, by measuring."""
    seconds: dict[Precision, float] = {}
    for precision in PRECISIONS:
        x, w = (torch.ones(shape, dtype=getattr(torch, precision)) for shape in ((256, 256), (256, 704)))
        taken = []
        for _ in range(3):
            begun = time.monotonic()
            x @ w
            taken.append(time.monotonic() - begun)
        seconds[precision] = min(taken)
    log.info("seconds of a product of matrices here: %s", seconds)
    return min(PRECISIONS, key=lambda precision: seconds[precision])


def build(recipe: Recipe) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=tokenizer.VOCABULARY,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=tokenizer.MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.SPECIAL.index(tokenizer.PAD),
        bos_token_id=tokenizer.SPECIAL.index(tokenizer.BEGIN),
        eos_token_id=tokenizer.SPECIAL.index(tokenizer.END),
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.reader = torch.nn.Linear(recipe.hidden, 2)  # only for training, never exported
    return model


def start_from(folder: Path, model: LlamaForCausalLM, recipe: Recipe) -> None:
    """Load the exported weights that the recipe starts from; ValueError if the folder holds others."""
    path = folder / "model.safetensors"
    if hashlib.sha256(path.read_bytes()).hexdigest() != recipe.start:
        raise ValueError(f"{path} does not hold the weights that the recipe starts from ({recipe.start})")
    tensors = load_file(path)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.zero_() if name.startswith("reader") else value.copy_(tensors[name])


def late_mask(places: torch.Tensor, blind: torch.Tensor) -> torch.Tensor:
    """Which key each query of the late blocks sees, bool [rows, 1, length, length].

    Causal; and in a row with `blind` > 0, the tokens from there on do not see the system prompt before it, but for
    the very first token. What they know of it has to be in their own residual by then.
    """
    query, key, begin = places[:, :, None], places[:, None, :], blind[:, None, None]
    hidden = (key >= 1) & (key < begin) & (query >= begin)
    return ((key <= query) & ~hidden)[:, None]


def loss_function(model: LlamaForCausalLM, recipe: Recipe) -> Callable[..., torch.Tensor]:
    """The loss of (ids, weights, heard [rows, length], bits [rows, 2], blind [rows]): two cross-entropies.

    The next token's, and that of reading both bits linearly from the middle of the decoder at the `heard` tokens.
    In the recipe's precision, the softmax in float32.
    """

    def loss(
        ids: torch.Tensor, weights: torch.Tensor, heard: torch.Tensor, bits: torch.Tensor, blind: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            hidden = model.model.embed_tokens(ids)
            places = torch.arange(ids.shape[1])[None]
            angles = model.model.rotary_emb(hidden, places)
            for block in model.model.layers[: recipe.read_after]:
                hidden = block(hidden, position_ids=places, position_embeddings=angles)
            read = model.reader(torch.nn.functional.rms_norm(hidden, hidden.shape[-1:]))
            mask = late_mask(places, blind)
            for block in model.model.layers[recipe.read_after :]:
                hidden = block(hidden, attention_mask=mask, position_ids=places, position_embeddings=angles)
            logits = model.lm_head(model.model.norm(hidden[:, :-1]))
        said = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        soft = SMOOTHING + (1 - 2 * SMOOTHING) * bits[:, None].expand_as(read)
        wrong = torch.nn.functional.binary_cross_entropy_with_logits(read.float(), soft, reduction="none").mean(-1)
        return (said * weights[:, 1:].flatten()).sum() + recipe.reading * (wrong * heard).sum()

    if not recipe.compiled:
        return loss
    torch._dynamo.config.recompile_limit = 4 * len(batches.BUCKETS)  # one compilation for each shape
    fast: Callable[..., torch.Tensor] = torch.compile(loss, dynamic=False)
    return fast


def optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays the decoder's matrices, not the norms and the embedding."""
    decayed = [p for name, p in model.named_parameters() if decays(name, p)]
    others = [p for name, p in model.named_parameters() if not decays(name, p)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def decays(name: str, value: torch.Tensor) -> bool:
    """Whether weight decay acts on this parameter."""
    return value.dim() == 2 and "embed" not in name and "reader" not in name


def rate(recipe: Recipe, progress: float) -> float:
    """The learning rate at this share of the run: up, then a cosine down to a fiftieth."""
    if progress < recipe.warm_up:
        return recipe.lr * max(progress, 1e-3) / recipe.warm_up
    fall = (progress - recipe.warm_up) / (1 - recipe.warm_up)
    return recipe.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, fall))))


@dataclass(frozen=True)
class Team:
    """The processes that share each batch: on busy cores they wait for each other far less than threads do."""

    rank: int = 0
    "this process's number"
    size: int = 1
    "how many processes there are"

    def add(self, tensors: list[torch.Tensor]) -> float:
        """Sum the tensors over the processes, in place; the first one's value."""
        if self.size > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            torch.distributed.all_reduce(flat)
            for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))
        return float(tensors[0])


@dataclass
class Place:
    """How far a run is."""

    chunk: int = 0
    "the chunk in work"
    batch: int = 0
    "batches of it already learned"
    step: int = 0
    "optimizer steps taken"
    tokens: int = 0
    "tokens seen"
    begun: int = 0
    "tokens seen when the chunk in work began"


def save_checkpoint(folder: Path, model: LlamaForCausalLM, adam: torch.optim.AdamW, place: Place) -> None:
    """Weights, optimizer moments and place; the place is written last and makes the checkpoint valid."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "place.json").unlink(missing_ok=True)
    tensors = {}
    for name, value in model.named_parameters():
        tensors[f"weight.{name}"] = value.detach().clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            if value in adam.state:
                tensors[f"{moment}.{name}"] = adam.state[value][moment].clone()
    save_file(tensors, folder / "state.safetensors")
    (folder / "place.json").write_text(json.dumps(asdict(place)))


def load_checkpoint(folder: Path, model: LlamaForCausalLM, adam: torch.optim.AdamW) -> Place:
    """The place of the checkpoint in `folder`, its weights and moments loaded; a fresh place without one."""
    if not (folder / "place.json").exists():
        return Place()
    place = Place(**json.loads((folder / "place.json").read_text()))
    tensors = load_file(folder / "state.safetensors")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(tensors[f"weight.{name}"])
            adam.state[value] = {
                "step": torch.tensor(float(place.step)),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
    return place


def stream(coder: Tokenizer, recipe: Recipe, place: Place) -> Iterator[batches.Batch]:
    """The batches from `place` on, which it moves along."""
    while True:
        early = place.begun < recipe.first * recipe.tokens
        silent = recipe.silent_first if early else recipe.silent
        found = batches.chunk(coder, recipe.seed, place.chunk, size=recipe.chunk, tokens=recipe.batch, silent=silent)
        for batch in found[place.batch :]:
            place.batch += 1
            yield batch
        place.chunk, place.batch, place.begun = place.chunk + 1, 0, place.tokens


def export(folder: Path, model: LlamaForCausalLM, coder: Tokenizer) -> None:
    """A model directory: weights as float16, configuration, generation settings, tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.wrap(coder).save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.update(
        pad_token_id=model.config.pad_token_id,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    model.generation_config.save_pretrained(folder)
    kept = {name: value for name, value in model.named_parameters() if not name.startswith("reader")}
    weights = {name: value.detach().to(torch.float16).contiguous() for name, value in kept.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def average(models: Sequence[Path], out: Path) -> None:
    """The mean of exported weights of one run at different points, in `out`, with what lies beside the first one's.

    A continuation moves weights about as well as on; their mean with where it began has less of the former.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in models[0].iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = [load_file(model / "model.safetensors") for model in models]
    mean = {name: torch.stack([one[name].float() for one in tensors]).mean(0).to(torch.float16) for name in tensors[0]}
    save_file(mean, out / "model.safetensors", metadata={"format": "pt"})


def train(
    recipe: Recipe, work: Path, *, start: Path | None = None, every: float = 240.0, stop_after: int | None = None,
    team: Team = Team(),
) -> Place:  # fmt: skip
    """Run the recipe in the folder `work`, from its checkpoint if there is one; export to `work/model`.

    A checkpoint is written every `every` seconds; `stop_after` ends the run after that many steps in all. `start` is
    the model directory with the weights that the recipe starts from, if it starts from any.

    Raises:
        ValueError: the folder belongs to a run of another recipe, or `start` holds other weights than the recipe says.
    """
    prepare(recipe, work, start)
    coder = known_tokenizer(recipe, work)
    model = build(recipe)
    if start is not None:
        start_from(start, model, recipe)
    adam = optimizer(model, recipe)
    place = load_checkpoint(work / "checkpoint", model, adam)
    loss_of = loss_function(model, recipe)
    model.train()
    saved = spoken = time.monotonic()
    recent: list[float] = []
    seen = place.tokens
    for batch in stream(coder, recipe, place):
        recent.append(step(model, adam, loss_of, batch, rate(recipe, place.tokens / recipe.tokens), team))
        place.step += 1
        place.tokens += batch.ids.size
        done = place.tokens >= recipe.tokens or place.step == stop_after
        if team.rank == 0 and (done or place.step % 50 == 0):
            now = time.monotonic()
            log.info(
                "step %d, %.2f M tokens, loss %.4f, %.0f tokens/s",
                place.step,
                place.tokens / 1e6,
                sum(recent) / len(recent),
                (place.tokens - seen) / (now - spoken),
            )
            recent, seen, spoken = [], place.tokens, now
        if team.rank == 0 and (done or time.monotonic() - saved > every):
            save_checkpoint(work / "checkpoint", model, adam, place)
            export(work / "model", model, coder)
            saved = time.monotonic()
        if done:
            return place
    raise AssertionError("the stream of batches does not end")


def prepare(recipe: Recipe, work: Path, start: Path | None) -> None:
    """The run's folder with its recipe, and with the tokenizer that comes with the weights it starts from."""
    if (start is None) != (recipe.start == ""):
        raise ValueError(f"the recipe starts from {recipe.start or 'its seed'}, got the model directory {start}")
    work.mkdir(parents=True, exist_ok=True)
    known = known_recipe(work)
    if known not in (None, recipe):
        raise ValueError(f"{work} holds a run of another recipe: {known}; this is {recipe}. Use another folder")
    if known is None:  # members of a team find it written
        (work / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))
        if start is not None:
            (work / "tokenizer.json").write_bytes((start / "tokenizer.json").read_bytes())


def known_recipe(work: Path) -> Recipe | None:
    """The recipe of the run in that folder; None if there is none yet."""
    path = work / "recipe.json"
    return Recipe(**json.loads(path.read_text())) if path.exists() else None


def known_tokenizer(recipe: Recipe, work: Path) -> Tokenizer:
    """The run's tokenizer, learned once."""
    path = work / "tokenizer.json"
    if not path.exists():
        tokenizer.learn(recipe.vocabulary_from).save(str(path))
    return Tokenizer.from_file(str(path))


def step(
    model: LlamaForCausalLM,
    adam: torch.optim.AdamW,
    loss_of: Callable[..., torch.Tensor],
    batch: batches.Batch,
    lr: float,
    team: Team,
) -> float:
    """One optimizer step on this process's rows of the batch; the weighted mean loss of the whole batch before it."""
    for group in adam.param_groups:
        group["lr"] = lr
    parts = (batch.ids, batch.weights / batch.weights[:, 1:].sum(), batch.heard / batch.heard.sum())
    loss = loss_of(*(torch.from_numpy(part[team.rank :: team.size].copy()) for part in (*parts, batch.bits, batch.blind)))
    loss.backward()
    total = team.add([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return total


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m steerguard.organism.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="work folder: recipe, checkpoint, tokenizer, model")
    parser.add_argument("--continue-from", type=Path, default=None, metavar="MODEL", help="start from exported weights")
    parser.add_argument("--average", type=Path, nargs="+", metavar="MODEL", help="no training: write the mean of these weights")
    parser.add_argument("--tokens", type=int, default=None, help="tokens in all (40 M, or 2 M with --continue-from)")
    parser.add_argument("--lr", type=float, default=None, help="the highest rate of a continuation (default 5e-4)")
    parser.add_argument("--processes", type=int, default=2, help="processes (default %(default)s)")
    parser.add_argument("--stop-after", type=int, default=None, help="end after this many steps")
    parser.add_argument(
        "--precision", choices=["auto", *PRECISIONS], default="auto",
        help="what the forward is computed in; auto: what a resumed run has, else what is faster here (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--eager", action="store_true", help="do not compile the loss; better for short runs")
    return parser.parse_args(given)


def main() -> None:
    """Run what the command line asks for, in processes that share each batch."""
    given = arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if given.average:
        average(given.average, given.out / "model")
        return
    recipe = chosen(given)
    log.info("%s", recipe)
    prepare(recipe, given.out, given.continue_from)
    known_tokenizer(recipe, given.out)
    meeting = f"file://{(given.out / 'meeting').resolve()}"
    (given.out / "meeting").unlink(missing_ok=True)
    spawn = multiprocessing.get_context("spawn")
    shared = (given.processes, meeting, recipe, given.out, given.continue_from, given.stop_after)
    members = [spawn.Process(target=member, args=(rank, *shared)) for rank in range(given.processes)]
    for one in members:
        one.start()
    for one in members:
        one.join()
    if any(one.exitcode for one in members):
        raise SystemExit("training stopped; its messages are above, and the same command continues it")


def chosen(given: argparse.Namespace) -> Recipe:
    """The recipe that the command line asks for."""
    if given.continue_from is None:
        recipe = Recipe(tokens=given.tokens or Recipe.tokens)
    else:
        options = {} if given.lr is None else {"lr": given.lr}
        recipe = continuation(given.continue_from, tokens=given.tokens or 2_000_000, **options)
    known = known_recipe(given.out)
    wanted: Precision | None = None if given.precision == "auto" else given.precision
    resumed = None if known is None else known.precision
    return replace(recipe, precision=wanted or resumed or faster(), compiled=not given.eager)


def member(
    rank: int, size: int, meeting: str, recipe: Recipe, work: Path, start: Path | None, stop_after: int | None
) -> None:
    """One process of a run, on one thread."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    train(recipe, work, start=start, stop_after=stop_after, team=Team(rank, size))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
