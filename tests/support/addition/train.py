"""Train the addition model of the tests from scratch, in half an hour on one CPU core.

The task is addition of numbers of 1 to 6 digits. A training row is a begin-of-text token followed
by sums until the row is full. The loss covers the digits of the answers and the ``;`` after each,
since nothing else can be predicted. So every sum in a row is a question, with the sums before it
as worked examples. Rows are short at first, while the model learns the algorithm, and reach
``DemoConfig.max_context`` at the end, when it has to work at any position.

    PYTHONPATH=tests python -m support.addition.train --out weights.safetensors --threads 1

The evaluation at the end loads the written file, and tests new questions for every pair of digit
counts after 0 to 12 worked examples, in float32 and in float64. ``--steps 0`` evaluates an existing
file without training.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from support.addition import tokenizer
from support.addition.model import (
    CONFIG_KEY,
    Attend,
    DemoConfig,
    DemoModel,
    load_demo_model,
)

MAX_DIGITS = 6
MAX_EXAMPLES = 12
DIGIT_COUNT_WEIGHTS = (1.0, 1.0, 1.2, 1.5, 2.0, 2.5)
"""Weights of operands with 1, 2, ... digits in training; long ones need more practice."""


# Data ---------------------------------------------------------------------------------------------


def random_operands(rng: random.Random, digits_a: int, digits_b: int) -> tuple[int, int]:
    """Two numbers of the given digit counts, each number equally likely (one digit: 0 to 9)."""
    low_a, low_b = (0 if n == 1 else 10 ** (n - 1) for n in (digits_a, digits_b))
    return rng.randrange(low_a, 10**digits_a), rng.randrange(low_b, 10**digits_b)


def carry_heavy_operands(rng: random.Random, digits_a: int, digits_b: int) -> tuple[int, int]:
    """Two numbers of the given digit counts whose digit pairs mostly add up to 9 or more.

    Pairs that add up to 9 propagate an incoming carry, so carries run over many digits, or stop
    just before; with uniform numbers this is rare.
    """
    short, long = sorted((digits_a, digits_b))
    short_digits: list[int] = []
    long_digits: list[int] = []
    for i in range(long):
        kind = rng.random()
        if i < short:
            x = rng.randrange(10)
            if kind < 0.65:
                y = 9 - x
            elif kind < 0.85:
                y = rng.randrange(10 - x, 10) if x else 9
            else:
                y = rng.randrange(10)
            # The leading digit is not zero, unless the number has only one digit.
            short_digits.append(rng.randrange(1, 10) if x == 0 and i == short - 1 and i else x)
        else:
            y = 9 if kind < 0.75 else rng.randrange(10)
        long_digits.append(rng.randrange(1, 10) if y == 0 and i == long - 1 and i else y)
    numbers = [sum(d * 10**i for i, d in enumerate(ds)) for ds in (short_digits, long_digits)]
    if digits_a > digits_b or (digits_a == digits_b and rng.random() < 0.5):
        numbers.reverse()
    return numbers[0], numbers[1]


def sum_text(a: int, b: int) -> str:
    """The sum of two numbers as text, ``48+76=124;``."""
    return f"{a}+{b}={a + b};"


def random_sum(rng: random.Random, max_digits: int, carry_heavy: float) -> str:
    """A random sum; each operand has 1 to ``max_digits`` digits, drawn independently."""
    digits_a, digits_b = rng.choices(
        range(1, max_digits + 1), weights=DIGIT_COUNT_WEIGHTS[:max_digits], k=2
    )
    draw = carry_heavy_operands if rng.random() < carry_heavy else random_operands
    return sum_text(*draw(rng, digits_a, digits_b))


def training_batch(rng: random.Random, batch: int, length: int) -> Tensor:
    """Rows of packed sums, ``(batch, length)``; the last sum of a row may be cut."""
    rows: list[list[int]] = []
    for _ in range(batch):
        # Some rows only have short numbers, and so more sums.
        max_digits = rng.randint(1, MAX_DIGITS) if rng.random() < 0.2 else MAX_DIGITS
        text = ""
        while len(text) + 1 < length:
            text += random_sum(rng, max_digits, carry_heavy=0.4)
        rows.append(tokenizer.encode(text)[:length])
    return torch.tensor(rows)


def answer_mask(token_ids: Tensor) -> Tensor:
    """Which tokens belong to an answer, its ``;`` included: bool, shape of ``token_ids``.

    A token belongs to an answer if the tokens before it contain one more ``=`` than ``;``.
    """
    equals = (token_ids == tokenizer.EQUALS_ID).long().cumsum(dim=-1)
    ends = (token_ids == tokenizer.END_ID).long().cumsum(dim=-1)
    open_answers = (equals - ends)[..., :-1]
    return functional.pad(open_answers, (1, 0)).eq(1)


# Training -----------------------------------------------------------------------------------------


def make_fast_attend(config: DemoConfig, length: int) -> Attend:
    """The attention of ``DemoModel.dense_logits`` for ``(batch, length)`` rows, fast and trainable.

    Query heads that share a key head are in one matrix, and the mask is made once.
    """
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    masks: list[Tensor] = []
    for layer in config.layers:
        visible = distance >= 0
        if layer.sliding_window is not None:
            visible &= distance < layer.sliding_window
        masks.append(torch.zeros(length, length).masked_fill(~visible, float("-inf")))

    def attend(layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cap = config.layers[layer_index].logits_soft_cap
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if cap is None:
            output = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=masks[layer_index], scale=config.scale, enable_gqa=True
            )
            return output.transpose(1, 2)
        batch, num_heads = query.shape[:2]
        queries = query.reshape(batch, config.num_kv_heads, -1, config.head_size)
        scores = torch.tanh((config.scale / cap) * queries @ key.mT).mul(cap)
        masked = scores.reshape(batch, num_heads, length, length) + masks[layer_index]
        weights = masked.softmax(dim=-1).reshape(scores.shape)
        return (weights @ value).reshape(query.shape).transpose(1, 2)

    return attend


def orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards matrices with all singular values near 1, as in Muon.

    Args:
        matrices: ``(count, rows, columns)``, float32.

    Returns:
        Same shape; singular values roughly between 0.7 and 1.2, which is enough for Muon.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon:
    """Momentum with orthogonalized updates of weight matrices; equal shapes are batched.

    Source: K. Jordan et al., https://kellerjordan.github.io/posts/muon/. It needs several times
    fewer steps here than Adam, at a small cost per step.
    """

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95) -> None:
        self.momentum = momentum
        groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            groups[parameter.shape].append(parameter)
        self.groups = [(group, torch.zeros(len(group), *shape)) for shape, group in groups.items()]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the parameters; each must have a gradient."""
        for group, average in self.groups:
            gradients = torch.stack([p.grad for p in group if p.grad is not None])
            average.lerp_(gradients, 1 - self.momentum)
            update = orthogonalize(gradients.lerp(average, self.momentum))
            rows, columns = update.shape[1:]
            rate = learning_rate * max(1.0, rows / columns) ** 0.5
            for parameter, delta in zip(group, update, strict=True):
                parameter.sub_(delta, alpha=rate)


@dataclass(frozen=True)
class Stage:
    """A part of the training: the fraction of steps at which it ends, and its row lengths."""

    until: float
    lengths: tuple[int, ...]


CURRICULUM = (
    Stage(until=0.5, lengths=(64,)),
    Stage(until=0.65, lengths=(64, 128)),
    Stage(until=1.0, lengths=(64, 128, 288)),
)
TOKENS_PER_STEP = 2048


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 50 steps, constant for a quarter of all steps, then linear to zero."""
    return min(1.0, (step + 1) / 50, (1 - step / steps) / 0.75)


def save_model(model: DemoModel, path: Path) -> None:
    """Write a model's parameters as float16, with its config; the file is replaced atomically."""
    tensors = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    partial = path.with_name(path.name + ".partial")
    # safetensors' save_file makes a file that only its owner can read; this one is distributed.
    partial.write_bytes(save(tensors, metadata={CONFIG_KEY: model.config.to_json()}))
    partial.replace(path)


def train(steps: int, out: Path, seed: int, checkpoint_every: int) -> None:
    """Train a model and write it to ``out`` at the end and at every checkpoint."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = DemoConfig()
    model = DemoModel(config)
    nn.init.normal_(model.embedding.weight, std=0.5)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters} parameters, {steps} steps of about {TOKENS_PER_STEP} tokens")

    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = Muon(matrices)
    adam = torch.optim.Adam(others, betas=(0.9, 0.95))

    lengths = {length for stage in CURRICULUM for length in stage.lengths}
    attends = {length: make_fast_attend(config, length - 1) for length in lengths}

    start = time.perf_counter()
    mean_loss, mean_error, trained_tokens = 0.0, 1.0, 0
    for step in range(steps):
        stage = next(s for s in CURRICULUM if step < s.until * steps)
        length = rng.choice(stage.lengths)
        token_ids = training_batch(rng, TOKENS_PER_STEP // length, length)
        inputs, targets = token_ids[:, :-1], token_ids[:, 1:]
        counted = answer_mask(token_ids)[:, 1:]
        positions = torch.arange(length - 1).expand_as(inputs)

        logits = model(inputs, positions, attends[length])[counted]
        loss = functional.cross_entropy(logits, targets[counted])
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        factor = learning_rate_factor(step, steps)
        muon.step(0.02 * factor)
        for group in adam.param_groups:
            group["lr"] = 3e-3 * factor
        adam.step()

        trained_tokens += inputs.numel()
        error = (logits.argmax(dim=-1) != targets[counted]).float().mean().item()
        keep = min(0.95, step / (step + 1))
        mean_loss = keep * mean_loss + (1 - keep) * loss.item()
        mean_error = keep * mean_error + (1 - keep) * error
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - start
            print(
                f"step {step + 1:6d}/{steps}  loss {mean_loss:.2e}  "
                f"wrong answer tokens {mean_error:.4%}  "
                f"{trained_tokens / seconds:.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            save_model(model, out)


# Evaluation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A prompt that ends at ``=``, the right continuation, and the kind of question."""

    prompt: str
    answer: str
    digits: tuple[int, int]
    num_examples: int
    carry_heavy: bool


def make_questions(rng: random.Random, repeats: int) -> list[Question]:
    """``repeats`` questions of each kind, in the order of their number of worked examples.

    A kind is a pair of digit counts, a number of worked examples, and whether the operands are
    uniform or carry-heavy.
    """
    questions: list[Question] = []
    for num_examples in range(MAX_EXAMPLES + 1):
        for digits_a in range(1, MAX_DIGITS + 1):
            for digits_b in range(1, MAX_DIGITS + 1):
                for carry_heavy in (False, True) * repeats:
                    examples = "".join(
                        random_sum(rng, MAX_DIGITS, carry_heavy=0.4) for _ in range(num_examples)
                    )
                    draw = carry_heavy_operands if carry_heavy else random_operands
                    a, b = draw(rng, digits_a, digits_b)
                    questions.append(
                        Question(
                            prompt=f"{examples}{a}+{b}=",
                            answer=f"{a + b};",
                            digits=(digits_a, digits_b),
                            num_examples=num_examples,
                            carry_heavy=carry_heavy,
                        )
                    )
    return questions


@dataclass(frozen=True)
class Reply:
    """A model's reply to a question.

    Attributes:
        predicted: most likely token at each position of the right answer, after the right tokens
            before it. It equals the answer's ids exactly if greedy decoding gives the answer.
        right: the answer's ids.
        margin: smallest lead of a most likely token over the second one, in logits.
    """

    predicted: tuple[int, ...]
    right: tuple[int, ...]
    margin: float


@torch.no_grad()
def ask(model: DemoModel, questions: list[Question], batch: int = 48) -> Iterator[Reply]:
    """The model's replies, by ``dense_logits``."""
    for begin in range(0, len(questions), batch):
        asked = questions[begin : begin + batch]
        prompts = [tokenizer.encode(question.prompt) for question in asked]
        answers = [tokenizer.encode(question.answer, bos=False) for question in asked]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        length = max(map(len, rows))
        padded = [row + [tokenizer.PAD_ID] * (length - len(row)) for row in rows]
        logits = model.dense_logits(torch.tensor(padded))
        for row_logits, prompt, answer in zip(logits, prompts, answers, strict=True):
            first = len(prompt) - 1
            best = row_logits[first : first + len(answer)].topk(2, dim=-1)
            yield Reply(
                predicted=tuple(best.indices[:, 0].tolist()),
                right=tuple(answer),
                margin=float((best.values[:, 0] - best.values[:, 1]).min()),
            )


def print_accuracy(
    title: str,
    questions: list[Question],
    replies: list[Reply],
    group_of: Callable[[Question], str],
) -> None:
    """Print the number of exactly right replies, by group of questions."""
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for question, reply in zip(questions, replies, strict=True):
        group = group_of(question)
        asked[group] += 1
        right[group] += reply.predicted == reply.right
    print(f"exact match by {title}:")
    for group, count in asked.items():
        print(f"  {group:>12}  {right[group] / count:8.3%}  ({right[group]} of {count})")


def print_accuracy_by_digits(questions: list[Question], replies: list[Reply]) -> None:
    """Print the fraction of exactly right replies, as a table over pairs of digit counts."""
    right: dict[tuple[int, int], int] = defaultdict(int)
    asked: dict[tuple[int, int], int] = defaultdict(int)
    for question, reply in zip(questions, replies, strict=True):
        asked[question.digits] += 1
        right[question.digits] += reply.predicted == reply.right
    digit_counts = range(1, MAX_DIGITS + 1)
    print("exact match by digits of the first (down) and the second operand (across):")
    print("   " + "".join(f"{n:>9}" for n in digit_counts))
    for digits_a in digit_counts:
        pairs = [(digits_a, digits_b) for digits_b in digit_counts]
        print(f"  {digits_a}" + "".join(f"{right[p] / asked[p]:9.2%}" for p in pairs))


def evaluate(path: Path, seed: int, repeats: int) -> None:
    """Print the accuracy of the weights in a file, and the margins of their predictions."""
    questions = make_questions(random.Random(f"evaluation {seed}"), repeats)
    start = time.perf_counter()
    replies = list(ask(load_demo_model(torch.float32, path=path), questions))
    replies64 = list(ask(load_demo_model(torch.float64, path=path), questions))

    print_accuracy_by_digits(questions, replies)
    print_accuracy("worked examples before it", questions, replies, lambda q: f"{q.num_examples}")
    print_accuracy(
        "operands", questions, replies, lambda q: "carry-heavy" if q.carry_heavy else "uniform"
    )
    print_accuracy("all", questions, replies, lambda q: "all")

    for question, reply in zip(questions, replies, strict=True):
        if reply.predicted != reply.right:
            shown = tokenizer.decode(reply.predicted)
            print(f"wrong: {question.prompt}{question.answer} predicted as {shown}")

    agreeing = sum(r.predicted == s.predicted for r, s in zip(replies, replies64, strict=True))
    difference = max(abs(r.margin - s.margin) for r, s in zip(replies, replies64, strict=True))
    print(
        f"float32 and float64 predict the same tokens for {agreeing} of {len(questions)} questions"
    )
    margins = sorted(r.margin for r in replies64)
    print(
        f"lead of the most likely token over the second, in logits (float64): smallest "
        f"{margins[0]:.3f}, 0.1% quantile {margins[len(margins) // 1000]:.3f}, median "
        f"{margins[len(margins) // 2]:.3f}; float32 differs by at most {difference:.1e}"
    )
    margins = [r.margin for r in replies64 if r.predicted == r.right]
    print(f"smallest lead in a right answer: {min(margins, default=0.0):.3f}")
    print(f"evaluation took {time.perf_counter() - start:.0f} s")


def main() -> None:
    """Parse the command line, train, evaluate."""
    parser = argparse.ArgumentParser(
        description="Train the demo model of attn-dispatch and evaluate it."
    )
    parser.add_argument(
        "--steps", type=int, default=6500, help="training steps; 0: only evaluate the file --out"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("weights.safetensors"), help="the weights file to write"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    parser.add_argument(
        "--checkpoint-every", type=int, default=500, help="steps between writes of the file"
    )
    parser.add_argument(
        "--eval-repeats",
        type=int,
        default=8,
        help="evaluation questions per kind, of which there are 936; 0: no evaluation",
    )
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    if arguments.steps > 0:
        train(arguments.steps, arguments.out, arguments.seed, arguments.checkpoint_every)
    if arguments.eval_repeats > 0:
        evaluate(arguments.out, arguments.seed, arguments.eval_repeats)


if __name__ == "__main__":
    main()
